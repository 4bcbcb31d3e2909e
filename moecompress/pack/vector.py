"""Format ``vector``: neighbouring weights of a row together as one entry of a codebook, which a whole bank shares (SPEC.md,
section 12). Shapes: n matrices of (rows, cols) in a bank, d weights in a vector, M vectors in a row, K entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moecompress.errors import UserError
from moecompress.pack.fields import Tensors, demand, pack_plane, unpack_plane, wrong

if TYPE_CHECKING:
    from moecompress.pack.scheme import Scheme

#: bits a weight -> weights in a vector, bits of an entry's number
RATES = {1: (8, 8), 1.5: (8, 12), 2: (4, 8), 3: (4, 12)}


@dataclass(frozen=True)
class VectorBank:
    """n matrices of one shape; weight = row scale · entry of the book. Every number that fits in a code is an entry's."""

    codes: Tensor  # uint8 (n, rows, row_bytes)
    row_scales: Tensor  # bfloat16 (n, rows)
    book: Tensor  # bfloat16 (K, d)
    bits: float
    cols: int

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by their names in the file."""
        return {"codes": self.codes, "row_scales": self.row_scales, "book": self.book}


def entries(bits: float) -> int:
    """K"""
    return 2 ** RATES[bits][1]


def vectors(cols: int, bits: float) -> int:
    """M"""
    return -(-cols // RATES[bits][0])


def row_bytes(cols: int, bits: float) -> int:
    """Bytes of one row of codes: a plane of the low 8 bits and, where there are 12, one of the high 4."""
    count = vectors(cols, bits)
    return count + (-(-count // 2) if RATES[bits][1] == 12 else 0)


def stored(scheme: Scheme, rows: int, cols: int) -> Tensors:
    """Tensors of one matrix in the file, as `int_format.stored`."""
    return {"codes": (torch.uint8, (rows, row_bytes(cols, scheme.bits))), "row_scales": (torch.bfloat16, (rows,))}


def shared(scheme: Scheme, cols: int) -> Tensors:
    """Tensors of the book, which all matrices of a bank have in common."""
    return {"book": (torch.bfloat16, (entries(scheme.bits), RATES[scheme.bits][0]))}


def pack(index: Tensor, row_scales: Tensor, book: Tensor, bits: float, cols: int) -> VectorBank:
    """index int (n, rows, M), each below K; row_scales bfloat16 (n, rows); book bfloat16 (K, d)."""
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < entries(bits):
        raise ValueError(f"an entry outside the book of {entries(bits)}")
    codes = (index & 255).to(torch.uint8)
    if RATES[bits][1] == 12:
        high = torch.nn.functional.pad(index >> 8, (0, index.shape[-1] % 2)).to(torch.uint8)
        codes = torch.cat([codes, pack_plane(high, 4)], -1)
    bank = VectorBank(codes.contiguous(), row_scales.contiguous(), book.contiguous(), bits, cols)
    check(bank)
    return bank


def unpack(bank: VectorBank) -> Tensor:
    """Numbers of entries, int64 (n, rows, M)."""
    count = vectors(bank.cols, bank.bits)
    index = bank.codes[..., :count].long()
    if RATES[bank.bits][1] == 12:
        index = index | (unpack_plane(bank.codes[..., count:], 4)[..., :count].long() << 8)
    return index


def dequantize(bank: VectorBank, dtype: torch.dtype = torch.float32, index: slice | Tensor | None = None) -> Tensor:
    """Matrices (n, rows, cols) of the bank, or of those that ``index`` selects along n. UserError if the bank is damaged."""
    check(bank)
    if index is not None:
        bank = replace(bank, codes=bank.codes[index], row_scales=bank.row_scales[index])
    weights = bank.book.float()[unpack(bank)].flatten(-2)[..., : bank.cols]
    return (weights * bank.row_scales.float().unsqueeze(-1)).to(dtype)


def check(bank: VectorBank) -> None:
    """Raise UserError, naming the tensor, unless every tensor has the shape and dtype that the format demands."""
    if bank.bits not in RATES or bank.cols < 1:
        raise UserError("the format vector has no such matrices", expected=f"{tuple(RATES)} bits, at least 1 column",
                        got=f"{bank.bits:g} bits, {bank.cols} columns")  # fmt: skip
    if bank.codes.dim() != 3:
        raise wrong("codes", "3 dimensions (n, rows, bytes)", f"shape {tuple(bank.codes.shape)}")
    lead = tuple(bank.codes.shape[:2])
    demand("codes", bank.codes, torch.uint8, (*lead, row_bytes(bank.cols, bank.bits)))
    demand("row_scales", bank.row_scales, torch.bfloat16, lead)
    demand("book", bank.book, torch.bfloat16, (entries(bank.bits), RATES[bank.bits][0]))
    for name, tensor in bank.tensors().items():
        if tensor.device != bank.codes.device:
            raise wrong(name, f"on {bank.codes.device}, with the codes", f"on {tensor.device}")
