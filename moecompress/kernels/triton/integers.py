"""Format ``int`` (SPEC.md, section 1) on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecompress.kernels.triton import launch
from moecompress.pack.int_format import IntBank, groups, row_bytes

#: bits -> columns in a word, and the word of the first plane; the second plane of 3 bits has a byte for them
WORDS = {2: (8, torch.int16), 3: (8, torch.int16), 4: (8, torch.int32), 8: (4, torch.int32)}


def matmul(x: Tensor, slots: Tensor, bank: IntBank) -> Tensor:
    """As kernels.grouped_matmul, on checked operands on one GPU; slots outside the bank give NaN (launch.py).

    Where many rows of a bfloat16 x want a matrix, its weights are rounded to bfloat16.
    """
    if x.dtype == torch.float16:
        return matmul(x.float(), slots, bank).half()
    unit, word = WORDS[bank.bits]
    codes = bank.codes.contiguous()
    count = groups(bank.cols, bank.group)
    arguments = {
        "codes": launch.words(codes, word),
        "high": codes,
        "row_scales": bank.row_scales.contiguous(),
        "scales": codes if bank.scales is None else bank.scales.contiguous(),
        "zeros": codes if bank.zeros is None else bank.zeros.contiguous(),
        "words": row_bytes(bank.cols, bank.bits) // word.itemsize,
        "groups": count,
        "zero_bytes": -(-count * bank.bits // 8),
        "BITS": bank.bits,
        "GROUP": bank.group,
        "ZEROS": bank.zeros is not None,
    }
    return launch.multiply(_kernel, x, slots, bank.count, bank.rows, unit, False, arguments)


@triton.jit
def _kernel(
    x, slots, firsts, lasts, order, y, padded, size, count, rows, units,
    codes, high, row_scales, scales, zeros, words, groups, zero_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    UNIT: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    slot, slot_rows, slot_units, verdict, places, pairs, live = launch.job(slots, firsts, lasts, order, count, rows, units, BLOCK)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    line = slot * rows + row  # of the bank, [R]
    there = row < slot_rows
    row_scale = tl.load(row_scales + line, mask=there, other=0.0).to(tl.float32)[:, None]
    if BLOCK == 1:
        total = tl.zeros((ROWS, UNITS), dtype=tl.float32)
    else:
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for begin in range(0, slot_units, UNITS):
        unit = begin + tl.arange(0, UNITS)
        mask = there[:, None] & (unit < units)[None, :]
        word = tl.load(codes + line[:, None] * words + unit[None, :], mask=mask, other=0).to(tl.int32)
        if BITS == 3:  # a row: 4 bytes for 16 codes, then 2; `words` counts pairs of bytes
            third = tl.load(high + line[:, None] * (2 * words) + (words // 3) * 4 + unit[None, :], mask=mask, other=0).to(tl.int32)
        group = unit * 0
        scale = row_scale
        if GROUP > 0:
            group = unit * UNIT // GROUP
            scale = scale * tl.load(scales + line[:, None] * groups + group[None, :], mask=mask, other=0).to(tl.float32)
        if ZEROS:
            at = group * BITS
            zero_at = zeros + line[:, None] * zero_bytes + (at // 8)[None, :]
            zero = tl.load(zero_at, mask=mask, other=0).to(tl.int32)
            if BITS == 3:
                more = mask & (at // 8 + 1 < zero_bytes)[None, :]
                zero = zero | (tl.load(zero_at + 1, mask=more, other=0).to(tl.int32) << 8)
            middle = ((zero >> (at % 8)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)
        else:
            middle = ((1 << BITS) - 1) * 0.5
        part = tl.zeros((ROWS, UNITS), dtype=tl.float32)
        for inner in tl.static_range(UNIT):
            if BITS == 3:
                code = ((word >> (2 * inner)) & 3) | (((third >> inner) & 1) << 2)
            else:
                code = (word >> (BITS * inner)) & ((1 << BITS) - 1)
            weight = code.to(tl.float32) - middle
            if BLOCK == 1:
                part = launch.add(part, weight, x, padded, size, inner, places, live, unit, UNIT, PARTS, BLOCK, MATRIX)
            else:
                total = launch.add(total, weight * scale, x, padded, size, inner, places, live, unit, UNIT, PARTS, BLOCK, MATRIX)
        if BLOCK == 1:
            total += part * scale
    launch.deliver(y, total, pairs, live, verdict, row, rows, BLOCK)
