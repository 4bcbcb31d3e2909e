"""Products with packed matrices of three or two values a row: formats ``ternary``, ``sign`` and ``dictionary``.

On the CPU they run the compiled library (cpu/ternary_matmul.cpp) where there is one, products on a GPU run in Triton where
it is installed (triton/), everything else is plain torch. They are registered as ``moecompress::ternary_matmul`` and
``moecompress::ternary_dequantize``, so torch.compile keeps them whole. No gradients.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from moecompress.errors import UserError
from moecompress.kernels import crowd, library
from moecompress.kernels import triton as gpu
from moecompress.pack import dictionary, ternary
from moecompress.pack.dictionary import LONGEST, DictionaryBank
from moecompress.pack.fields import wrong
from moecompress.pack.ternary import SignBank, TernaryBank
from moecompress.progress import notice

Bank = TernaryBank | SignBank | DictionaryBank

INTERFACE = 2  # kInterface in ternary_matmul.cpp
#: rows of x for one matrix from which unpacking it for one dense product is faster, by the type of that product;
#: measured on 768 x 2048, one thread, AVX-512 VNNI and AMX: bfloat16 24 (dictionary) to 40 (sign), float32 32 to 64
CROWD = {torch.float32: 48, torch.bfloat16: 32}

_BAD_BANK, _NO_MEMORY, _BAD_SLOT, _BAD_CODES = 1, 2, 4, 5  # Outcome in ternary_matmul.cpp, Status in pool.h
_FORMATS = {TernaryBank: 0, SignBank: 1, DictionaryBank: 2}
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_POINTERS = ("codes", "levels", "ends", "book", "x", "slots", "index", "out")

_library = torch.library.Library("moecompress", "FRAGMENT")
# ends: of a dictionary bank alone, as are its two prices; levels of two dimensions are the scales of signs.
_BANK = "Tensor codes, Tensor levels, Tensor? ends, int[] prices"
_library.define(f"ternary_matmul(Tensor x, Tensor slots, {_BANK}) -> Tensor")
_library.define(f"ternary_dequantize({_BANK}, int cols, ScalarType dtype, Tensor? index=None) -> Tensor")


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((f"{name}_bytes", ctypes.c_int64) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("count", "rows", "cols", "first", "last")),
        *((name, ctypes.c_int32) for name in ("format", "type")),
    )


def matmul(x: Tensor, slots: Tensor, bank: Bank) -> Tensor:
    """Row s of the result is matrix ``slots[s]`` of the bank times row s of ``x``; zeros where ``slots[s]`` is -1.

    x (S, cols) float32, bfloat16 or float16; slots int32 (S,). -> (S, rows), x.dtype; sums in float32.
    On "avx512_vnni" x is taken as integers times a scale for each 32 to 80 columns: at most 2^-13 (bfloat16; exact above
    1/32) or 2^-21 (float32) of the largest among them off. Raises UserError if a tensor does not fit the format, a slot is
    outside -1 ... n - 1, or the rows that are read are damaged (in Triton both give rows of NaN, since the CPU does not wait).
    """
    return torch.ops.moecompress.ternary_matmul(x, slots, *_parts(bank))


def dequantize(bank: Bank, dtype: torch.dtype = torch.float32, index: Tensor | None = None) -> Tensor:
    """Matrices (n, rows, cols) of the bank, or those that ``index`` (int64, any order) selects along n."""
    return torch.ops.moecompress.ternary_dequantize(*_parts(bank), bank.cols, dtype, index)


def status() -> str:
    """What runs on the CPU: "avx512_vnni" or "portable"; or "reference" without the compiled library."""
    found = _load()
    return "reference" if found is None else found.moec_ternary_kernel().decode()


def choose(kernel: str) -> bool:
    """Use this kernel from now on; False if the machine lacks it. For tests and benchmarks."""
    found = _load()
    return found is not None and found.moec_ternary_choose(kernel.encode()) == 0


@lru_cache(maxsize=64)
def book(prices: tuple[int, int]) -> Tensor:
    """The dictionary of those prices as the library reads it, int64 (65536,), half a megabyte.

    A word's pairs t0 + 4 t1 are its half-bytes from the lowest on, its length in pairs is in bits 56 to 59.
    """
    found = dictionary.dictionary(prices)
    trits = found.trits.long()
    shifts = 4 * torch.arange(LONGEST)
    return ((trits[:, ::2] + 4 * trits[:, 1::2]) << shifts).sum(-1) + (found.lengths.long() << 4 * LONGEST)


def _parts(bank: Bank) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
    if isinstance(bank, DictionaryBank):
        return bank.words, bank.levels, bank.ends, list(bank.prices)
    return bank.codes, bank.levels if isinstance(bank, TernaryBank) else bank.scales, None, []


def _bank(codes: Tensor, levels: Tensor, ends: Tensor | None, prices: list[int], cols: int) -> Bank:
    if ends is not None:
        if len(prices) != 2:
            raise UserError("a dictionary has two prices", expected="[zero, sign]", got=prices)
        return DictionaryBank(codes, ends, levels, (prices[0], prices[1]), cols)
    return TernaryBank(codes, levels, cols) if levels.dim() == 3 else SignBank(codes, levels, cols)


def _shape(bank: Bank) -> tuple[int, int]:
    """Matrices and rows. UserError unless the tensors have the shapes and dtypes of the format."""
    if not isinstance(bank, DictionaryBank):
        ternary.check(bank)
        return bank.codes.shape[0], bank.codes.shape[1]
    dictionary.check(bank)
    return bank.ends.shape[0], bank.ends.shape[1]


def _matmul(x: Tensor, slots: Tensor, codes: Tensor, levels: Tensor, ends: Tensor | None, prices: list[int]) -> Tensor:
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise _refused("x", "float32, bfloat16 or float16 of shape (S, cols)", x)
    if slots.dtype != torch.int32 or slots.shape != x.shape[:1]:
        raise _refused("slots", f"int32 ({x.shape[0]},), one for each row of x", slots)
    for name, tensor in (("x", x), ("slots", slots)):
        if tensor.device != codes.device:
            raise UserError(f"{name} is on {tensor.device}, the bank on {codes.device}")
    bank = _bank(codes, levels, ends, prices, x.shape[1])
    count, rows = _shape(bank)
    if gpu.ready(codes.device):
        from moecompress.kernels.triton import dictionary as words
        from moecompress.kernels.triton import few_values

        if isinstance(bank, DictionaryBank):
            return words.matmul(x, slots, bank, book(bank.prices))
        return few_values.matmul(x, slots, bank)
    if codes.device.type != "cpu" or not _native_ready():
        crowd.check_range("slots", slots, -1, count)
        return _by_matrix(x, slots, slots.unique().tolist(), bank, rows, torch.float32)
    x, slots, wanted = x.contiguous(), slots.contiguous(), x.dtype
    return _on_cpu(x.float() if wanted == torch.float16 else x, slots, bank, count, rows).to(wanted)


def _on_cpu(x: Tensor, slots: Tensor, bank: Bank, count: int, rows: int) -> Tensor:
    crowded = crowd.crowded(slots, CROWD[x.dtype])
    if not crowded:
        return _multiply(x, slots, bank, count, rows)
    crowd.check_range("slots", slots, -1, count)
    y = _by_matrix(x, slots, crowded, bank, rows, x.dtype)
    rest = torch.nonzero(torch.isin(slots, torch.tensor(crowded), invert=True) & (slots >= 0)).squeeze(-1)
    if len(rest):
        y[rest] = _multiply(x[rest], slots[rest], bank, count, rows)
    return y


def _by_matrix(x: Tensor, slots: Tensor, chosen: list[int], bank: Bank, rows: int, dtype: torch.dtype) -> Tensor:
    return crowd.by_matrix(x, slots, chosen, rows, dtype, lambda slot: _unpack(bank, dtype, torch.tensor([slot]))[0])


def _dequantize(codes: Tensor, levels: Tensor, ends: Tensor | None, prices: list[int], cols: int, dtype: torch.dtype,
                index: Tensor | None = None) -> Tensor:  # fmt: skip
    bank = _bank(codes, levels, ends, prices, cols)
    count, _ = _shape(bank)
    if index is None:
        index = torch.arange(count)
    crowd.check_range("index", index, 0, count)
    return _unpack(bank, dtype, index.cpu())


def _unpack(bank: Bank, dtype: torch.dtype, index: Tensor) -> Tensor:
    """Matrices (len(index), rows, cols), on the bank's device."""
    device = _parts(bank)[0].device
    count, rows = _shape(bank)
    if device.type == "cpu" and dtype in _TYPES and _native_ready():
        out = torch.empty(len(index), rows, bank.cols, dtype=dtype)
        _run("moec_ternary_dequantize", bank, count, rows, {"index": index.long().contiguous(), "out": out}, out.dtype)
        return out
    if isinstance(bank, DictionaryBank):  # its words are looked up on the CPU
        there = DictionaryBank(bank.words.cpu(), bank.ends.cpu(), bank.levels.cpu(), bank.prices, bank.cols)
        matrices = [dictionary.dequantize(there, dtype, one, one + 1) for one in index.tolist()]
        return torch.cat([*matrices, torch.empty(0, rows, bank.cols, dtype=dtype)]).to(device)
    index = index.to(device)
    if isinstance(bank, TernaryBank):
        chosen: TernaryBank | SignBank = replace(bank, codes=bank.codes[index], levels=bank.levels[index])
    else:
        chosen = replace(bank, codes=bank.codes[index], scales=bank.scales[index])
    return ternary.dequantize(chosen, dtype)


