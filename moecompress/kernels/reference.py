"""The truth: what every kernel must compute, in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompress.kernels.crowd import by_matrix
from moecompress.pack.int_format import IntBank, dequantize


def grouped_matmul(
    x: Tensor,
    slots: Tensor,
    codes: Tensor,
    row_scales: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """Row s of the result is matrix ``slots[s]`` of the bank times row s of ``x``; zeros where ``slots[s]`` is -1.

    x (S, cols) float32, bfloat16 or float16; slots int32 (S,); the bank's tensors as in SPEC.md. -> (S, rows), x.dtype.
    Products and sums are in float32 and rounded once.
    """
    bank = IntBank(codes, row_scales, scales, zeros, bits, group, x.shape[1])

    def matrix(slot: int) -> Tensor:
        return dequantize(bank, index=slice(slot, slot + 1))[0]

    return by_matrix(x, slots, slots.unique().tolist(), bank.rows, torch.float32, matrix)
