"""The two operations on packed banks, as torch operators: `grouped_matmul` and `dequantize`.

On the CPU they run the compiled library where there is one (native.py), products on a GPU run in Triton where it is
installed (triton/), everything else is plain torch (reference.py).
They are registered as ``moecompress::grouped_matmul`` and ``moecompress::dequantize``, so torch.compile keeps them
whole. No gradients.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moecompress.errors import UserError
from moecompress.kernels import crowd, native, reference
from moecompress.kernels import triton as gpu
from moecompress.pack import int_format
from moecompress.pack.int_format import IntBank
from moecompress.progress import notice

#: rows of x for one matrix from which unpacking it for one dense product is faster, by the type of that product;
#: measured at 4 bits, 768 x 2048 and 2048 x 768, on two threads with AVX-512 VNNI and AMX: bfloat16 32 to 45, float32 70
CROWD = {torch.float32: 72, torch.bfloat16: 32}

_library = torch.library.Library("moecompress", "FRAGMENT")
_BANK = "Tensor codes, Tensor row_scales, Tensor? scales, Tensor? zeros, int bits, int group"
_library.define(f"grouped_matmul(Tensor x, Tensor slots, {_BANK}) -> Tensor")
_library.define(f"dequantize({_BANK}, int cols, ScalarType dtype, Tensor? index=None) -> Tensor")


def grouped_matmul(x: Tensor, slots: Tensor, bank: IntBank) -> Tensor:
    """Row s of the result is matrix ``slots[s]`` of the bank times row s of ``x``; zeros where ``slots[s]`` is -1.

    x (S, cols) float32, bfloat16 or float16; slots int32 (S,). -> (S, rows), x.dtype; sums in float32.
    Raises UserError if a tensor does not fit the format, or a slot is outside -1 ... n - 1 (in Triton: a row of NaN).
    """
    tensors = (bank.codes, bank.row_scales, bank.scales, bank.zeros)
    return torch.ops.moecompress.grouped_matmul(x, slots, *tensors, bank.bits, bank.group)


def dequantize(bank: IntBank, dtype: torch.dtype = torch.float32, index: Tensor | None = None) -> Tensor:
    """Matrices (n, rows, cols) of the bank, or those that ``index`` (int64, any order) selects along n."""
    tensors = (bank.codes, bank.row_scales, bank.scales, bank.zeros)
    return torch.ops.moecompress.dequantize(*tensors, bank.bits, bank.group, bank.cols, dtype, index)


def native_status() -> str:
    """What runs on the CPU: "avx512_vnni", "avx512", "avx2", "neon" or "scalar"; or "reference: <why>"."""
    return native.status()


def gpu_status() -> str:
    """What multiplies on GPUs, all formats: "triton <version>"; or "reference: <why>"."""
    return gpu.status()


@cache
def _native_ready() -> bool:
    status = native.status()
    if not status.startswith("reference"):
        return True
    notice(f"no compiled kernels, packed experts run slowly ({status.removeprefix('reference: ')})")
    return False


def check_operands(x: Tensor, slots: Tensor, bank: IntBank) -> None:
    """Raise UserError unless x and slots fit the bank and each other; the range of the slots is not looked at."""
    int_format.check(bank)
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise _refused("x", "float32, bfloat16 or float16 of shape (S, cols)", x)
    if slots.dtype != torch.int32 or slots.shape != x.shape[:1]:
        raise _refused("slots", f"int32 ({x.shape[0]},), one for each row of x", slots)
    for name, tensor in (("x", x), ("slots", slots)):
        if tensor.device != bank.codes.device:
            raise UserError(f"{name} is on {tensor.device}, the bank on {bank.codes.device}")


def _refused(name: str, expected: str, tensor: Tensor) -> UserError:
    got = f"{tensor.dtype} {tuple(tensor.shape)}"
    return UserError(f"grouped_matmul cannot use {name}", expected=expected, got=got)


def _grouped_matmul(
    x: Tensor,
    slots: Tensor,
    codes: Tensor,
    row_scales: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    bank = IntBank(codes, row_scales, scales, zeros, bits, group, x.shape[-1])
    check_operands(x, slots, bank)
    return multiply(x, slots, bank)


def multiply(x: Tensor, slots: Tensor, bank: IntBank) -> Tensor:
    """As `grouped_matmul`, for operands that are checked already."""
    if bank.codes.device.type == "cpu" and _native_ready():
        return _on_cpu(x, slots, bank)
    if gpu.ready(bank.codes.device):
        from moecompress.kernels.triton import integers

        return integers.matmul(x, slots, bank)
    crowd.check_range("slots", slots, -1, bank.count)
    return reference.grouped_matmul(x, slots, bank.codes, bank.row_scales, bank.scales, bank.zeros, bank.bits, bank.group)


def _on_cpu(x: Tensor, slots: Tensor, bank: IntBank) -> Tensor:
    if x.dtype == torch.float16:
        return _on_cpu(x.float(), slots, bank).to(torch.float16)
    x, bank = x.contiguous(), native.contiguous(bank)
    dense_type = torch.bfloat16 if x.dtype == torch.bfloat16 and native.multiplies_bfloat16() else torch.float32

    def few(x: Tensor, slots: Tensor) -> Tensor:
        return native.grouped_matmul(x, slots.contiguous(), bank)

    def unpack(slot: int, first: int, last: int, out: Tensor) -> None:
        native.dequantize(bank, torch.tensor([slot]), first, last, out[None])

    dense = crowd.crowded(slots, CROWD[dense_type])
    if not dense:
        return few(x, slots)
    crowd.check_range("slots", slots, -1, bank.count)
    return crowd.multiply(x, slots, dense, bank.rows, dense_type, few, unpack)


def _dequantize(
    codes: Tensor,
    row_scales: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    group: int,
    cols: int,
    dtype: torch.dtype,
    index: Tensor | None = None,
) -> Tensor:
    bank = IntBank(codes, row_scales, scales, zeros, bits, group, cols)
    int_format.check(bank)
    if index is not None:
        crowd.check_range("index", index, 0, bank.count)
    if codes.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and _native_ready():
        chosen = torch.arange(bank.count) if index is None else index.long().contiguous()
        weights = torch.empty(chosen.shape[0], bank.rows, cols, dtype=dtype)
        native.dequantize(native.contiguous(bank), chosen, 0, bank.rows, weights)
        return weights
    return int_format.dequantize(bank, dtype, index)


_library.impl("grouped_matmul", _grouped_matmul, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("moecompress::grouped_matmul")
def _grouped_matmul_shape(x, slots, codes, row_scales, scales, zeros, bits, group):
    return x.new_empty(x.shape[0], codes.shape[1])


@torch.library.register_fake("moecompress::dequantize")
def _dequantize_shape(codes, row_scales, scales, zeros, bits, group, cols, dtype, index=None):
    count = codes.shape[0] if index is None else index.shape[0]
    return codes.new_empty(count, codes.shape[1], cols, dtype=dtype)