def _multiply(x: Tensor, slots: Tensor, bank: Bank, count: int, rows: int) -> Tensor:
    out = x.new_empty(x.shape[0], rows)
    _run("moec_ternary_matmul", bank, count, rows, {"x": x, "slots": slots, "out": out}, x.dtype)
    return out


def _run(function: str, bank: Bank, count: int, rows: int, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    codes, levels, _, _ = _parts(bank)
    tensors = {**tensors, "codes": codes.contiguous(), "levels": levels.contiguous()}
    if isinstance(bank, DictionaryBank):
        tensors |= {"ends": bank.ends.contiguous(), "book": book(bank.prices)}
    job = _Job(count=count, rows=rows, cols=bank.cols, last=rows, format=_FORMATS[type(bank)], type=_TYPES[dtype])
    for name, tensor in tensors.items():
        setattr(job, name, tensor.data_ptr())
        setattr(job, f"{name}_bytes", tensor.nbytes)
    found = _load()
    assert found is not None
    outcome = library.call(found, function, job)
    if outcome == _BAD_SLOT:
        raise UserError(f"a slot points outside the bank of {count} matrices", expected=f"-1 ... {count - 1}")
    if outcome == _BAD_CODES:
        if isinstance(bank, DictionaryBank):
            raise wrong("words", f"rows of {-(-bank.cols // 2)} pairs, with ends that rise", "a row of another length")
        raise wrong("codes", f"bytes below {3**ternary.TRITS}, five trits each", "a larger byte")
    if outcome == _BAD_BANK:
        _shape(bank)  # names the tensor
        raise wrong("words", "a table with as many rows as there are matrices", f"shape {tuple(codes.shape)}")
    if outcome == _NO_MEMORY:
        raise MemoryError("no memory for the activations of a packed matrix product")
    if outcome:
        raise ValueError(f"{function} refused its arguments (status {outcome})")


def _refused(name: str, expected: str, tensor: Tensor) -> UserError:
    got = f"{tensor.dtype} {tuple(tensor.shape)}"
    return UserError(f"ternary_matmul cannot use {name}", expected=expected, got=got)


@cache
def _native_ready() -> bool:
    if _load() is not None:
        return True
    notice("no compiled ternary kernels, matrices of trits run slowly (install moecompress where a C++ compiler is)")
    return False


@cache
def _load() -> ctypes.CDLL | None:
    found = library.load("ternary_matmul", INTERFACE)
    if found is not None:
        found.moec_ternary_kernel.restype = ctypes.c_char_p
        found.moec_ternary_choose.argtypes = [ctypes.c_char_p]
    return found


_library.impl("ternary_matmul", _matmul, "CompositeExplicitAutograd")
_library.impl("ternary_dequantize", _dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("moecompress::ternary_matmul")
def _matmul_shape(x, slots, codes, levels, ends, prices):
    return x.new_empty(x.shape[0], levels.shape[1])


@torch.library.register_fake("moecompress::ternary_dequantize")
def _dequantize_shape(codes, levels, ends, prices, cols, dtype, index=None):
    count = levels.shape[0] if index is None else index.shape[0]
    return levels.new_empty(count, levels.shape[1], cols, dtype=dtype)
