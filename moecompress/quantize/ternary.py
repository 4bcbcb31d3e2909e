"""Rows of two or three values: absmean, Lloyd and QMoE's ternary grids, and signs; GPTQ on them and refitted levels.

A trit 0, 1 or 2 means the row's low level, zero, or its high level. Which trit a weight becomes is decided by two
thresholds a row, which stay when the levels are refitted. Shapes: E experts, o rows, i columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from moecompress.quantize.gptq import feedback, row_errors

if TYPE_CHECKING:
    from moecompress.quantize.encode import Inputs

KINDS = ("absmean", "lloyd", "qmoe", "sign")
LLOYD_STEPS = 30
SMALLEST = 1e-30


@dataclass(frozen=True)
class Levels:
    """Per row the values of trits 0 and 2, rounded to bfloat16, and the thresholds below and above which they are used."""

    values: torch.Tensor  # float32 (E, o, 2): low, high
    thresholds: torch.Tensor  # float32 (E, o, 2)


@dataclass(frozen=True)
class Ternary:
    """error: [E], tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ). Signs are trits 0 and 2 alone, of levels ∓scale."""

    trits: torch.Tensor  # uint8 (E, o, i)
    levels: torch.Tensor  # bfloat16 (E, o, 2)
    error: torch.Tensor

    @property
    def zero_rate(self) -> float:
        return float((self.trits == 1).double().mean())


def fit(weights: torch.Tensor, kind: str) -> Levels:
    """Levels of weights [E, o, i].

    absmean: ±mean|W| of the matrix, round to nearest (BitNet b1.58, arXiv:2402.17764; MoTE, arXiv:2506.14435). A matrix of
    one magnitude and zeros is ternary already and keeps that magnitude, so trained ternary experts stay as they are.
    lloyd: each row's own three values {low, 0, high} of least squared error.
    qmoe: the row's minimum, zero, its maximum (arXiv:2310.16795): most weights become zeros, the code gets short.
    sign: ±mean|w| of the row (MC-MoE, arXiv:2410.06270, with a scale a row).
    """
    if kind == "sign":
        scale = weights.abs().mean(-1)
        return Levels(_stored(torch.stack([-scale, scale], -1)), scale.new_zeros(*scale.shape, 2))
    if kind == "absmean":
        scale = _absmean(weights).expand(-1, weights.shape[1], -1)
        return _nearest(torch.cat([-scale, scale], -1))
    extremes = torch.stack([weights.amin(-1).clamp_max(0), weights.amax(-1).clamp_min(0)], -1)
    if kind == "qmoe":
        return _nearest(extremes)
    if kind == "lloyd":
        return _lloyd(weights, extremes)
    raise ValueError(f"no ternary grid is called {kind!r}; there are {', '.join(KINDS)}")


def _absmean(weights: torch.Tensor) -> torch.Tensor:
    """The scale of every matrix, [E, 1, 1]."""
    size = weights.abs()
    largest = size.amax((1, 2), keepdim=True)
    ternary = ((size == 0) | (size == largest)).all(2, keepdim=True).all(1, keepdim=True)
    return torch.where(ternary, largest, size.mean((1, 2), keepdim=True))


def _nearest(values: torch.Tensor) -> Levels:
    values = _stored(values)
    # A row of zeros is zeros: its upper threshold must not be zero itself.
    return Levels(values, (values / 2).clamp(values.new_tensor([-torch.inf, SMALLEST]), None))


def _lloyd(weights: torch.Tensor, extremes: torch.Tensor) -> Levels:
    scale = weights.square().mean(-1).sqrt().unsqueeze(-1) * weights.new_tensor([-1.224, 1.224])  # right for a Gaussian
    values = scale.maximum(extremes[..., :1]).minimum(extremes[..., 1:])
    for _ in range(LLOYD_STEPS):
        low, high = weights < values[..., :1] / 2, weights > values[..., 1:] / 2
        members = torch.stack([low.sum(-1), high.sum(-1)], -1)
        sums = torch.stack([(weights * low).sum(-1), (weights * high).sum(-1)], -1)
        values = torch.where(members > 0, sums / members.clamp_min(1), values)
    return _nearest(values)


def _stored(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).float()


def wider(levels: Levels, factor: torch.Tensor) -> Levels:
    """The thresholds of each matrix times its factor [E]: from 1 on, more weights become zeros."""
    return replace(levels, thresholds=levels.thresholds * factor[:, None, None])


def rtn(weights: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Trits uint8 [E, o, i] by the thresholds alone."""
    low, high = levels.thresholds.split(1, -1)
    return (weights >= low).to(torch.uint8) + (weights >= high).to(torch.uint8)


