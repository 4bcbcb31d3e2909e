"""W ≈ UV + S: the best product of two thin matrices for the inputs that calibration saw, and the columns it leaves most of.

(MC-SMoE, arXiv:2310.01334, section 3.2, without its training.) With H = L Lᵀ the second moment of the inputs, the error
tr((W − Ŵ) H (W − Ŵ)ᵀ) is ‖(W − Ŵ) L‖². Put the k kept columns first: what S corrects by least squares then vanishes, and the
rest is ‖(W₂ − U V) L₂₂‖², where index 2 means the other columns and L₂₂ L₂₂ᵀ is their second moment once the kept ones are
known. Its best product projects W₂ on the leading left singular vectors of W₂ L₂₂ (Eckart and Young 1936). So given the
columns nothing is approximate; the columns are those in which the plain product is most wrong, weighed by their inputs.
Shapes: o rows, i columns, one matrix at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moecompress.pack.low_rank import LowRankBank, pack, sizes
from moecompress.quantize.hessian import damped_cholesky


@dataclass(frozen=True)
class Parts:
    """basis [o, r], orthonormal; kept [k] and rest [i − k]: columns, rising; repair [i − k, k]: what a kept column takes over
    of the errors of the rest; row_error [o]: squared error of every row under the damped H."""

    basis: torch.Tensor
    kept: torch.Tensor
    rest: torch.Tensor
    repair: torch.Tensor
    row_error: torch.Tensor


def encode(weights: torch.Tensor, hessian: torch.Tensor, shares: tuple[int, int], damping: float) -> LowRankBank:
    """weights float32 [n, o, i], hessian [n, i, i]; ``shares`` in thousandths, see `sizes`."""
    rank, count = sizes(weights.shape[1], weights.shape[2], shares)
    found = []
    for one, moment in zip(weights, hessian, strict=True):
        found.append(_stored(one, split(one, moment, damping, rank, count, start(one, moment, damping, rank))))
    left, right, kept = (torch.stack(tensors) for tensors in zip(*found, strict=True))
    return pack(left, right, kept)


def expected_error(weights: torch.Tensor, hessian: torch.Tensor, row_weight: torch.Tensor, shares: list[tuple[int, int]],
                   damping: float) -> torch.Tensor:  # fmt: skip
    """The output error [n, C] for each of ``shares``, exact but for the rounding to bfloat16. row_weight [n, o]."""
    asked = [sizes(weights.shape[1], weights.shape[2], one) for one in shares]
    result = torch.zeros(len(weights), len(shares), dtype=torch.float64)
    for index, (one, moment, row) in enumerate(zip(weights, hessian, row_weight, strict=True)):
        begin = start(one, moment, damping, max(rank for rank, _ in asked))
        for column, (rank, count) in enumerate(asked):
            error = split(one, moment, damping, rank, count, begin[:, :rank]).row_error
            result[index, column] = (error.double() * row.double()).sum()
    return result


def start(weights: torch.Tensor, hessian: torch.Tensor, damping: float, rank: int) -> torch.Tensor:
    """Leading directions [o, rank] of the outputs, the first first, without kept columns."""
    return leading(weights @ _factor(hessian, damping), rank)


def split(weights: torch.Tensor, hessian: torch.Tensor, damping: float, rank: int, count: int, basis: torch.Tensor) -> Parts:
    """``basis`` [o, rank]: from `start`, where the search for ``count`` columns begins."""
    everything = torch.arange(weights.shape[1])
    kept = worth_keeping(weights, hessian, basis, count)
    rest = everything[~torch.isin(everything, kept)]
    order = torch.cat([kept, rest])
    lower = _factor(hessian[order][:, order], damping)
    seen = weights[:, rest] @ lower[count:, count:]
    if count:
        basis = leading(seen, rank)
    repair = torch.linalg.solve_triangular(lower[:count, :count], lower[count:, :count], upper=False, left=False)
    return Parts(basis, kept, rest, repair, (seen - basis @ (basis.T @ seen)).square().sum(1))


def worth_keeping(weights: torch.Tensor, hessian: torch.Tensor, basis: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` columns j, rising, with the largest ‖R_j‖² H_jj, where R is what projecting on ``basis`` leaves.

    On the down matrices of a small trained model 14 % less error than by what correcting column j alone would save, ‖(R H)_j‖² / H_jj.
    """
    residual = weights - basis @ (basis.T @ weights)
    wrong = residual.square().sum(0) * hessian.diagonal()
    return wrong.argsort(descending=True, stable=True)[:count].sort().values


def leading(seen: torch.Tensor, rank: int) -> torch.Tensor:
    """The first ``rank`` left singular vectors of [o, j], as columns. By the smaller Gram matrix: five times as fast."""
    if seen.shape[0] <= seen.shape[1]:
        return torch.linalg.eigh(seen @ seen.T).eigenvectors[:, -rank:].flip(1)
    right = torch.linalg.eigh(seen.T @ seen).eigenvectors[:, -rank:].flip(1)
    return torch.linalg.qr(seen @ right).Q  # orthonormal also where there is nothing left to describe


def _stored(weights: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """left [o, r + k], right [r, i] and the kept columns, whose correction knows how the factors were rounded."""
    others = weights[:, parts.rest]
    u, v = parts.basis.bfloat16(), (parts.basis.T @ others).bfloat16()
    corrected = weights[:, parts.kept] + (others - u.float() @ v.float()) @ parts.repair
    right = v.new_zeros(v.shape[0], weights.shape[1])
    right[:, parts.rest] = v
    return torch.cat([u, corrected.bfloat16()], 1), right, parts.kept


def _factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Lower L of the damped H. `study` has found or made it positive definite; where another order of its columns is one too
    many for float32, the diagonal stands for it."""
    lower = damped_cholesky(hessian, damping)
    return torch.diag(hessian.diagonal().clamp_min(1e-30).sqrt()) if lower is None else lower
