"""What the kernels share: which program multiplies which rows of x, and how they are started.

Few rows of x for a matrix: a program takes one row of x and some rows of its matrix. Many: rows of x are sorted by matrix
and cut into blocks; a program decodes some rows of a matrix once for a block and uses the GPU's matrix units.

All kernels read a row of a matrix in *units*: neighbouring columns whose codes are one word. They add up the products of
the first columns of all units, then of the second ones, and so on, so that nothing decoded must change its place.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: rows of x for each matrix of the bank, on average, up to which each is multiplied on its own
FEW = 2
ROWS_FEW, UNITS_FEW = 16, 64  # of a matrix, that a program decodes at a time
ROWS_MANY, UNITS_MANY = 64, 32
WARPS, STAGES = 4, 2  # two stages of rows of x fit the shared memory of every GPU since Ampere
BLOCK_MOST = 64  # rows of x in a block; at least 16, what matrix units take


def multiply(kernel: Any, x: Tensor, slots: Tensor, count: int, rows: int, unit: int, exact: bool, arguments: dict[str, Any]) -> Tensor:
    """Row s of the result is matrix ``slots[s]`` of ``count`` (rows, cols) times row s of x; zeros for -1. -> (S, rows), x.dtype.

    Slots outside the bank give rows of NaN: to refuse them, the CPU would have to wait for the GPU.
    unit: columns in a word. exact: weights are exact in bfloat16; then an x of another type is taken as the sum of two
    bfloat16 numbers, 2^-16 of each off at most, where there are many rows. arguments: the format's, by name.
    """
    size, slots = len(x), slots.contiguous()
    if not (size and rows and count):
        return blank(slots, count, rows, x.dtype)
    shape = {"size": size, "count": count, "rows": rows, "units": -(-x.shape[1] // unit), "UNIT": unit}
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if size <= FEW * count:
            y = x.new_empty(size, rows)
            parts = _by_unit(x, unit)[None]
            tiles = {"PARTS": 1, "ROWS": ROWS_FEW, "UNITS": UNITS_FEW, "BLOCK": 1, "MATRIX": tl.float32, "num_warps": WARPS}
            grid = (size, triton.cdiv(rows, ROWS_FEW))
            kernel[grid](parts, slots, slots, slots, slots, y, padded=parts.shape[-1], **shape, **arguments, **tiles)
            return y
        y = blank(slots, count, rows, x.dtype)
        block = min(BLOCK_MOST, max(16, triton.next_power_of_2(size // count)))
        order, blocks = assign(slots, count, block)
        parts = _parts(_by_unit(x[order], unit), exact)
        tiles = {"PARTS": len(parts), "ROWS": ROWS_MANY, "UNITS": UNITS_MANY, "BLOCK": block, "MATRIX": _matrix_type(parts),
                 "num_warps": WARPS, "num_stages": STAGES}  # fmt: skip
        grid = (blocks.shape[1], triton.cdiv(rows, ROWS_MANY))
        kernel[grid](parts, *blocks, order, y, padded=parts.shape[-1], **shape, **arguments, **tiles)
        return y


def words(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (..., n) as words (..., n / its size)."""
    tensor = tensor.contiguous()
    return (tensor.clone() if tensor.storage_offset() % dtype.itemsize else tensor).view(dtype)


