"""Formats ``ternary`` and ``sign``: matrices of three or two values a row (SPEC.md, sections 5 and 6).

A trit t is 0, 1 or 2 and means the row's low level, zero, or its high level. Five of them make a byte.
Shapes: n matrices of (rows, cols) in a bank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moecompress.errors import UserError
from moecompress.pack.fields import Tensors, demand, pack_plane, unpack_plane, wrong

if TYPE_CHECKING:
    from moecompress.pack.scheme import Scheme

TRITS = 5  # in a byte: 3**5 = 243 <= 256
ZERO = 1  # the trit of weight 0; pads rows, so what a kernel reads past the end adds nothing


@dataclass(frozen=True)
class TernaryBank:
    """n matrices of one shape, each row of values {low, 0, high}."""

    codes: Tensor  # uint8 (n, rows, ceil(cols / 5))
    levels: Tensor  # bfloat16 (n, rows, 2): low, high
    cols: int

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "levels": self.levels}


@dataclass(frozen=True)
class SignBank:
    """n matrices of one shape, each row of values ±scale."""

    codes: Tensor  # uint8 (n, rows, ceil(cols / 8)); bit 1 is +
    scales: Tensor  # bfloat16 (n, rows)
    cols: int

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales}


def trit_bytes(cols: int) -> int:
    """Of a row's trits."""
    return -(-cols // TRITS)


def bit_bytes(cols: int) -> int:
    """Of a row's signs."""
    return -(-cols // 8)


def stored(scheme: Scheme, rows: int, cols: int) -> Tensors:
    """Tensors of one matrix in the file, as `int_format.stored`: trits and two levels a row, or (of one bit) signs and a scale."""
    if scheme.bits == 1:
        return {"codes": (torch.uint8, (rows, bit_bytes(cols))), "scales": (torch.bfloat16, (rows,))}
    return {"codes": (torch.uint8, (rows, trit_bytes(cols))), "levels": (torch.bfloat16, (rows, 2))}


def pack_trits(trits: Tensor) -> Tensor:
    """uint8 (..., cols), each below 3 -> uint8 (..., ceil(cols / 5)); the first trit of a byte counts 1, the last 81."""
    refuse_above("trit", trits, 2)
    padded = torch.nn.functional.pad(trits, (0, -trits.shape[-1] % TRITS), value=ZERO)
    return (padded.unflatten(-1, (-1, TRITS)) * _powers(trits.device)).sum(-1, dtype=torch.uint8)


def unpack_trits(packed: Tensor, cols: int) -> Tensor:
    """uint8 (..., ceil(cols / 5)) -> uint8 (..., cols). UserError if a byte is no five trits."""
    if packed.numel() and int(packed.max()) >= 3**TRITS:
        raise wrong("codes", f"bytes below {3**TRITS}, five trits each", f"a byte {int(packed.max())}")
    digits = packed.unsqueeze(-1) // _powers(packed.device) % 3
    return digits.flatten(-2)[..., :cols]


def pack_bits(bits: Tensor) -> Tensor:
    """uint8 (..., cols) of 0 and 1 -> uint8 (..., ceil(cols / 8)), lowest bit first."""
    refuse_above("bit", bits, 1)
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    return pack_plane(padded, 1)


def unpack_bits(packed: Tensor, cols: int) -> Tensor:
    """uint8 (..., ceil(cols / 8)) -> uint8 (..., cols) of 0 and 1."""
    return unpack_plane(packed, 1)[..., :cols]


def pack_ternary(trits: Tensor, levels: Tensor) -> TernaryBank:
    """trits uint8 (n, rows, cols), levels bfloat16 (n, rows, 2)."""
    bank = TernaryBank(pack_trits(trits), levels.contiguous(), trits.shape[-1])
    check(bank)
    return bank


def pack_signs(bits: Tensor, scales: Tensor) -> SignBank:
    """bits uint8 (n, rows, cols), 1 for +; scales bfloat16 (n, rows)."""
    bank = SignBank(pack_bits(bits), scales.contiguous(), bits.shape[-1])
    check(bank)
    return bank


def dequantize(bank: TernaryBank | SignBank, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (n, rows, cols). UserError if the bank is damaged."""
    check(bank)
    if isinstance(bank, TernaryBank):
        return weights(unpack_trits(bank.codes, bank.cols), bank.levels, dtype)
    scale = bank.scales.unsqueeze(-1)
    return torch.where(unpack_bits(bank.codes, bank.cols) > 0, scale, -scale).to(dtype)


def weights(trits: Tensor, levels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """trits (..., cols), levels (..., 2) -> weights (..., cols): low, 0 or high."""
    low, high = levels.to(dtype).split(1, -1)
    return torch.where(trits == 0, low, torch.where(trits == 2, high, torch.zeros((), dtype=dtype)))


def check(bank: TernaryBank | SignBank) -> None:
    """Raise UserError, naming the tensor, unless every tensor has the shape and dtype that the format demands."""
    if bank.cols < 1:
        raise UserError("a packed matrix needs columns", expected="cols >= 1", got=bank.cols)
    if bank.codes.dim() != 3:
        raise wrong("codes", "3 dimensions (n, rows, bytes)", f"shape {tuple(bank.codes.shape)}")
    lead = tuple(bank.codes.shape[:2])
    if isinstance(bank, TernaryBank):
        demand("codes", bank.codes, torch.uint8, (*lead, trit_bytes(bank.cols)))
        demand("levels", bank.levels, torch.bfloat16, (*lead, 2))
    else:
        demand("codes", bank.codes, torch.uint8, (*lead, bit_bytes(bank.cols)))
        demand("scales", bank.scales, torch.bfloat16, lead)


def refuse_above(name: str, values: Tensor, top: int) -> None:
    if values.dtype != torch.uint8 or (values.numel() and int(values.max()) > top):
        raise ValueError(f"a {name} is a uint8 from 0 to {top}")


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=device)
