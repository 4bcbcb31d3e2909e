"""Format ``int``: banks of matrices stored as 2, 3, 4 or 8-bit codes with two-level scales (SPEC.md, section 1).

A pair of pure functions, `pack` and `dequantize`, and the sizes they imply. Nothing here chooses a code.
Shapes: n matrices of (rows, cols) in a bank, G groups in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moecompress.errors import UserError
from moecompress.pack.fields import Tensors, demand, pack_plane, shifts, unpack_plane, wrong

if TYPE_CHECKING:
    from moecompress.pack.scheme import Scheme

BITS = (2, 3, 4, 8)
GROUPS = (0, 32, 64, 128)

#: bits -> widths of the planes of a row, in storage order, low bits first
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
PAD = 16  # codes: every plane is padded to a multiple of this


@dataclass(frozen=True)
class IntBank:
    """n matrices of one shape and one (bits, group, symmetric)."""

    codes: Tensor  # uint8 (n, rows, row_bytes)
    row_scales: Tensor  # bfloat16 (n, rows)
    scales: Tensor | None  # uint8 (n, rows, G); None if group = 0
    zeros: Tensor | None  # uint8 (n, rows, ceil(G * bits / 8)); None if symmetric
    bits: int
    group: int
    cols: int

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    @property
    def count(self) -> int:
        return self.codes.shape[0]

    @property
    def rows(self) -> int:
        return self.codes.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by their names in the file."""
        named = {"codes": self.codes, "row_scales": self.row_scales, "scales": self.scales, "zeros": self.zeros}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def groups(cols: int, group: int) -> int:
    """G: the number of groups in a row."""
    return 1 if group == 0 else -(-cols // group)


def row_bytes(cols: int, bits: int) -> int:
    """Bytes of one row of codes."""
    return 2 * bits * (-(-cols // PAD))


def zero_bytes(cols: int, bits: int, group: int) -> int:
    """Bytes of one row of zeros."""
    return -(-groups(cols, group) * bits // 8)


def stored(scheme: Scheme, rows: int, cols: int) -> Tensors:
    """Tensors of one matrix in the file; those of a bank have a dimension for its matrices before."""
    bits = int(scheme.bits)
    _check_parameters(bits, scheme.group, cols)
    tensors: Tensors = {"codes": (torch.uint8, (rows, row_bytes(cols, bits))), "row_scales": (torch.bfloat16, (rows,))}
    if scheme.group:
        tensors["scales"] = (torch.uint8, (rows, groups(cols, scheme.group)))
    if not scheme.symmetric:
        tensors["zeros"] = (torch.uint8, (rows, zero_bytes(cols, bits, scheme.group)))
    return tensors


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 (..., cols), each below 2**bits -> uint8 (..., row_bytes)."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % PAD))
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(pack_plane((codes >> shift) & (2**width - 1), width))
        shift += width
    return torch.cat(planes, dim=-1)


def unpack_codes(packed: Tensor, bits: int, cols: int) -> Tensor:
    """uint8 (..., row_bytes) -> uint8 (..., cols)."""
    widths = PLANES[bits]
    blocks = packed.shape[-1] // (2 * bits)
    planes = packed.split([2 * width * blocks for width in widths], dim=-1)
    codes, shift = torch.zeros((), dtype=torch.uint8, device=packed.device), 0
    for plane, width in zip(planes, widths, strict=True):
        codes = codes | (unpack_plane(plane, width) << shift)
        shift += width
    return codes[..., :cols]


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """uint8 (..., G), each below 2**bits -> uint8 (..., ceil(G * bits / 8))."""
    stream = ((zeros.unsqueeze(-1) >> shifts(bits, 1, zeros.device)) & 1).flatten(-2)  # (..., G * bits), single bits
    return pack_plane(torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)), 1)


def unpack_zeros(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 (..., ceil(G * bits / 8)) -> uint8 (..., G), where G = ``count``."""
    stream = unpack_plane(packed, 1)[..., : count * bits].unflatten(-1, (count, bits))
    return (stream << shifts(bits, 1, packed.device)).sum(-1, dtype=torch.uint8)


def pack(
    codes: Tensor, row_scales: Tensor, scales: Tensor | None, zeros: Tensor | None, bits: int, group: int
) -> IntBank:
    """Store codes (n, rows, cols), row scales (n, rows), scales (n, rows, G) or None, zeros (n, rows, G) or None.

    All uint8 but ``row_scales``, which is bfloat16 (the caller rounds it, since codes depend on the rounded value).
    Raises ValueError if a code or a zero needs more than ``bits`` bits.
    """
    for name, values in (("codes", codes), ("zeros", zeros)):
        if values is not None and values.numel() and int(values.max()) >= 2**bits:
            raise ValueError(f"{name} must be below {2**bits} to be stored in {bits} bits, found {int(values.max())}")
    packed_zeros = None if zeros is None else pack_zeros(zeros, bits)
    scales = None if scales is None else scales.contiguous()
    packed = pack_codes(codes, bits)
    bank = IntBank(packed, row_scales.contiguous(), scales, packed_zeros, bits, group, codes.shape[-1])
    check(bank)
    return bank


def dequantize(bank: IntBank, dtype: torch.dtype = torch.float32, index: slice | Tensor | None = None) -> Tensor:
    """Matrices (n, rows, cols) of the bank, or of the matrices that ``index`` selects along n.

    Computed in float32 and rounded once: scale = row_scale * scale; weight = scale * (code - zero).
    """
    bank = bank if index is None else _select(bank, index)
    count = groups(bank.cols, bank.group)
    scale = bank.row_scales.float().unsqueeze(-1)  # (n, rows, 1)
    if bank.scales is not None:
        scale = scale * bank.scales.float()  # (n, rows, G)
    zero: Tensor | float = (2**bank.bits - 1) / 2
    if bank.zeros is not None:
        zero = _spread(unpack_zeros(bank.zeros, bank.bits, count).float(), bank)
    codes = unpack_codes(bank.codes, bank.bits, bank.cols).float()
    return ((codes - zero) * _spread(scale, bank)).to(dtype)


def check(bank: IntBank) -> None:
    """Raise UserError, naming the tensor, unless every tensor has the shape and dtype that the format demands."""
    _check_parameters(bank.bits, bank.group, bank.cols)
    if bank.codes.dim() != 3:
        raise wrong("codes", "3 dimensions (n, rows, bytes)", f"shape {tuple(bank.codes.shape)}")
    if (bank.scales is None) != (bank.group == 0):
        wanted, found = ("absent", "present") if bank.group == 0 else ("present", "absent")
        raise wrong("scales", f"{wanted}, as group = {bank.group}", found)
    lead = tuple(bank.codes.shape[:2])  # (n, rows)
    demanded = {
        "codes": (torch.uint8, (*lead, row_bytes(bank.cols, bank.bits))),
        "row_scales": (torch.bfloat16, lead),
        "scales": (torch.uint8, (*lead, groups(bank.cols, bank.group))),
        "zeros": (torch.uint8, (*lead, zero_bytes(bank.cols, bank.bits, bank.group))),
    }
    for name, tensor in bank.tensors().items():
        dtype, shape = demanded[name]
        demand(name, tensor, dtype, shape)
        if tensor.device != bank.codes.device:
            raise wrong(name, f"on {bank.codes.device}, with the codes", f"on {tensor.device}")


def from_tensors(tensors: Mapping[str, Tensor], bits: int, group: int, cols: int) -> IntBank:
    """A checked bank from the tensors of a file; symmetric if there are no ``zeros``."""
    unknown = sorted(set(tensors) - {"codes", "row_scales", "scales", "zeros"})
    missing = sorted({"codes", "row_scales"} - set(tensors))
    if unknown or missing:
        raise UserError(
            "this is not a bank of the format int",
            expected="codes, row_scales, and possibly scales and zeros",
            got=f"unknown {unknown}, missing {missing}",
            remedy="copy or compress the checkpoint again",
        )
    named = (tensors["codes"], tensors["row_scales"], tensors.get("scales"), tensors.get("zeros"))
    bank = IntBank(*named, bits=bits, group=group, cols=cols)
    check(bank)
    return bank


def _check_parameters(bits: int, group: int, cols: int) -> None:
    for name, value, allowed in (("bits", bits, BITS), ("group", group, GROUPS)):
        if value not in allowed:
            raise UserError(f"the format int has no {name} = {value}", expected=f"one of {allowed}", got=value)
    if cols < 1:
        raise UserError("a packed matrix needs columns", expected="cols >= 1", got=cols)


def _select(bank: IntBank, index: slice | Tensor) -> IntBank:
    scales = None if bank.scales is None else bank.scales[index]
    zeros = None if bank.zeros is None else bank.zeros[index]
    return replace(bank, codes=bank.codes[index], row_scales=bank.row_scales[index], scales=scales, zeros=zeros)


def _spread(per_group: Tensor, bank: IntBank) -> Tensor:
    """(n, rows, G) -> (n, rows, cols), or (n, rows, 1), which broadcasts, when the row is one group."""
    if bank.group == 0:
        return per_group
    return per_group.repeat_interleave(bank.group, dim=-1)[..., : bank.cols]
