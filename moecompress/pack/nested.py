"""Format ``nested``: integers whose highest bits are integers again, so one file serves several widths (SPEC.md, section 10).

The two highest bits of every code lie in one tensor, each further bit in one of its own: whoever wants fewer bits leaves
the last tensors away. Shapes: n matrices of (rows, cols) in a bank, G groups in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moecompress.errors import UserError
from moecompress.pack import int_format
from moecompress.pack.fields import Tensors, demand, pack_plane, unpack_plane, wrong
from moecompress.pack.int_format import PAD, IntBank

if TYPE_CHECKING:
    from moecompress.pack.scheme import Scheme

BASE = 2  # bits of the first tensor, the fewest that can be loaded
BITS = (3, 4)


@dataclass(frozen=True)
class NestedBank:
    """n matrices of one shape and group, at ``bits`` bits: those of the file, or fewer where planes were left away."""

    codes: Tensor  # uint8 (n, rows, row_bytes of 2 bits): the two highest bits, laid out as in the format int
    planes: dict[str, Tensor] = field(repr=False)  # plane_3, plane_4: uint8 (n, rows, 2 * ceil(cols / 16)), one bit a code
    row_scales: Tensor  # bfloat16 (n, rows), of codes of ``stored`` bits
    scales: Tensor | None  # uint8 (n, rows, G); None if group = 0
    stored: int  # bits of the file
    group: int
    cols: int

    @property
    def bits(self) -> int:
        return BASE + len(self.planes)

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by their names in the file."""
        scales = {} if self.scales is None else {"scales": self.scales}
        return {"codes": self.codes, **self.planes, "row_scales": self.row_scales, **scales}


def widths(bits: int) -> tuple[int, ...]:
    """The numbers of bits that a bank of ``bits`` can be loaded at."""
    return tuple(range(BASE, bits + 1))


def plane_names(bits: int) -> list[str]:
    """Names of the tensors that hold the third bit, the fourth, … of a code of ``bits``."""
    return [f"plane_{bit}" for bit in range(BASE + 1, bits + 1)]


def plane_bytes(cols: int) -> int:
    """Bytes of one row of one bit."""
    return 2 * (-(-cols // PAD))


def stored(scheme: Scheme, rows: int, cols: int) -> Tensors:
    """Tensors of one matrix in the file, as `int_format.stored`: as many bytes as ordinary integers without zeros have."""
    _check_bits(int(scheme.bits))
    planes: Tensors = {name: (torch.uint8, (rows, plane_bytes(cols))) for name in plane_names(int(scheme.bits))}
    return planes | int_format.stored(replace(scheme, bits=BASE), rows, cols)


def pack(codes: Tensor, row_scales: Tensor, scales: Tensor | None, bits: int, group: int) -> NestedBank:
    """Store codes uint8 (n, rows, cols) of ``bits`` bits, row scales bfloat16 (n, rows), scales uint8 (n, rows, G) or None."""
    _check_bits(bits)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes must be below {2**bits} to be stored in {bits} bits, found {int(codes.max())}")
    scales = None if scales is None else scales.contiguous()
    base, planes = split(codes, bits)
    bank = NestedBank(base, planes, row_scales.contiguous(), scales, bits, group, codes.shape[-1])
    check(bank)
    return bank


def split(codes: Tensor, bits: int) -> tuple[Tensor, dict[str, Tensor]]:
    """uint8 (..., cols), each below 2**bits -> the two highest bits packed, and the planes of the others."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % PAD))
    planes = {name: pack_plane((padded >> (bits - BASE - 1 - i)) & 1, 1) for i, name in enumerate(plane_names(bits))}
    return int_format.pack_codes(codes >> (bits - BASE), BASE), planes


def as_integers(bank: NestedBank) -> IntBank:
    """The ordinary bank of integers of as many bits as the nested one has planes for.

    A code that loses its last bit stands for the middle of the two it came from, so all that changes is the step:
    value = scale · 2^(stored − bits) · (code − (2^bits − 1) / 2).
    """
    check(bank)
    codes = int_format.unpack_codes(bank.codes, BASE, bank.cols)
    for plane in bank.planes.values():
        codes = (codes << 1) | unpack_plane(plane, 1)[..., : bank.cols]
    packed = bank.codes if bank.bits == BASE else int_format.pack_codes(codes, bank.bits)
    row_scales = bank.row_scales * 2 ** (bank.stored - bank.bits)  # exact: a power of two
    return IntBank(packed, row_scales, bank.scales, None, bank.bits, bank.group, bank.cols)


def from_integers(bank: IntBank) -> NestedBank:
    """The nested bank that `as_integers` made this one of, all its bits loaded."""
    codes, planes = split(int_format.unpack_codes(bank.codes, bank.bits, bank.cols), bank.bits)
    return NestedBank(codes, planes, bank.row_scales, bank.scales, bank.bits, bank.group, bank.cols)


def check(bank: NestedBank) -> None:
    """Raise UserError, naming the tensor, unless every tensor has the shape and dtype that the format demands."""
    _check_bits(bank.stored)
    if list(bank.planes) != plane_names(bank.stored)[: len(bank.planes)]:
        raise wrong("plane", f"the first of {plane_names(bank.stored)}", str(list(bank.planes)))
    int_format.check(IntBank(bank.codes, bank.row_scales, bank.scales, None, BASE, bank.group, bank.cols))
    for name, plane in bank.planes.items():
        demand(name, plane, torch.uint8, (*bank.codes.shape[:2], plane_bytes(bank.cols)))


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise UserError(f"the format nested has no bits = {bits}", expected=f"one of {BITS}", got=bits)
