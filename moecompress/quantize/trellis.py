"""Trellis-coded rounding of expert matrices: rotate, block-LDLQ over columns of 16, least-squares scale.

(QTIP, arXiv:2406.11235: bitshift trellis and block-LDLQ; QuIP#, arXiv:2402.04396: incoherence.) Everything but the search
is plain torch, for all experts of a layer at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moecompress.kernels import trellis as search
from moecompress.kernels.trellis_matmul import rotate, unrotate
from moecompress.pack.rotation import signs
from moecompress.pack.trellis import TILE, TrellisBank, from_tiles, to_tiles

#: Standard deviation given to the weights before the search, by rate: low rates code a smaller ball. Found on normal data.
SPREAD = {0.5: 1.4, 0.75: 1.25, 1: 1.1, 1.25: 1.08, 1.5: 1.02, 2: 0.98, 2.5: 0.94, 3: 0.92, 4: 0.85}


@dataclass(frozen=True)
class Coded:
    """Matrices [n, o, i] as streams; weights: what they decode to, float32 [n, o, i], rotation undone; error: [n],
    tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ)."""

    bank: TrellisBank
    weights: torch.Tensor
    error: torch.Tensor


def encode(weights: torch.Tensor, hessian: torch.Tensor | None, rate: float, damping: float = 0.01, seed: int = 0) -> Coded:
    """weights float32 [n, o, i]; hessian [n, i, i] (None: all inputs alike); rate: a key of RATES, in bits a weight.

    ``seed``: of the sign vectors; rows take it, columns take seed + 1, so experts that share an input can share theirs.
    """
    count, rows, cols = weights.shape
    row_sign, col_sign = signs(rows, seed), signs(cols, seed + 1)
    turned = rotate(rotate(weights, col_sign).transpose(1, 2), row_sign).transpose(1, 2).contiguous()
    if hessian is None:
        feedback, known = None, torch.eye(cols).expand(count, -1, -1)
    else:
        known = rotate(rotate(hessian, col_sign).transpose(1, 2), col_sign)
        feedback = block_feedback(_damped(known, damping))
    scale = turned.square().mean((1, 2)).sqrt().clamp_min(1e-30) / SPREAD[rate]
    stream, units = _search(turned / scale[:, None, None], feedback, rate)
    reached = units @ known
    scale = ((turned * reached).sum((1, 2)) / (units * reached).sum((1, 2)).clamp_min(1e-30)).float()
    decoded = units * scale[:, None, None]
    lost = (((turned - decoded) @ known) * (turned - decoded)).sum((1, 2))
    whole = ((turned @ known) * turned).sum((1, 2)).clamp_min(1e-30)
    back = unrotate(unrotate(decoded.transpose(1, 2), row_sign).transpose(1, 2), col_sign)
    return Coded(TrellisBank(stream, scale, rate, rows, cols), back, lost / whole)


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


def block_feedback(hessian: torch.Tensor) -> torch.Tensor:
    """N of H = (I + N) D (I + N)ᵀ with N strictly lower in blocks of 16 columns and D block-diagonal: [n, i, i]."""
    lower = torch.linalg.cholesky(hessian)
    result = torch.zeros_like(lower)
    for first in range(0, hessian.shape[-1], TILE):
        part = slice(first, min(first + TILE, hessian.shape[-1]))
        below = lower[:, part.stop :, part]
        result[:, part.stop :, part] = torch.linalg.solve_triangular(lower[:, part, part], below, upper=False, left=False)
    return result


def _damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    return hessian + torch.diag_embed((damping * mean)[:, None].expand(-1, hessian.shape[-1]))
