"""Arithmetic on trellis banks and the rotation that goes with them, as torch operators.

On the CPU they run the compiled library (cpu/trellis_matmul.cpp) where there is one, products and rotations on a GPU run in
Triton where it is installed (triton/), everything else is plain torch. They are registered as ``moecompress::trellis_matmul``,
``trellis_dequantize`` and ``rotate``, so torch.compile keeps them whole. No gradients.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from moecompress.errors import UserError
from moecompress.kernels import crowd, library
from moecompress.kernels import triton as gpu
from moecompress.pack import rotation, trellis
from moecompress.pack.trellis import RATES, TrellisBank
from moecompress.progress import notice

INTERFACE = 1  # kInterface in trellis_matmul.cpp
#: rows of x for one matrix from which unpacking it for one dense float32 product is faster, by `status`; the others are
#: faster than that at any number; measured at 2 bits, 768 x 2048, on one thread
CROWD = {"portable": 24}

_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # Type in trellis_matmul.cpp
_BAD_SLOT, _BAD_BANK = 4, 5

_library = torch.library.Library("moecompress", "FRAGMENT")
_library.define("trellis_matmul(Tensor x, Tensor slots, Tensor stream, Tensor scales, float rate, int rows) -> Tensor")
_library.define("trellis_dequantize(Tensor stream, Tensor scales, float rate, int rows, int cols, ScalarType dtype, Tensor? index=None) -> Tensor")
_library.define("rotate(Tensor x, Tensor sign, bool undo) -> Tensor")


class _Bank(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("stream", "scales", "tables", "values")),
        *((f"{name}_bytes", ctypes.c_int64) for name in ("stream", "scales", "tables", "values")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "cols")),
        *((name, ctypes.c_int32) for name in ("bits", "vector")),
    )


class _Multiply(ctypes.Structure):
    _fields_ = (
        ("bank", _Bank),
        *((name, ctypes.c_void_p) for name in ("x", "slots", "y")),
        *((name, ctypes.c_int64) for name in ("x_bytes", "slots_bytes", "y_bytes", "batch")),
    )


class _Dequantize(ctypes.Structure):
    _fields_ = (
        ("bank", _Bank),
        *((name, ctypes.c_void_p) for name in ("index", "out")),
        *((name, ctypes.c_int64) for name in ("index_bytes", "out_bytes", "chosen", "first", "last")),
        ("type", ctypes.c_int32),
    )


class _Rotate(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "sign", "out")),
        *((name, ctypes.c_int64) for name in ("x_bytes", "sign_bytes", "out_bytes", "count", "size")),
        *((name, ctypes.c_int32) for name in ("type", "undo")),
    )


def matmul(x: Tensor, slots: Tensor, bank: TrellisBank) -> Tensor:
    """Row s of the result is T of matrix ``slots[s]`` times row s of ``x``, which is rotated already; zeros where ``slots[s]`` is -1.

    x float32 (S, cols); slots int32 (S,). -> float32 (S, rows), whose rotation is not undone. Except on "portable" x is
    taken as fixed-point numbers, 1/32638 of the largest in the row off at most, and as zero where that is below 2^-100;
    products and sums of those are exact until the end. In Triton, where many rows want a matrix, x is 2^-16 of each off at most.
    Raises UserError if a tensor does not fit the format, or a slot is outside -1 ... n - 1 (in Triton: a row of NaN).
    """
    return torch.ops.moecompress.trellis_matmul(x, slots, bank.stream, bank.scales, bank.rate, bank.rows)


def dequantized(bank: TrellisBank, dtype: torch.dtype = torch.float32, index: Tensor | None = None) -> Tensor:
    """T (n, rows, cols) of the bank's matrices, or of those that ``index`` (int64, any order) selects; rotation not undone."""
    tensors = (bank.stream, bank.scales)
    return torch.ops.moecompress.trellis_dequantize(*tensors, bank.rate, bank.rows, bank.cols, dtype, index)


def rotate(x: Tensor, sign: Tensor) -> Tensor:
    """H (sign ⊙ x) along the last dimension; x (..., n) of any float type, sign float32 (n,). -> float32.

    float32 whatever x is: a rotation mixes 128 numbers, and rounding their sums to bfloat16 would add an error to every one
    before a product that can do better.
    """
    return torch.ops.moecompress.rotate(x, sign, False)


def unrotate(x: Tensor, sign: Tensor) -> Tensor:
    """The inverse of `rotate`: sign ⊙ H x."""
    return torch.ops.moecompress.rotate(x, sign, True)


