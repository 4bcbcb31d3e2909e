"""W_e ≈ A_e B for all experts of a layer and projection: the B that serves all of them best, and the best A_e for it.

(MoLAE, arXiv:2503.23100, with activation covariance, here weighted by gates and by what an error does to the output.) With
one second moment C = L Lᵀ of the inputs of all experts, what is lost is Σ_e m_e ‖R_e^½ (W_e − A_e B) L‖². That is the
distance of all matrices, weighted and one above the other, from a product of rank q: B spans the q leading eigenvectors of
(Σ_e m_e W_eᵀ R_e W_e) v = λ C⁻¹ v (Eckart and Young 1936). A_e then is least squares for the expert's own moment H_e.
The rows of B are orthonormal, so that A_e is about as easy to round as W_e was, and in no order: turned at random, so that
no column of A_e is much larger than the others. Shapes: n matrices of o rows and i columns, rank q.
"""

from __future__ import annotations

from functools import cache

import torch

from moecompress.pack.int_format import IntBank, pack
from moecompress.pack.shared_basis import BASIS_BITS
from moecompress.quantize.gptq import rtn
from moecompress.quantize.grid import fit
from moecompress.quantize.hessian import damped_cholesky


def energy(weights: torch.Tensor, row_weight: torch.Tensor) -> torch.Tensor:
    """Σ_e W_eᵀ R_e W_e, float64 [i, i], of weights [n, o, i] and row_weight [n, o]."""
    stacked = (weights * row_weight.sqrt()[..., None].float()).flatten(0, 1)
    return (stacked.T @ stacked).double()


def directions(energy: torch.Tensor, moment: torch.Tensor, damping: float, rank: int) -> torch.Tensor:
    """float64 [rank, i]: the leading ones first; the first q of them span the best basis of rank q. energy and moment: [i, i]."""
    lower = damped_cholesky(moment.double(), damping)
    if lower is None:
        lower = torch.diag(moment.double().diagonal().clamp_min(1e-30).sqrt())
    vectors = torch.linalg.eigh(lower.T @ energy.double() @ lower).eigenvectors[:, -rank:].flip(1)
    return torch.linalg.solve_triangular(lower.T, vectors, upper=True).T


def basis(directions: torch.Tensor, rank: int) -> torch.Tensor:
    """float32 [rank, i], orthonormal rows that span the first ``rank`` directions."""
    return (_turn(rank) @ torch.linalg.qr(directions[:rank].T.double()).Q.T).float()


def stored(basis: torch.Tensor) -> IntBank:
    """The basis [q, i] as a bank of one matrix, rounded to nearest."""
    grid = fit(basis[None].contiguous(), torch.ones(1, basis.shape[1]), BASIS_BITS, 0, True)
    return pack(rtn(basis[None], grid), grid.row_scales, None, None, BASIS_BITS, 0)


def coefficients(weights: torch.Tensor, hessian: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A [n, o, q] with the least tr((W − A B) H (W − A B)ᵀ), and these errors by row [n, o]. hessian: [n, i, i], positive."""
    seen = weights @ hessian
    right = seen @ basis.T  # W H Bᵀ
    inner = basis @ hessian @ basis.T  # not always positive to float32's precision, so no Cholesky factor
    found = torch.linalg.solve(inner.double(), right.transpose(1, 2).double()).transpose(1, 2).float()
    left_over = (weights * seen).sum(-1, dtype=torch.float64) - (found * right).sum(-1, dtype=torch.float64)
    return found, left_over.clamp_min(0)


@cache
def _turn(size: int) -> torch.Tensor:
    """A random orthogonal matrix, always the same."""
    random = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return torch.linalg.qr(random).Q
