"""Products with packed matrices that many rows of x want: unpacked a strip of rows at a time for a dense product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moecompress.errors import UserError

#: weights unpacked at a time for a dense product; a quarter of it took up to 1.8 times as long
TILE_WEIGHTS = 1 << 22
#: strips begin at multiples of this: formats with tiles know no other rows
STRIP = 64

#: (x, slots) -> the products of rows of x with matrices that few rows want
Few = Callable[[Tensor, Tensor], Tensor]
#: (slot, first, last, out [last - first, cols]): rows of one matrix
Unpack = Callable[[int, int, int, Tensor], None]


def check_range(name: str, values: Tensor, lowest: int, count: int) -> None:
    """Raise UserError unless every value is in lowest ... count - 1."""
    if values.numel() and (int(values.min()) < lowest or int(values.max()) >= count):
        raise UserError(
            f"{name} point outside the bank of {count} matrices",
            expected=f"{lowest} ... {count - 1}",
            got=f"{int(values.min())} ... {int(values.max())}",
        )


def crowded(slots: Tensor, crowd: int) -> list[int]:
    """The matrices that at least ``crowd`` rows of x want."""
    if slots.shape[0] < crowd:
        return []
    chosen, rows = slots.unique(return_counts=True)
    return [slot for slot in chosen[rows >= crowd].tolist() if slot >= 0]


def multiply(x: Tensor, slots: Tensor, dense: list[int], rows: int, dtype: torch.dtype, few: Few, unpack: Unpack) -> Tensor:
    """Row s is matrix ``slots[s]`` (``rows`` rows) times row s of x; those in ``dense`` in ``dtype``. -> (S, rows), x.dtype.

    All slots must be in range; -1 stands for zeros, which ``few`` writes.
    """
    y = x.new_empty(x.shape[0], rows)
    rest = slots.clone()
    for slot in dense:
        at = torch.nonzero(slots == slot).squeeze(-1)
        rest[at] = -2
        _multiply_dense(x, at, slot, dtype, unpack, y)
    left = torch.nonzero(rest > -2).squeeze(-1)
    if len(left):
        y[left] = few(x[left], rest[left])
    return y


def by_matrix(x: Tensor, slots: Tensor, chosen: list[int], rows: int, dtype: torch.dtype, matrix: Callable[[int], Tensor]) -> Tensor:
    """Row s is ``matrix(slots[s])`` (rows × cols, ``dtype``) times row s of x, where it is in ``chosen``; zeros elsewhere.

    -> (S, rows), x.dtype; products and sums in ``dtype``, rounded once.
    """
    y = x.new_zeros(x.shape[0], rows)
    for slot in chosen:
        if slot >= 0:
            at = torch.nonzero(slots == slot).squeeze(-1)
            y[at] = (x[at].to(dtype) @ matrix(slot).T).to(x.dtype)
    return y


def _multiply_dense(x: Tensor, at: Tensor, slot: int, dtype: torch.dtype, unpack: Unpack, y: Tensor) -> None:
    """y[at] = x[at] times the matrix ``slot``, unpacked a strip of rows at a time into the same buffer."""
    whole = len(at) == len(x)  # no row has another matrix: nothing to gather
    inputs = (x if whole else x[at]).to(dtype)
    rows, cols = y.shape[1], x.shape[1]
    step = min(rows, max(1, TILE_WEIGHTS // cols // STRIP) * STRIP)
    buffer = torch.empty(step * cols, dtype=dtype)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        strip = buffer[: (last - first) * cols].view(last - first, cols)
        unpack(slot, first, last, strip)
        part = (inputs @ strip.T).to(y.dtype)
        if whole:
            y[:, first:last] = part
        else:
            y[at, first:last] = part
