"""What the formats share: planes of small codes in bytes, and what is said of a tensor that does not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompress.errors import UserError

#: Name of a tensor in the file -> its dtype and shape.
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def pack_plane(values: Tensor, width: int) -> Tensor:
    """uint8 (..., c), each below 2**width -> uint8 (..., c * width / 8), lowest bits first; c is a multiple of 8 / width."""
    per_byte = 8 // width
    fields = values.unflatten(-1, (-1, per_byte)) << shifts(per_byte, width, values.device)
    return fields.sum(-1, dtype=torch.uint8)  # no carries: the fields do not overlap


def unpack_plane(plane: Tensor, width: int) -> Tensor:
    """uint8 (..., bytes) -> uint8 (..., bytes * 8 / width)."""
    fields = plane.unsqueeze(-1) >> shifts(8 // width, width, plane.device)
    return (fields & (2**width - 1)).flatten(-2)


def shifts(count: int, width: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * width, width, dtype=torch.uint8, device=device)


def demand(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """UserError unless the tensor has that dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise wrong(name, f"{dtype} {shape}", f"{tensor.dtype} {tuple(tensor.shape)}")


def wrong(name: str, expected: str, got: str) -> UserError:
    return UserError(
        f"packed tensor '{name}' does not fit the format",
        expected=expected,
        got=got,
        remedy="the file is damaged or its manifest belongs to another one; copy or compress it again",
    )
