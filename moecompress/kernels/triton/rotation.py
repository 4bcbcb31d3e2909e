"""The rotation of SPEC.md, section 9, on a GPU: one product with a matrix of 128 x 128 for each block, instead of seven steps of sums."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecompress.pack.rotation import BLOCK, hadamard

ROWS = 16


def rotate(x: Tensor, sign: Tensor, undo: bool) -> Tensor:
    """As trellis_matmul.rotate, or unrotate, on checked operands on one GPU. -> float32."""
    x, sign = x.contiguous(), sign.contiguous()
    y = torch.empty(x.shape, device=x.device)
    size = x.shape[-1]
    lines = x.numel() // size
    if lines:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            grid = (triton.cdiv(lines, ROWS), triton.cdiv(size, BLOCK))
            _kernel[grid](x, sign, _matrices(size % BLOCK, x.device), y, lines, size, UNDO=undo, ROWS=ROWS, BLOCK=BLOCK, num_warps=4)
    return y


@cache
def _matrices(rest: int, device: torch.device) -> Tensor:
    """(2, 128, 128): what multiplies a whole block, and the ``rest`` columns behind the last one."""
    found = torch.zeros(2, BLOCK, BLOCK)
    found[0] = hadamard(torch.eye(BLOCK))
    if rest:
        found[1, :rest, :rest] = hadamard(torch.eye(rest))
    return found.to(device)


@triton.jit
def _kernel(x, sign, matrices, y, lines, size, UNDO: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, BLOCK)
    col = tl.program_id(1) * BLOCK + inner
    mask = (line < lines)[:, None] & (col < size)[None, :]
    at = line[:, None] * size + col[None, :]
    signs = tl.load(sign + col, mask=col < size, other=0.0)[None, :]
    which = tl.where((tl.program_id(1) + 1) * BLOCK <= size, 0, BLOCK * BLOCK)
    matrix = tl.load(matrices + which + inner[:, None] * BLOCK + inner[None, :])  # symmetric
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if UNDO:
        value = tl.dot(value, matrix, input_precision="ieee") * signs
    else:
        value = tl.dot(value * signs, matrix, input_precision="ieee")
    tl.store(y + at, value, mask=mask)
