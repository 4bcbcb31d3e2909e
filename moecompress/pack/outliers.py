"""Format ``int`` with outliers: integers, and for a fixed share of every row a 16-bit value that is added (SPEC.md, section 11).

A row is cut into segments of 256 columns, each with a fixed number of outliers, so one byte says which column one is in, no
byte can point outside a segment, and every bank is rectangular. Shapes: n matrices of (rows, cols), k outliers in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moecompress.errors import UserError
from moecompress.pack import int_format
from moecompress.pack.fields import Tensors, demand, wrong
from moecompress.pack.int_format import IntBank
from moecompress.recipe import OUTLIER_SHARES

if TYPE_CHECKING:
    from moecompress.pack.scheme import Scheme

SEGMENT = 256  # columns
BITS = (2, 3, 4)
PER_MILLE = tuple(round(1000 * share) for share in OUTLIER_SHARES)
NAMES = ("outlier_values", "outlier_columns")


@dataclass(frozen=True)
class OutlierBank:
    """n matrices of one shape: integers plus k values in every row. Rows come last, so that a kernel reads them side by side."""

    dense: IntBank
    values: Tensor  # bfloat16 (n, k, rows), added to what the codes say
    columns: Tensor  # uint8 (n, k, rows), within the segment of that outlier
    share: float

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by their names in the file."""
        return self.dense.tensors() | dict(zip(NAMES, (self.values, self.columns), strict=True))


def in_a_row(cols: int, share: float) -> int:
    """k: that share of the columns, rounded, at least one."""
    return max(1, (round(1000 * share) * cols + 500) // 1000)


def counts(cols: int, share: float) -> list[int]:
    """How many of a row's outliers lie in each segment: as even as whole numbers allow."""
    k = in_a_row(cols, share)
    before = [(2 * k * min(end, cols) + cols) // (2 * cols) for end in range(0, cols + SEGMENT, SEGMENT)]
    return [last - first for first, last in pairwise(before)]


def starts(cols: int, share: float) -> Tensor:
    """int64 (k,): first column of the segment of each outlier."""
    each = torch.tensor(counts(cols, share))
    return torch.arange(0, SEGMENT * len(each), SEGMENT).repeat_interleave(each)


def stored(scheme: Scheme, rows: int, cols: int) -> Tensors:
    """Tensors of one matrix in the file, as `int_format.stored`."""
    shape = (in_a_row(cols, scheme.outliers), rows)
    return int_format.stored(scheme, rows, cols) | dict(zip(NAMES, ((torch.bfloat16, shape), (torch.uint8, shape)), strict=True))


def pack(dense: IntBank, values: Tensor, index: Tensor, share: float) -> OutlierBank:
    """values bfloat16 (n, rows, k), index int64 (n, rows, k): their columns, segment by segment."""
    columns = (index - starts(dense.cols, share)).transpose(1, 2)
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < SEGMENT:
        raise ValueError("an outlier is not in its segment")
    bank = OutlierBank(dense, values.transpose(1, 2).contiguous(), columns.to(torch.uint8).contiguous(), share)
    check(bank)
    return bank


def index_of(bank: OutlierBank) -> Tensor:
    """int64 (n, k, rows): the column of every outlier."""
    return bank.columns.long() + starts(bank.dense.cols, bank.share).to(bank.columns.device)[:, None]


def add_to(dense: Tensor, bank: OutlierBank) -> Tensor:
    """Matrices (n, rows, cols) of the codes alone, float, in place -> with outliers."""
    return dense.scatter_add_(2, index_of(bank).transpose(1, 2), bank.values.transpose(1, 2).to(dense.dtype))


def dequantize(bank: OutlierBank, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (n, rows, cols). UserError if the bank is damaged."""
    check(bank)
    return add_to(int_format.dequantize(bank.dense), bank).to(dtype)


def select(bank: OutlierBank, index: slice | Tensor) -> OutlierBank:
    """Some of the matrices."""
    tensors = {name: tensor[index] for name, tensor in bank.dense.tensors().items()}
    return replace(bank, dense=replace(bank.dense, **tensors), values=bank.values[index], columns=bank.columns[index])


def check(bank: OutlierBank) -> None:
    """Raise UserError, naming the tensor, unless every tensor has the shape and dtype that the format demands, and every
    outlier a column of the matrix."""
    int_format.check(bank.dense)
    check_added(bank)
    last, cols = counts(bank.dense.cols, bank.share)[-1], bank.dense.cols
    width = (cols - 1) % SEGMENT + 1
    if last and bank.columns.numel() and int(bank.columns[:, -last:].max()) >= width:
        raise wrong(NAMES[1], f"columns below {cols}", f"column {cols - width + int(bank.columns[:, -last:].max())}")


def check_added(bank: OutlierBank) -> None:
    """Raise UserError unless shapes and dtypes of the outliers fit the integers, which are checked already."""
    if bank.dense.bits not in BITS or round(1000 * bank.share) not in PER_MILLE:
        raise UserError("the format has no such outliers", expected=f"{BITS} bits and shares of {PER_MILLE} in a thousand",
                        got=f"{bank.dense.bits} bits, {bank.share:g}")  # fmt: skip
    count, rows = bank.dense.codes.shape[:2]
    shape = (count, in_a_row(bank.dense.cols, bank.share), rows)
    for name, tensor, dtype in zip(NAMES, (bank.values, bank.columns), (torch.bfloat16, torch.uint8), strict=True):
        demand(name, tensor, dtype, shape)
        if tensor.device != bank.dense.codes.device:
            raise wrong(name, f"on {bank.dense.codes.device}, with the codes", f"on {tensor.device}")