def status() -> str:
    """What runs on the CPU: "amx", "avx512_vbmi" or "portable"; or "reference" where the compiled library is missing."""
    found = _load()
    return "reference" if found is None else found.moec_trellis_matmul_name().decode()


def choose(name: str) -> bool:
    """Use "amx", "avx512_vbmi" or "portable" from now on; False if the machine lacks it. For tests and benchmarks."""
    found = _load()
    return found is not None and found.moec_trellis_matmul_choose(name.encode()) == 0


def _trellis_matmul(x: Tensor, slots: Tensor, stream: Tensor, scales: Tensor, rate: float, rows: int) -> Tensor:
    if x.dim() != 2 or x.dtype != torch.float32 or not x.shape[1]:
        raise _refused("trellis_matmul", "x", "float32 (S, cols)", x)
    if slots.dtype != torch.int32 or slots.shape != x.shape[:1]:
        raise _refused("trellis_matmul", "slots", f"int32 ({x.shape[0]},), one for each row of x", slots)
    bank = _bank(stream, scales, rate, rows, x.shape[1])
    if not (x.device == slots.device == stream.device == scales.device):
        raise UserError(f"x is on {x.device}, slots on {slots.device}, the bank on {stream.device} and {scales.device}")
    if stream.device.type == "cpu" and _ready():
        return _on_cpu(x.contiguous(), slots, bank)
    if gpu.ready(stream.device):
        from moecompress.kernels.triton import trellis as kernel

        return kernel.matmul(x, slots, bank)
    crowd.check_range("slots", slots, -1, len(scales))

    def matrix(slot: int) -> Tensor:
        return trellis.dequantize(_selected(bank, slice(slot, slot + 1)))[0]

    return crowd.by_matrix(x, slots, slots.unique().tolist(), rows, torch.float32, matrix)


def _on_cpu(x: Tensor, slots: Tensor, bank: TrellisBank) -> Tensor:
    def few(x: Tensor, slots: Tensor) -> Tensor:
        return multiply(x, slots.contiguous(), bank)

    def unpack(slot: int, first: int, last: int, out: Tensor) -> None:
        unpacked(bank, torch.tensor([slot]), first, last, out[None])

    least = CROWD.get(status())
    dense = [] if least is None else crowd.crowded(slots, least)
    if not dense:
        return few(x, slots)
    crowd.check_range("slots", slots, -1, len(bank.scales))
    return crowd.multiply(x, slots, dense, bank.rows, torch.float32, few, unpack)


def _trellis_dequantize(stream: Tensor, scales: Tensor, rate: float, rows: int, cols: int, dtype: torch.dtype,
                        index: Tensor | None = None) -> Tensor:  # fmt: skip
    bank = _bank(stream, scales, rate, rows, cols)
    if index is not None:
        crowd.check_range("index", index, 0, len(scales))
    if stream.device.type != "cpu" or dtype not in _TYPES or not _ready():
        return trellis.dequantize(bank if index is None else _selected(bank, index)).to(dtype)
    chosen = torch.arange(len(scales)) if index is None else index.long().contiguous()
    weights = torch.empty(len(chosen), rows, cols, dtype=dtype)
    unpacked(bank, chosen, 0, rows, weights)
    return weights


def _rotate(x: Tensor, sign: Tensor, undo: bool) -> Tensor:
    if not x.dim() or not x.shape[-1] or not x.is_floating_point():
        raise _refused("rotate", "x", "floating point (..., n)", x)
    if sign.dtype != torch.float32 or sign.shape != x.shape[-1:] or sign.device != x.device:
        raise _refused("rotate", "sign", f"float32 ({x.shape[-1]},) on {x.device}", sign)
    if gpu.ready(x.device):
        from moecompress.kernels.triton import rotation as kernel

        return kernel.rotate(x, sign, undo)
    if x.device.type != "cpu" or not _ready():
        return (rotation.unrotate if undo else rotation.rotate)(x.float(), sign)
    x, sign = (x if x.dtype in _TYPES else x.float()).contiguous(), sign.contiguous()
    out = torch.empty(x.shape)
    count = x.numel() // x.shape[-1]
    _run("moec_trellis_rotate", _Rotate(x.data_ptr(), sign.data_ptr(), out.data_ptr(), x.nbytes, sign.nbytes, out.nbytes,
                                        count, x.shape[-1], _TYPES[x.dtype], int(undo)))  # fmt: skip
    return out


def multiply(x: Tensor, slots: Tensor, bank: TrellisBank) -> Tensor:
    """As `matmul`, by the library at any batch; x and slots contiguous; everything on the CPU. Sizes are checked."""
    y = torch.empty(x.shape[0], max(bank.rows, 0))
    with_bank, alive = _record(bank)
    job = _Multiply(with_bank, x.data_ptr(), slots.data_ptr(), y.data_ptr(), x.nbytes, slots.nbytes, y.nbytes, x.shape[0])
    _run("moec_trellis_multiply", job, bank)
    del alive
    return y


