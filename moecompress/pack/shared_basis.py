"""Format ``shared-basis``: matrices A_e B with one B for all of a bank (SPEC.md, section 14; MoLAE, arXiv:2503.23100).

B has rank q and is stored once, as integers of 8 bits; the A_e are integers as in section 1, with q columns. So B x is computed
once for a token, whatever its experts. Shapes: n matrices of (rows, cols) in a bank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moecompress.pack import int_format
from moecompress.pack.fields import Tensors, demand, wrong
from moecompress.pack.int_format import IntBank, row_bytes

if TYPE_CHECKING:
    from moecompress.pack.scheme import Scheme

#: Of the basis. Two bytes would halve an error that is far below that of the coefficients already.
BASIS_BITS = 8


@dataclass(frozen=True)
class SharedBasisBank:
    """n matrices of one shape: coefficients times basis."""

    coefficients: IntBank  # n matrices (rows, q)
    basis: IntBank  # one matrix (q, cols)

    def tensors(self) -> dict[str, Tensor]:
        basis = {"basis_codes": self.basis.codes[0], "basis_row_scales": self.basis.row_scales[0]}
        return self.coefficients.tensors() | basis


def rank(cols: int, share: int) -> int:
    """q; ``share`` of the columns in thousandths."""
    return max(1, (2 * share * cols + 1000) // 2000)


def stored(scheme: Scheme, rows: int, cols: int) -> Tensors:
    """Tensors of the coefficients of one matrix in the file, as `int_format.stored`."""
    return int_format.stored(scheme.coefficients, rows, scheme.rank(cols))


def shared(scheme: Scheme, cols: int) -> Tensors:
    """Tensors of the basis, which all matrices of a bank have in common."""
    q = scheme.rank(cols)
    return {"basis_codes": (torch.uint8, (q, row_bytes(cols, BASIS_BITS))), "basis_row_scales": (torch.bfloat16, (q,))}


def basis_bank(codes: Tensor, row_scales: Tensor, cols: int) -> IntBank:
    """The stored tensors, uint8 [q, bytes] and bfloat16 [q], as a bank of one."""
    return IntBank(codes[None], row_scales[None], None, None, BASIS_BITS, 0, cols)


def dequantize(bank: SharedBasisBank, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (n, rows, cols). UserError if the bank is damaged."""
    check(bank)
    return (int_format.dequantize(bank.coefficients) @ int_format.dequantize(bank.basis)).to(dtype)


def check(bank: SharedBasisBank) -> None:
    """Raise UserError, naming the tensor, unless shapes and dtypes are the format's and all numbers of the basis are finite."""
    own, basis = bank.coefficients, bank.basis
    demand("basis_row_scales", basis.row_scales, torch.bfloat16, (1, own.cols))
    demand("basis_codes", basis.codes, torch.uint8, (1, own.cols, row_bytes(basis.cols, BASIS_BITS)))
    if not bool(basis.row_scales.isfinite().all()):
        raise wrong("basis_row_scales", "finite numbers", "others")
    int_format.check(own)