def assign(slots: Tensor, count: int, block: int) -> tuple[Tensor, Tensor]:
    """Rows of x, sorted by slot, in blocks of at most ``block`` with one slot each: (order (S,), blocks (3, number)).

    A block is its slot, its first place in the order and the one behind its last. Their number is as large as it could be,
    since nobody waits for the GPU to tell; those that are not needed have slot ``count``. Slots outside 0 ... count - 1 are in none.
    """
    ordered, order = slots.sort(stable=True)
    edges = torch.searchsorted(ordered, torch.arange(count + 1, dtype=slots.dtype, device=slots.device))
    needed = (edges.diff() + (block - 1)) // block
    ends = needed.cumsum(0)
    number = torch.arange(min(len(slots), len(slots) // block + count), device=slots.device)
    slot = torch.searchsorted(ends, number, right=True)
    known = slot.clamp(max=count - 1)
    first = edges[known] + (number - (ends - needed)[known]) * block
    last = torch.minimum(first + block, edges[known + 1])
    return order, torch.stack([slot, first, torch.where(slot < count, last, first)])


def blank(slots: Tensor, count: int, rows: int, dtype: torch.dtype) -> Tensor:
    """(S, rows) of zeros, of NaN for slots outside the bank."""
    fill = torch.where((slots < -1) | (slots >= count), float("nan"), 0.0).to(dtype)
    return fill[:, None].expand(-1, rows).contiguous()


def _by_unit(x: Tensor, unit: int) -> Tensor:
    """x (S, cols) -> (S, unit, padded): first the first columns of all units, and so on; zeros behind the last unit.

    So a program reads neighbouring numbers, and need not ask where x ends.
    """
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % (unit * UNITS_FEW)))
    return x.unflatten(1, (-1, unit)).transpose(1, 2).contiguous()


def _parts(x: Tensor, exact: bool) -> Tensor:
    """x (...) -> (1 or 2, ...): what matrix units multiply, one after the other."""
    if x.dtype == torch.bfloat16 or not exact:
        return x[None]
    high = x.bfloat16()
    return torch.stack([high, (x.float() - high.float()).bfloat16()])


def _matrix_type(x: Tensor) -> Any:
    """In what type matrix units multiply; Triton's interpreter on the CPU does not multiply bfloat16, whose products are exact in float32."""
    return tl.bfloat16 if x.is_cuda and x.dtype == torch.bfloat16 else tl.float32


@triton.jit
def job(slots, firsts, lasts, order, count, rows, units, BLOCK: tl.constexpr):
    """(slot, its rows, its units, NaN if the slot is outside the bank, rows of x, rows of y, which of them are there)

    No rows and no units where there is no slot; the slot is 0 then, so that what it addresses exists.
    """
    block = tl.program_id(0)
    slot = tl.load(slots + block).to(tl.int64)
    inside = (slot >= 0) & (slot < count)
    if BLOCK == 1:
        places = block.to(tl.int64) + tl.arange(0, 1)
        live = places >= 0
        pairs = places
    else:
        places = tl.load(firsts + block).to(tl.int64) + tl.arange(0, BLOCK)
        live = places < tl.where(inside, tl.load(lasts + block), 0)
        pairs = tl.load(order + places, mask=live, other=0).to(tl.int64)
    verdict = tl.where((slot >= -1) & (slot < count), 0.0, float("nan"))
    return tl.where(inside, slot, 0), tl.where(inside, rows, 0), tl.where(inside, units, 0), verdict, places, pairs, live


@triton.jit
def add(
    total, weight, x, padded, size, inner, places, live, unit,
    UNIT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """total plus the products of weights [R, U], column ``inner`` of the units ``unit`` [U], with rows of x.

    One row: total [R, U], not summed over the units yet. A block: total [R, BLOCK]. x (PARTS, size, UNIT, padded).
    """
    if BLOCK == 1:
        at = x + (places * UNIT + inner)[:, None] * padded + unit[None, :]
        total += weight * tl.load(at).to(tl.float32)
    else:
        for part in tl.static_range(PARTS):
            at = x + ((part * size + places) * UNIT + inner)[None, :] * padded + unit[:, None]
            value = tl.load(at, mask=live[None, :], other=0.0)
            total = tl.dot(weight.to(value.dtype).to(MATRIX), value.to(MATRIX), total, input_precision="ieee")
    return total


@triton.jit
def deliver(y, total, pairs, live, verdict, row, rows, BLOCK: tl.constexpr):
    """Write sums [R, U], or [R, BLOCK], to rows of y."""
    if BLOCK == 1:
        values = tl.sum(total, axis=1) + verdict
        at = y + tl.sum(pairs, axis=0) * rows + row
        tl.store(at, values.to(y.dtype.element_ty), mask=row < rows)
    else:
        at = y + pairs[None, :] * rows + row[:, None]
        tl.store(at, total.to(y.dtype.element_ty), mask=live[None, :] & (row < rows)[:, None])
