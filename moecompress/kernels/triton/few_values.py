"""Formats ``ternary`` and ``sign`` (SPEC.md, sections 5 and 6) on a GPU."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecompress.kernels.triton import launch
from moecompress.pack.ternary import TRITS, SignBank, TernaryBank, unpack_trits


def matmul(x: Tensor, slots: Tensor, bank: TernaryBank | SignBank) -> Tensor:
    """As ternary_matmul.matmul, on checked operands on one GPU; slots outside the bank give NaN (launch.py), as do rows
    of a matrix with a byte that is no five trits."""
    trits = isinstance(bank, TernaryBank)
    levels = bank.levels if isinstance(bank, TernaryBank) else bank.scales
    count, rows, _ = bank.codes.shape
    codes = bank.codes.contiguous()
    table = _table(codes.device) if trits else codes
    arguments = {"codes": codes, "levels": levels.contiguous(), "table": table, "TERNARY": trits}
    return launch.multiply(_kernel, x, slots, count, rows, TRITS if trits else 8, True, arguments)


@cache
def _table(device: torch.device) -> Tensor:
    """int16 (256,), what a byte means: bit t that trit t is 0, bit 5 + t that it is 2, bit 10 that the byte is no five trits."""
    trits = unpack_trits(torch.arange(3**TRITS, dtype=torch.uint8)[:, None], TRITS)
    bits = 1 << torch.arange(TRITS)
    known = ((trits == 0) * bits + (trits == 2) * (bits << TRITS)).sum(-1)
    return torch.cat([known, torch.full((256 - len(known),), 1 << 2 * TRITS)]).to(torch.int16).to(device)


@triton.jit
def _kernel(
    x, slots, firsts, lasts, order, y, padded, size, count, rows, units,
    codes, levels, table,
    TERNARY: tl.constexpr,
    UNIT: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    slot, slot_rows, slot_units, verdict, places, pairs, live = launch.job(slots, firsts, lasts, order, count, rows, units, BLOCK)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    line = slot * rows + row  # of the bank, [R]
    there = row < slot_rows
    if TERNARY:
        low = tl.load(levels + line * 2, mask=there, other=0.0).to(tl.float32)[:, None]
        high = tl.load(levels + line * 2 + 1, mask=there, other=0.0).to(tl.float32)[:, None]
    else:
        high = tl.load(levels + line, mask=there, other=0.0).to(tl.float32)[:, None]
        low = -high
    if BLOCK == 1:
        total = tl.zeros((ROWS, UNITS), dtype=tl.float32)
    else:
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    seen = tl.zeros((ROWS, UNITS), dtype=tl.int32)
    for begin in range(0, slot_units, UNITS):
        unit = begin + tl.arange(0, UNITS)
        mask = there[:, None] & (unit < units)[None, :]
        code = tl.load(codes + line[:, None] * units + unit[None, :], mask=mask, other=121).to(tl.int32)  # 121: five zeros
        if TERNARY:
            code = tl.load(table + code).to(tl.int32)
            seen = seen | code
        for inner in tl.static_range(UNIT):
            if TERNARY:
                weight = tl.where((code & (32 << inner)) != 0, high, tl.where((code & (1 << inner)) != 0, low, 0.0))
            else:
                weight = tl.where((code & (1 << inner)) != 0, high, low)
            total = launch.add(total, weight, x, padded, size, inner, places, live, unit, UNIT, PARTS, BLOCK, MATRIX)
    if TERNARY:
        total += tl.where(tl.max(seen, axis=1) >= 1024, float("nan"), 0.0)[:, None]
    launch.deliver(y, total, pairs, live, verdict, row, rows, BLOCK)
