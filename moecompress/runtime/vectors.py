"""Compressed experts (arXiv 2503.00634): of a token's k experts a few compute, and learned vectors stand for the others.

The others change what the few see: their vectors, averaged by combine weight, multiply the inputs of gate, up and down.
Trained by route/vectors.py, stored like the masks of otp (runtime/pruner.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moecompress.errors import UserError
from moecompress.model.experts import ExpertsLayout


class Vectors(nn.Module):
    """One layer's θ: for every projection a parameter of its name, [E, in] float32: gate and up [E, d], down [E, m]. 1 is
    "as if the expert did not exist"."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]]):
        """shapes: projection -> (E, in)."""
        super().__init__()
        for projection, shape in shapes.items():
            self.register_parameter(projection, nn.Parameter(torch.ones(shape)))

    @classmethod
    def of(cls, layout: ExpertsLayout) -> Vectors:
        return cls(shapes_of(layout))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Vectors:
        found = cls({name: (value.shape[0], value.shape[1]) for name, value in tensors.items()})
        found.load_state_dict({name: value.float() for name, value in tensors.items()})
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """As they are stored: two bytes a number."""
        return {name: value.detach().half().cpu() for name, value in self.state_dict().items()}

    @property
    def stored_bytes(self) -> int:
        return sum(2 * value.numel() for value in self.parameters())

    def check(self, layout: ExpertsLayout, name: str) -> None:
        """UserError unless these are finite vectors for experts of this layout. ``name``: of their module."""
        found = {key: tuple(value.shape) for key, value in self.named_parameters()}
        expected = shapes_of(layout)
        if found != expected:
            raise _damaged(name, ", ".join(f"{key} {shape}" for key, shape in expected.items()),
                           ", ".join(f"{key} {shape}" for key, shape in sorted(found.items())))  # fmt: skip
        if not all(value.is_meta or value.isfinite().all() for value in self.parameters()):
            raise _damaged(name, "finite numbers", "infinities or no numbers")

    def forward(self, chosen: torch.Tensor, weights: torch.Tensor, left: torch.Tensor) -> dict[str, torch.Tensor]:
        """θ̄ of every token: projection -> [T, in] float32.

        chosen, weights: [T, k] of the router; left: [T, k], −1 where a vector stands for the expert. θ̄ = Σ α θ over those,
        α their weights made to sum to 1; where there are none, or their weights are 0, it is 1.
        """
        experts = next(self.parameters()).shape[0]
        aside = (left < 0) & (chosen >= 0) & (chosen < experts)  # not the sentinels of routing
        share = weights.float().masked_fill(~aside, 0)
        total = share.sum(-1, keepdim=True)
        share = share / total.masked_fill(total <= 0, 1)
        rows = chosen.masked_fill(~aside, 0)
        return {name: F.embedding_bag(rows, theta, per_sample_weights=share, mode="sum") + (total <= 0).float()
                for name, theta in self.named_parameters()}  # fmt: skip


def shapes_of(layout: ExpertsLayout) -> dict[str, tuple[int, int]]:
    """Projection -> shape of its vectors, (E, in)."""
    return {projection: (layout.experts, layout.shape(projection)[1]) for projection in layout.projections}


def _damaged(name: str, expected: Any, got: Any) -> UserError:
    return UserError(f"The vectors of compressed experts do not fit {name}", expected=expected, got=got,
                     remedy="make the folder again with `moecompress tune-routing`")  # fmt: skip
