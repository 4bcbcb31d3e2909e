"""Trellis-coded rounding of expert matrices: rotate, block-LDLQ over columns of tiles, least-squares scale.

(QTIP, arXiv:2406.11235: bitshift trellis and block-LDLQ; QuIP#, arXiv:2402.04396: incoherence.) Everything but the search
is plain torch, for all experts of a layer at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moecompress.kernels import trellis as search
from moecompress.kernels.trellis_matmul import rotate
from moecompress.pack.rotation import signs
from moecompress.pack.trellis import TILE, TrellisBank, from_tiles, tile_shape, to_tiles
from moecompress.quantize.hessian import lower_factors

#: Standard deviation given to the weights before the search, by rate: low rates code a smaller ball. Found on normal data.
SPREAD = {0.5: 1.4, 0.75: 1.25, 1: 1.1, 1.25: 1.08, 1.5: 1.02, 2: 0.98, 2.5: 0.94, 3: 0.92, 4: 0.85}

#: Mean squared error per weight of unit variance, measured on normal data with the scale refitted, by rate.
DISTORTION = {0.5: 0.529, 0.75: 0.383, 1: 0.274, 1.25: 0.202, 1.5: 0.143, 2: 0.0740, 2.5: 0.0387, 3: 0.0192, 4: 0.0051}

#: Columns between two full updates; a multiple of every tile's columns.
CHUNK = 128
#: How much of the energy that feedback adds to the weights adds to their error; measured on real matrices at 0.5 to 3 bits.
FED = 0.5


@dataclass(frozen=True)
class Turned:
    """What rounding with feedback needs to know of rotated inputs: hessian [n, i, i] rotated on both sides, and lower
    [n, i, i], its Cholesky factor after damping; None where all inputs are alike."""

    hessian: torch.Tensor
    lower: torch.Tensor | None

    def take(self, positions: list[int]) -> Turned:
        return Turned(self.hessian[positions], None if self.lower is None else self.lower[positions])


@dataclass(frozen=True)
class Coded:
    """Matrices [n, o, i] as streams; values: what they decode to, float32 [n, o, i], rotated; error: [n],
    tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ)."""

    bank: TrellisBank
    values: torch.Tensor
    error: torch.Tensor


def study(hessian: torch.Tensor, names: list[str], damping: float, seed: int = 0, allow_fallback: bool = False, feedback: bool = True
          ) -> tuple[Turned, torch.Tensor]:  # fmt: skip
    """Rotate Hessians [n, i, i] and, for ``feedback``, factorise them; ``names`` for the error message. Also returns [n] which
    have no factor although they should."""
    sign = signs(hessian.shape[-1], seed)
    turned = rotate(rotate(hessian, sign).transpose(1, 2), sign)
    if not feedback:
        return Turned(turned, None), torch.zeros(len(names), dtype=torch.bool)
    lower, fallen = lower_factors(turned, damping, names, allow_fallback)
    return Turned(turned, lower), fallen


def alike(count: int, cols: int) -> Turned:
    """All inputs alike: no feedback."""
    return Turned(torch.eye(cols).expand(count, -1, -1), None)


def encode(weights: torch.Tensor, inputs: Turned, rate: float, seed: int = 0) -> Coded:
    """weights float32 [n, o, i]; rate: a key of RATES, in bits a weight; ``seed`` of the sign vectors, as in `study`."""
    _, rows, cols = weights.shape
    turned = rotate(rotate(weights, signs(cols, seed)).transpose(1, 2), signs(rows, seed)).transpose(1, 2).contiguous()
    scale = turned.square().mean((1, 2)).sqrt().clamp_min(1e-30) / SPREAD[rate]
    feedback = None if inputs.lower is None else block_feedback(inputs.lower, tile_shape(rate)[1])
    stream, units = _search(turned / scale[:, None, None], feedback, rate)
    reached = units @ inputs.hessian
    scale = ((turned * reached).sum((1, 2)) / (units * reached).sum((1, 2)).clamp_min(1e-30)).float()
    decoded = units * scale[:, None, None]
    lost = (((turned - decoded) @ inputs.hessian) * (turned - decoded)).sum((1, 2))
    whole = ((turned @ inputs.hessian) * turned).sum((1, 2)).clamp_min(1e-30)
    return Coded(TrellisBank(stream, scale, rate, rows, cols), decoded, lost / whole)


def expected_error(weights: torch.Tensor, inputs: Turned, row_weight: torch.Tensor, rates: list[float]) -> torch.Tensor:
    """Expected output error [n, R] of weights [n, o, i] at each rate, without searching.

    With feedback tr(Δ H Δᵀ) becomes Σ_b tr(Δ_b D_b Δ_bᵀ) over blocks of columns, and rotated weights are as good as normal:
    distortion × mean square × trace of D × rows, and more where feedback makes what is searched for larger than the weights.
    row_weight [n, o]: rotation spreads errors over the rows, so their sum counts.
    """
    each = weights.square().mean((1, 2)).double() * row_weight.sum(1).double()
    widths = {tile_shape(rate)[1] for rate in rates}
    columns = {wide: _columns(inputs, wide) for wide in widths}
    return torch.stack([each * _column_error(columns[tile_shape(rate)[1]], rate) for rate in rates], 1)


def _search(units: torch.Tensor, feedback: torch.Tensor | None, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Streams uint8 [n, tiles, bytes] and decoded values [n, o, i], column of tiles after column of tiles from the last."""
    (count, rows, cols), wide = units.shape, tile_shape(rate)[1]
    decoded, off, streams = torch.zeros_like(units), torch.zeros_like(units), []
    for begin in reversed(range(0, cols, CHUNK)):
        end = min(begin + CHUNK, cols)
        pulled = units[..., begin:end].clone()
        if feedback is not None and end < cols:  # the far columns at once, the near ones tile by tile
            pulled += off[..., end:] @ feedback[:, end:, begin:end]
        for first in reversed(range(begin, end, wide)):
            last = min(first + wide, end)
            wanted = pulled[..., first - begin : last - begin]
            if feedback is not None and last < end:
                wanted = wanted + off[..., last:end] @ feedback[:, last:end, first:last]
            blocks = to_tiles(wanted, rate)
            stream, found = search.encode(blocks.reshape(-1, TILE), rate)
            decoded[..., first:last] = from_tiles(found.view_as(blocks), rows, last - first, rate)
            off[..., first:last] = units[..., first:last] - decoded[..., first:last]
            streams.append(stream.view(count, -1, stream.shape[-1]))
    # Tiles are stored row by row; the blocks came column by column, the last first.
    return torch.stack(streams[::-1], 2).flatten(1, 2), decoded


