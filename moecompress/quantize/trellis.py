"""Trellis-coded rounding of expert matrices: rotate, block-LDLQ over columns of 16, least-squares scale.

(QTIP, arXiv:2406.11235: bitshift trellis and block-LDLQ; QuIP#, arXiv:2402.04396: incoherence.) Everything but the search
is plain torch, for all experts of a layer at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moecompress.kernels import trellis as search
from moecompress.pack.rotation import rotate, signs
from moecompress.pack.trellis import TILE, TrellisBank, from_tiles, to_tiles
from moecompress.quantize.hessian import damped_cholesky, refuse

#: Standard deviation given to the weights before the search, by rate: low rates code a smaller ball. Found on normal data.
SPREAD = {0.5: 1.4, 0.75: 1.25, 1: 1.1, 1.25: 1.08, 1.5: 1.02, 2: 0.98, 2.5: 0.94, 3: 0.92, 4: 0.85}


#: Mean squared error per weight of unit variance, measured on normal data with the scale refitted, by rate.
DISTORTION = {0.5: 0.529, 0.75: 0.383, 1: 0.274, 1.25: 0.202, 1.5: 0.143, 2: 0.0740, 2.5: 0.0387, 3: 0.0192, 4: 0.0051}


@dataclass(frozen=True)
class Turned:
    """What rounding with feedback needs to know of rotated inputs: hessian [n, i, i] rotated on both sides; feedback
    [n, i, i], `block_feedback` of it, None where all inputs are alike; pivots [n], the trace of its block-diagonal factor."""

    hessian: torch.Tensor
    feedback: torch.Tensor | None
    pivots: torch.Tensor

    def take(self, positions: list[int]) -> Turned:
        feedback = None if self.feedback is None else self.feedback[positions]
        return Turned(self.hessian[positions], feedback, self.pivots[positions])


@dataclass(frozen=True)
class Coded:
    """Matrices [n, o, i] as streams; values: what they decode to, float32 [n, o, i], rotated; error: [n],
    tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ)."""

    bank: TrellisBank
    values: torch.Tensor
    error: torch.Tensor


def study(hessian: torch.Tensor, names: list[str], damping: float, seed: int = 0, allow_fallback: bool = False
          ) -> tuple[Turned, torch.Tensor]:  # fmt: skip
    """Rotate Hessians [n, i, i] and factorise them; ``names`` for the error message. Also returns [n] which have no factor."""
    sign = signs(hessian.shape[-1], seed)
    turned = rotate(rotate(hessian, sign).transpose(1, 2), sign)
    lower, fallen = torch.empty_like(turned), torch.zeros(len(names), dtype=torch.bool)
    for index, name in enumerate(names):
        found = damped_cholesky(turned[index], damping)
        if found is None:
            refuse(name, damping, allow_fallback)
            fallen[index] = True
            found = torch.diag(turned[index].diagonal().clamp_min(1e-30).sqrt())
        lower[index] = found
    feedback, pivots = block_feedback(lower)
    return Turned(turned, feedback, pivots), fallen


def alike(count: int, cols: int) -> Turned:
    """All inputs alike: no feedback."""
    return Turned(torch.eye(cols).expand(count, -1, -1), None, torch.full((count,), float(cols)))


def encode(weights: torch.Tensor, inputs: Turned, rate: float, seed: int = 0) -> Coded:
    """weights float32 [n, o, i]; rate: a key of RATES, in bits a weight; ``seed`` of the sign vectors, as in `study`."""
    _, rows, cols = weights.shape
    turned = rotate(rotate(weights, signs(cols, seed)).transpose(1, 2), signs(rows, seed)).transpose(1, 2).contiguous()
    scale = turned.square().mean((1, 2)).sqrt().clamp_min(1e-30) / SPREAD[rate]
    stream, units = _search(turned / scale[:, None, None], inputs.feedback, rate)
    reached = units @ inputs.hessian
    scale = ((turned * reached).sum((1, 2)) / (units * reached).sum((1, 2)).clamp_min(1e-30)).float()
    decoded = units * scale[:, None, None]
    lost = (((turned - decoded) @ inputs.hessian) * (turned - decoded)).sum((1, 2))
    whole = ((turned @ inputs.hessian) * turned).sum((1, 2)).clamp_min(1e-30)
    return Coded(TrellisBank(stream, scale, rate, rows, cols), decoded, lost / whole)


def expected_error(weights: torch.Tensor, inputs: Turned, row_weight: torch.Tensor, rates: list[float]) -> torch.Tensor:
    """Expected output error [n, R] of weights [n, o, i] at each rate, without searching.

    With feedback tr(Δ H Δᵀ) becomes Σ_b tr(Δ_b D_b Δ_bᵀ) over blocks of columns, and rotated weights are as good as normal:
    distortion × mean square × trace of D × rows. row_weight [n, o]: rotation spreads errors over the rows, so their sum counts.
    """
    each = weights.square().mean((1, 2)).double() * inputs.pivots.double() * row_weight.sum(1).double()
    return each[:, None] * torch.tensor([DISTORTION[rate] for rate in rates], dtype=torch.float64)


def _search(units: torch.Tensor, feedback: torch.Tensor | None, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Streams uint8 [n, tiles, bytes] and decoded values [n, o, i], column block after column block from the last."""
    count, rows, cols = units.shape
    decoded, streams = torch.zeros_like(units), []
    for first in reversed(range(0, cols, TILE)):
        last = min(first + TILE, cols)
        wanted = units[..., first:last]
        if feedback is not None and last < cols:
            wanted = wanted + (units[..., last:] - decoded[..., last:]) @ feedback[:, last:, first:last]
        blocks = to_tiles(wanted)
        stream, found = search.encode(blocks.reshape(-1, TILE * TILE), rate)
        decoded[..., first:last] = from_tiles(found.view_as(blocks), rows, last - first)
        streams.append(stream.view(count, -1, stream.shape[-1]))
    # Tiles are stored row by row; the blocks came column by column, the last first.
    return torch.stack(streams[::-1], 2).flatten(1, 2), decoded


def block_feedback(lower: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H = L Lᵀ = (I + N) D (I + N)ᵀ with N strictly lower in blocks of 16 columns and D block-diagonal.

    lower: L [n, i, i]. Returns N [n, i, i] and the trace of D [n].
    """
    result, pivots = torch.zeros_like(lower), torch.zeros(len(lower))
    for first in range(0, lower.shape[-1], TILE):
        part = slice(first, min(first + TILE, lower.shape[-1]))
        block, below = lower[:, part, part], lower[:, part.stop :, part]
        result[:, part.stop :, part] = torch.linalg.solve_triangular(block, below, upper=False, left=False)
        pivots += block.square().sum((1, 2))
    return result, pivots