def unpacked(bank: TrellisBank, index: Tensor, first: int, last: int, out: Tensor) -> None:
    """Write rows first ... last - 1 of the matrices that ``index`` (int64) names to ``out``, by the library.

    first is a multiple of 64; out (count, last - first, cols) contiguous, float32 or bfloat16.
    """
    with_bank, alive = _record(bank)
    job = _Dequantize(with_bank, index.data_ptr(), out.data_ptr(), index.nbytes, out.nbytes, len(index), first, last, _TYPES[out.dtype])
    _run("moec_trellis_dequantize", job, bank)
    del alive


def _record(bank: TrellisBank) -> tuple[_Bank, tuple[Tensor, ...]]:
    """The bank as the library wants it, and tensors that must outlive it."""
    if bank.rate not in RATES:
        trellis.check(bank)
    tensors = (bank.stream.contiguous(), bank.scales.contiguous(), *_tables(bank.rate))
    pointers, sizes = (t.data_ptr() for t in tensors), (t.nbytes for t in tensors)
    return _Bank(*pointers, *sizes, len(bank.scales), bank.rows, bank.cols, *RATES[bank.rate]), tensors


@cache
def _tables(rate: float) -> tuple[Tensor, Tensor]:
    """What the library looks up: the three tables, uint8, one behind the other; and the values of every window."""
    table = trellis.table(rate)
    # The library keeps the upper half of the levels and takes the lower one for its negative.
    assert torch.equal(table.levels, -table.levels.flip(0))
    return torch.cat([table.low.flatten(), table.high.flatten(), table.levels.view(torch.uint8)]), table.values()


def _bank(stream: Tensor, scales: Tensor, rate: float, rows: int, cols: int) -> TrellisBank:
    if rows < 1 or cols < 1:
        raise UserError("a trellis bank has no rows or columns", expected="at least 1 of each", got=f"{rows} x {cols}")
    if scales.dim() != 1:
        raise _refused("a trellis bank", "scales", "float32 (n,)", scales)
    bank = TrellisBank(stream, scales, rate, rows, cols)
    trellis.check(bank)
    return bank


def _selected(bank: TrellisBank, index: Tensor | slice) -> TrellisBank:
    return TrellisBank(bank.stream[index], bank.scales[index], bank.rate, bank.rows, bank.cols)


def _refused(function: str, name: str, expected: str, tensor: Tensor) -> UserError:
    return UserError(f"{function} cannot use {name}", expected=expected, got=f"{tensor.dtype} {tuple(tensor.shape)}")


def _run(function: str, job: ctypes.Structure, bank: TrellisBank | None = None) -> None:
    found = _load()
    assert found is not None
    code = library.call(found, function, job)
    if bank is not None and code == _BAD_BANK:
        trellis.check(bank)  # names the tensor
    if bank is not None and code == _BAD_SLOT:
        count = len(bank.scales)
        raise UserError(f"a slot points outside the bank of {count} matrices", expected=f"-1 ... {count - 1}")
    library.demand(function, code)


@cache
def _ready() -> bool:
    if _load() is not None:
        return True
    notice("no compiled trellis kernels, trellis-packed experts run slowly; install moecompress where a C++ compiler is")
    return False


@cache
def _load() -> ctypes.CDLL | None:
    found = library.load("trellis_matmul", INTERFACE)
    if found is not None:
        found.moec_trellis_matmul_name.restype = ctypes.c_char_p
        found.moec_trellis_matmul_choose.argtypes = [ctypes.c_char_p]
    return found


_library.impl("trellis_matmul", _trellis_matmul, "CompositeExplicitAutograd")
_library.impl("trellis_dequantize", _trellis_dequantize, "CompositeExplicitAutograd")
_library.impl("rotate", _rotate, "CompositeExplicitAutograd")


@torch.library.register_fake("moecompress::trellis_matmul")
def _trellis_matmul_shape(x, slots, stream, scales, rate, rows):
    return x.new_empty(x.shape[0], rows)


@torch.library.register_fake("moecompress::trellis_dequantize")
def _trellis_dequantize_shape(stream, scales, rate, rows, cols, dtype, index=None):
    return stream.new_empty(len(scales) if index is None else len(index), rows, cols, dtype=dtype)


@torch.library.register_fake("moecompress::rotate")
def _rotate_shape(x, sign, undo):
    return x.new_empty(x.shape, dtype=torch.float32)