def block_feedback(lower: torch.Tensor, wide: int) -> torch.Tensor:
    """N [n, i, i] of H = L Lᵀ = (I + N) D (I + N)ᵀ, strictly lower in blocks of ``wide`` columns, D block-diagonal; of L."""
    result = torch.zeros_like(lower)
    for first in range(0, lower.shape[-1], wide):
        part = slice(first, min(first + wide, lower.shape[-1]))
        below = lower[:, part.stop :, part]
        result[:, part.stop :, part] = torch.linalg.solve_triangular(lower[:, part, part], below, upper=False, left=False)
    return result


def _columns(inputs: Turned, wide: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every column, float64 [n, i]: the diagonal of D in blocks of ``wide``, and the energy of the later columns' errors
    that it makes up for, where theirs is one each."""
    if inputs.lower is None:
        diagonal = inputs.hessian.diagonal(dim1=-2, dim2=-1).double()
        return diagonal, torch.zeros_like(diagonal)
    fed = block_feedback(inputs.lower, wide).square().sum(1).double()
    parts = [inputs.lower[:, first : first + wide, first : first + wide] for first in range(0, fed.shape[1], wide)]
    return torch.cat([part.square().sum(2, dtype=torch.float64) for part in parts], 1), fed


def _column_error(columns: tuple[torch.Tensor, torch.Tensor], rate: float) -> torch.Tensor:
    """Σ over columns of (diagonal of D) × (expected squared error of a code for weights of unit variance), float64 [n]."""
    pivots, fed = columns
    return DISTORTION[rate] * (pivots * (1 + FED * DISTORTION[rate] * fed)).sum(1)
