"""Products with matrices of vectors, as the torch operator ``moecompress::vector_matmul``: plain torch on any device, matrix
after matrix. A baseline to compare other codes with, not a fast path. No gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompress.errors import UserError
from moecompress.kernels import crowd
from moecompress.pack import vector
from moecompress.pack.vector import VectorBank

_library = torch.library.Library("moecompress", "FRAGMENT")
_library.define("vector_matmul(Tensor x, Tensor slots, Tensor codes, Tensor row_scales, Tensor book, float bits) -> Tensor")


def matmul(x: Tensor, slots: Tensor, bank: VectorBank) -> Tensor:
    """Row s of the result is matrix ``slots[s]`` of the bank times row s of ``x``; zeros where ``slots[s]`` is -1.

    x (S, cols) float32, bfloat16 or float16; slots int32 (S,). -> (S, rows), x.dtype; products in float32, rounded once.
    Raises UserError if a tensor does not fit the format, or a slot is outside -1 ... n - 1.
    """
    return torch.ops.moecompress.vector_matmul(x, slots, bank.codes, bank.row_scales, bank.book, bank.bits)


def _matmul(x: Tensor, slots: Tensor, codes: Tensor, row_scales: Tensor, book: Tensor, bits: float) -> Tensor:
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise _refused("x", "float32, bfloat16 or float16 of shape (S, cols)", x)
    if slots.dtype != torch.int32 or slots.shape != x.shape[:1]:
        raise _refused("slots", f"int32 ({x.shape[0]},), one for each row of x", slots)
    bank = VectorBank(codes, row_scales, book, bits, x.shape[1])
    vector.check(bank)
    if not x.device == slots.device == codes.device:
        raise UserError(f"x is on {x.device}, slots on {slots.device}, the bank on {codes.device}")
    crowd.check_range("slots", slots, -1, len(codes))

    def matrix(slot: int) -> Tensor:
        return vector.dequantize(bank, index=slice(slot, slot + 1))[0]

    return crowd.by_matrix(x, slots, slots.unique().tolist(), codes.shape[1], torch.float32, matrix)


def _refused(name: str, expected: str, tensor: Tensor) -> UserError:
    return UserError(f"vector_matmul cannot use {name}", expected=expected, got=f"{tensor.dtype} {tuple(tensor.shape)}")


_library.impl("vector_matmul", _matmul, "CompositeExplicitAutograd")


@torch.library.register_fake("moecompress::vector_matmul")
def _matmul_shape(x, slots, codes, row_scales, book, bits):
    return x.new_empty(x.shape[0], codes.shape[1])
