"""Grids: which values a group of weights may take, and the search for the best scale of each group.

A weight is stored as `scale · (code − zero)`. Scales are two-level (SPEC.md): a bfloat16 step a row times an 8-bit
multiplier a group, so a group of 64 costs 0.125 instead of 0.25 bits per weight. Scales are rounded to what can be stored
*before* codes are chosen; the rounding then costs next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moecompress.kernels import rounding

#: Fractions of the range tried for the scale: at 2 bits the best is near 0.6, at 8 bits near 1.
SHRINKS = torch.linspace(1.05, 0.35, 15)
#: Alternations of "nearest codes" and "least-squares scale" after the search.
LLOYD_STEPS = 2
SMALLEST = 1e-30  # keeps the step of an all-zero row finite and representable in bfloat16


@dataclass
class Grid:
    """Stored scales and zeros of matrices [E, o, i] with G groups a row."""

    bits: int
    group: int  # columns per group; 0 = the whole row
    row_scales: torch.Tensor  # bfloat16 [E, o]
    multipliers: torch.Tensor | None  # uint8 [E, o, G], None if group = 0
    zeros: torch.Tensor | None  # uint8 [E, o, G], None if symmetric
    cols: int

    @property
    def width(self) -> int:
        return self.group or self.cols

    def scales(self) -> torch.Tensor:
        """float32 [E, o, G]."""
        step = self.row_scales.float().unsqueeze(-1)
        return step if self.multipliers is None else step * self.multipliers.float()

    def offsets(self) -> torch.Tensor:
        """float32 zero points, broadcastable to [E, o, G]."""
        middle = (2**self.bits - 1) / 2
        return torch.full((1, 1, 1), middle, device=self.row_scales.device) if self.zeros is None else self.zeros.float()

    def all_zeros(self) -> torch.Tensor:
        """float32 zero points [E, o, G], written out."""
        return self.offsets().expand_as(self.scales()).contiguous()

    def by_column(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of every column, [E, o, i] (views where possible)."""
        scale = self.scales().repeat_interleave(self.width, -1)[..., : self.cols]
        zero = self.offsets().expand(*self.scales().shape[:2], -1)
        if zero.shape[-1] == 1:
            return scale, zero.expand(-1, -1, self.cols)
        return scale, zero.repeat_interleave(self.width, -1)[..., : self.cols]


def nearest(weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (as float) of the nearest grid points."""
    return torch.clamp(torch.round(weights / scale + zero), 0, 2**bits - 1)


def fit(weights: torch.Tensor, importance: torch.Tensor, bits: int, group: int, symmetric: bool) -> Grid:
    """Scales that minimise Σ_j importance_j (w_j − ŵ_j)² in every group, by search and alternation.

    weights: float32 [E, o, i]; importance: [E, i], usually the diagonal of the Hessian.
    """
    cols = weights.shape[-1]
    width = group or cols
    if rounding.available() and weights.device.type == "cpu":
        scale, zero = rounding.search(
            weights.contiguous(), importance.contiguous(), SHRINKS, width, bits, symmetric, LLOYD_STEPS
        )
    else:
        scale, zero = _search(weights, importance, width, bits, symmetric)
    row_scales, multipliers = store_scales(scale, group)
    return Grid(bits, group, row_scales, multipliers, None if symmetric else zero.to(torch.uint8), cols)


def _search(weights: torch.Tensor, importance: torch.Tensor, width: int, bits: int, symmetric: bool
            ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Scale and zero of every group, [E, o, G] each, in plain torch."""
    cols = weights.shape[-1]
    pad = -cols % width
    w = torch.nn.functional.pad(weights, (0, pad)).unflatten(-1, (-1, width))  # (E, o, G, g)
    h = torch.nn.functional.pad(importance, (0, pad)).unflatten(-1, (-1, width)).unsqueeze(1)  # (E, 1, G, g)
    h = h + 1e-6 * h.amax(-1, keepdim=True).clamp_min(SMALLEST)
    top = 2**bits - 1
    if symmetric:
        full, zero = w.abs().amax(-1) / (top / 2), w.new_full((1, 1, 1), top / 2)
    else:
        low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
        full = (high - low) / top
        zero = torch.round(-low / full.clamp_min(SMALLEST)).clamp_(0, top)
    full = full.clamp_min(SMALLEST)
    best = torch.full_like(full, torch.inf)
    scale = full.clone()
    for shrink in SHRINKS.tolist():
        trial = full * shrink
        error = _error(w, h, trial, zero, bits)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, trial, scale)
    for _ in range(LLOYD_STEPS):
        levels = nearest(w, scale.unsqueeze(-1), zero.unsqueeze(-1), bits) - zero.unsqueeze(-1)
        refit = (h * w * levels).sum(-1) / (h * levels * levels).sum(-1).clamp_min(SMALLEST)
        scale = torch.where(refit > 0, refit, scale)
    return scale, zero


def store_scales(scale: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """float [E, o, G] -> what is stored: bfloat16 row steps and uint8 multipliers (None if group = 0)."""
    if group == 0:
        return scale[..., 0].to(torch.bfloat16), None
    step = (scale.amax(-1) / 255).clamp_min(SMALLEST).to(torch.bfloat16)
    multipliers = torch.round(scale / step.float().unsqueeze(-1)).clamp_(1, 255)
    return step, multipliers.to(torch.uint8)


def _error(w: torch.Tensor, h: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    return (h * (scale * (nearest(w, scale, zero, bits) - zero) - w).square()).sum(-1)
