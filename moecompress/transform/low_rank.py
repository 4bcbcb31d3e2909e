"""How well few directions describe a matrix: what low-rank factors of experts would lose. An analysis;
quantize/low_rank.py makes such factors."""

from __future__ import annotations

import torch


def residuals(weights: torch.Tensor, covariance: torch.Tensor | None = None) -> torch.Tensor:
    """Relative squared error of the best approximation of every rank 0, 1, …: float64 [n, min(o, i) + 1], from 1 down to 0.

    weights: [n, o, i]. covariance: [i, i] or [n, i, i], second moments of the input; with it the error is that of the output,
    E‖(W − W_r) x‖² / E‖W x‖², else that of the entries (Eckart and Young 1936). A matrix of zeros has no error at any rank.
    """
    seen = weights.double()
    if covariance is not None:
        values, vectors = torch.linalg.eigh(covariance.double())
        seen = seen @ (vectors * values.clamp_min(0).sqrt()[..., None, :])
    energy = torch.linalg.svdvals(seen).square()
    left = energy.flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(left, (0, 1)) / left[:, :1].clamp_min(torch.finfo(torch.float64).tiny)


def low_rank_error(weights: torch.Tensor, rank: int, covariance: torch.Tensor | None = None) -> torch.Tensor:
    """float64 [n]: the relative squared error of the best approximation of rank ``rank``. Arguments as of `residuals`."""
    found = residuals(weights, covariance)
    return found[:, min(rank, found.shape[1] - 1)]


def shared_residuals(weights: torch.Tensor, covariance: torch.Tensor | None = None) -> torch.Tensor:
    """What experts [n, o, i] lose if all of them use one basis: W_e ≈ A_e B with B [q, i], float64 [min(n·o, i) + 1] by q.

    Relative squared error of all together. The best B has the leading right singular vectors of the experts one above the
    other (MoLAE, arXiv:2503.23100); covariance [i, i], of the layer's inputs, as in `residuals`.
    """
    return residuals(weights.flatten(0, 1)[None], covariance)[0]


def shared_rank(rank: int, experts: int, rows: int, cols: int) -> int:
    """The largest q at which A_e (rows × q) of all experts and B (q × cols) have no more values than own factors of ``rank``."""
    return rank * experts * (rows + cols) // (experts * rows + cols)


def needed_rank(residual: torch.Tensor, error: float) -> torch.Tensor:
    """int64 [n]: the smallest rank whose relative squared error is at most ``error``. residual: from `residuals`."""
    return (residual > error).sum(-1)


def stable_rank(weights: torch.Tensor) -> torch.Tensor:
    """‖W‖_F² / ‖W‖₂², float64 [n]: by this MC-SMoE (arXiv:2310.01334, sec. 3.2) says that merged experts have a lower rank."""
    energy = torch.linalg.svdvals(weights.double()).square()
    return energy.sum(-1) / energy[:, 0].clamp_min(torch.finfo(torch.float64).tiny)