def gptq(weights: torch.Tensor, upper: torch.Tensor, order: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Trits uint8 [E, o, i] with error feedback; order and upper as in `gptq.gptq`."""
    (lower, higher), (low, high) = levels.thresholds.unbind(-1), levels.values.unbind(-1)

    def choose(column: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        below, above = column < lower, column >= higher
        return 1 - below.to(torch.int8) + above, low * below + high * above

    return feedback(weights, upper, order, choose)


def values(trits: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Dequantized weights float32 [E, o, i]."""
    low, high = levels.values.split(1, -1)
    return low * (trits == 0) + high * (trits == 2)


def refit(weights: torch.Tensor, hessian: torch.Tensor, trits: torch.Tensor, levels: Levels, symmetric: bool = False
          ) -> Levels:  # fmt: skip
    """Both levels of every row by least squares under H [E, i, i], given the trits; rows that do not gain keep theirs.

    symmetric: low = −high. The thresholds stay.
    """
    low, high = (trits == 0).float(), (trits == 2).float()
    basis = [high - low] if symmetric else [low, high]
    reached = [part @ hessian for part in basis]
    left = torch.stack([torch.stack([(r * part).sum(-1) for part in basis], -1) for r in reached], -2)  # (E, o, 1|2, 1|2)
    right = torch.stack([(r * weights).sum(-1) for r in reached], -1)
    diagonal = left.diagonal(dim1=-2, dim2=-1)
    left = left + torch.diag_embed(1e-6 * diagonal + SMALLEST + (diagonal == 0))  # a level that no weight uses: 0
    solved, failed = torch.linalg.solve_ex(left, right.unsqueeze(-1))
    found = solved.squeeze(-1)
    if symmetric:
        found = torch.cat([-found, found], -1)
    trial = replace(levels, values=_stored(torch.where((failed == 0).unsqueeze(-1), found, levels.values)))
    gain = row_errors(weights, hessian, values(trits, trial)) < row_errors(weights, hessian, values(trits, levels))
    return replace(levels, values=torch.where(gain.unsqueeze(-1), trial.values, levels.values))


def encode(weights: torch.Tensor, inputs: Inputs | None, kind: str, refits: int = 2, widen: torch.Tensor | None = None
           ) -> Ternary:  # fmt: skip
    """weights: float32 [E, o, i]; inputs None: plain rounding, all inputs alike.

    refits: 0 leaves the grid as its authors have it; 1 refits the levels to the trits; each further one rounds again with
    the refitted levels and the first thresholds, and refits; a row takes it if its error falls.
    widen [E]: multiplies the thresholds, so that more weights become zeros.
    """
    experts, _, cols = weights.shape
    hessian = torch.eye(cols).expand(experts, -1, -1) if inputs is None else inputs.hessian
    levels = fit(weights, kind)
    if widen is not None:
        levels = wider(levels, widen)
    trits, levels, lost = _round(weights, inputs, hessian, levels, kind, refits > 0)
    for _ in range(refits - 1):
        again, refitted, now = _round(weights, inputs, hessian, levels, kind, True)
        better = (now < lost)[..., None]
        trits = torch.where(better, again, trits)
        levels = replace(levels, values=torch.where(better, refitted.values, levels.values))
        lost = torch.minimum(now, lost)
    whole = row_errors(weights, hessian, torch.zeros(())).sum(-1)
    error = lost.sum(-1) / whole.clamp_min(torch.finfo(torch.float32).tiny)
    return Ternary(trits, levels.values.to(torch.bfloat16), error)


def _round(weights: torch.Tensor, inputs: Inputs | None, hessian: torch.Tensor, levels: Levels, kind: str, refits: bool
           ) -> tuple[torch.Tensor, Levels, torch.Tensor]:  # fmt: skip
    """Trits, levels and the error of every row, [E, o]."""
    trits = rtn(weights, levels) if inputs is None else gptq(weights, inputs.upper, inputs.order, levels)
    if refits:
        levels = refit(weights, hessian, trits, levels, symmetric=kind == "sign")
    return trits, levels, row_errors(weights, hessian, values(trits, levels))
