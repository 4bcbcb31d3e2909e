"""Format ``trellis`` (SPEC.md, section 9) on a GPU: every window is decoded on its own, by one look-up."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moecompress.kernels.triton import launch
from moecompress.pack.trellis import RATES, TABLE_STEP, TrellisBank, table, tile_bytes, tile_shape, tiles

#: values of a step -> a word that holds them all
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def matmul(x: Tensor, slots: Tensor, bank: TrellisBank) -> Tensor:
    """As trellis_matmul.matmul, on checked operands on one GPU; slots outside the bank give NaN (launch.py)."""
    bits, values = RATES[bank.rate]
    high, _ = tile_shape(bank.rate)
    down, across = tiles(bank.rows, bank.cols, bank.rate)
    arguments = {
        "tape": launch.words(bank.stream, torch.int16),
        "scales": bank.scales.contiguous(),
        "table": _table(bank.rate, bank.stream.device),
        "tiles": down * across,
        "across": across,
        "step": TABLE_STEP,
        "BITS": bits,
        "HIGH": high,
        "WORDS": tile_bytes(bank.rate) // 2,
    }
    return launch.multiply(_kernel, x, slots, len(bank.scales), bank.rows, values, True, arguments)


@cache
def _table(rate: float, device: torch.device) -> Tensor:
    """(4096,) words: the values of a window, the first lowest. On a GPU one look-up in 16 KB is cheaper than three in 64 bytes."""
    values = table(rate).values()
    return values.view(WORDS[values.shape[1]]).flatten().to(device)


@triton.jit
def _kernel(
    x, slots, firsts, lasts, order, y, padded, size, count, rows, units,
    tape, scales, table, tiles, across, step,
    BITS: tl.constexpr, HIGH: tl.constexpr, WORDS: tl.constexpr,
    UNIT: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    slot, slot_rows, slot_units, verdict, places, pairs, live = launch.job(slots, firsts, lasts, order, count, rows, units, BLOCK)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = row < slot_rows
    tile_row = slot * tiles + (row // HIGH) * across
    first = (row % HIGH) * 4  # step of a tile, of four in a row
    scale = tl.load(scales + slot) * step
    if BLOCK == 1:
        total = tl.zeros((ROWS, UNITS), dtype=tl.float32)
    else:
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for begin in range(0, slot_units, UNITS):
        unit = begin + tl.arange(0, UNITS)
        mask = there[:, None] & (unit < units)[None, :]
        start = (first[:, None] + (unit % 4)[None, :] + 1) * BITS - 12  # the first bit of a window, on a circle
        start = tl.where(start < 0, start + WORDS * 16, start)
        word = start // 16
        after = tl.where(word == WORDS - 1, 0, word + 1)
        tile = tape + (tile_row[:, None] + (unit // 4)[None, :]) * WORDS
        bits = tl.load(tile + word, mask=mask, other=0).to(tl.int32) & 0xFFFF
        bits = bits | (tl.load(tile + after, mask=mask, other=0).to(tl.int32) << 16)
        found = tl.load(table + ((bits >> (start % 16)) & 0xFFF), mask=mask, other=0).to(tl.int32)
        for inner in tl.static_range(UNIT):
            weight = ((found << (24 - 8 * inner)) >> 24).to(tl.float32)
            total = launch.add(total, weight, x, padded, size, inner, places, live, unit, UNIT, PARTS, BLOCK, MATRIX)
    launch.deliver(y, total * scale, pairs, live, verdict, row, rows, BLOCK)
