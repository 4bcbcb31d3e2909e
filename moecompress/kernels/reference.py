"""The truth: what every kernel must compute, in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

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
    result = x.new_zeros(x.shape[0], bank.rows)
    for slot in slots.unique().tolist():
        if slot >= 0:
            chosen = torch.nonzero(slots == slot).squeeze(-1)
            weight = dequantize(bank, index=slice(slot, slot + 1))[0]  # (rows, cols)
            result[chosen] = (x[chosen].float() @ weight.T).to(x.dtype)
    return result
