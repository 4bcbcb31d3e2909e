"""Format ``low-rank``: a product of two thin matrices plus a few whole columns (SPEC.md, section 11).

MC-SMoE's W = UV + S (arXiv:2310.01334, section 3.2) with an S of whole columns. U and S lie side by side in one tensor, so
that W x is one product with (V x, the kept inputs). Shapes: n matrices of (rows, cols) in a bank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moecompress.errors import UserError
from moecompress.pack.fields import Tensors, demand, wrong

if TYPE_CHECKING:
    from moecompress.pack.scheme import Scheme

MOST_COLUMNS = 2**16  # what a uint16 tells apart


@dataclass(frozen=True)
class LowRankBank:
    """n matrices of one shape, rank r and k kept columns."""

    left: Tensor  # bfloat16 (n, rows, r + k): U, then the columns of S
    right: Tensor  # bfloat16 (n, r, cols): V
    kept: Tensor | None  # uint16 (n, k): which columns S has, rising; None if k is 0

    def tensors(self) -> dict[str, Tensor]:
        found = {"left": self.left, "right": self.right, "kept": self.kept}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def sizes(rows: int, cols: int, shares: tuple[int, int]) -> tuple[int, int]:
    """Rank r and number k of kept columns; ``shares`` in thousandths: of the smaller side, of the columns."""
    rank = max(1, (2 * shares[0] * min(rows, cols) + 1000) // 2000)
    kept = shares[1] * cols // 1000
    if kept and cols > MOST_COLUMNS:
        raise UserError("a matrix is too wide for kept columns", expected=f"at most {MOST_COLUMNS} columns", got=cols,
                        remedy="leave out sparse")  # fmt: skip
    return rank, kept


def stored(scheme: Scheme, rows: int, cols: int) -> Tensors:
    """Tensors of one matrix in the file, as `int_format.stored`: both factors, the kept columns and their numbers."""
    rank, kept = sizes(rows, cols, scheme.shares)
    numbers: Tensors = {"kept": (torch.uint16, (kept,))} if kept else {}
    return {"left": (torch.bfloat16, (rows, rank + kept)), "right": (torch.bfloat16, (rank, cols))} | numbers


def pack(left: Tensor, right: Tensor, kept: Tensor) -> LowRankBank:
    """left (n, rows, r + k), right (n, r, cols), both of any floating dtype; kept integers (n, k)."""
    numbers = kept.to(torch.uint16) if kept.shape[-1] else None
    bank = LowRankBank(left.to(torch.bfloat16).contiguous(), right.to(torch.bfloat16).contiguous(), numbers)
    check(bank)
    return bank


def dequantize(bank: LowRankBank, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (n, rows, cols). UserError if the bank is damaged."""
    check(bank)
    rank = bank.right.shape[1]
    dense = bank.left[..., :rank].float() @ bank.right.float()
    if bank.kept is not None:
        where = bank.kept.long().unsqueeze(1).expand(-1, dense.shape[1], -1)
        dense.scatter_add_(2, where, bank.left[..., rank:].float())
    return dense.to(dtype)


def check(bank: LowRankBank) -> None:
    """Raise UserError, naming the tensor, unless shapes and dtypes are the format's and columns rise and are there."""
    if bank.right.dim() != 3:
        raise wrong("right", "3 dimensions (n, r, cols)", f"shape {tuple(bank.right.shape)}")
    count, rank, cols = bank.right.shape
    demand("right", bank.right, torch.bfloat16, (count, rank, cols))
    kept = 0 if bank.kept is None else bank.kept.shape[-1]
    demand("left", bank.left, torch.bfloat16, (count, bank.left.shape[-2], rank + kept))
    if bank.kept is not None:
        demand("kept", bank.kept, torch.uint16, (count, kept))
        numbers = bank.kept.long()
        if bool((numbers >= cols).any()) or bool((numbers.diff(dim=1) <= 0).any()):
            raise wrong("kept", f"rising numbers of columns below {cols}", f"{numbers[0, :8].tolist()} ...")
