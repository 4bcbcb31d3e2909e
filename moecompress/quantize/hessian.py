"""Hessians of routed experts: gate-weighted second moments, shrunk toward the layer's pool where tokens are few."""

from __future__ import annotations

import torch

from moecompress.errors import UserError

#: Token weight by name: 1 (GPTQ), g (MoEQuant, AGQ), g² (the exact squared error of the mixed output).
TOKEN_WEIGHT = {"1": 0, "g": 1, "g2": 2}
#: How often damping may be raised tenfold before a Cholesky factorisation counts as failed.
DAMPING_TRIES = 4


def token_weights(gate: torch.Tensor, hessian: str) -> torch.Tensor:
    return gate.abs().pow(TOKEN_WEIGHT[hessian])


def moment(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Σ_t weight_t x_t x_tᵀ, float32 [d, d], for x [T, d]."""
    x = x.float()
    return x.T @ (x if weight is None else x * weight[:, None])


def shrink(own: torch.Tensor, mass: float, tokens: int, pool: torch.Tensor, prior: float) -> torch.Tensor:
    """ρ H/Σω + (1 − ρ) H_pool with ρ = n / (n + prior): an expert with few tokens borrows the layer's statistics.

    own: Σ ω x xᵀ [d, d]; mass: Σ ω; tokens: n; pool: mean x xᵀ over the layer's tokens; prior: in tokens.
    """
    if tokens == 0 or mass <= 0:
        return pool.clone()
    rho = tokens / (tokens + prior) if prior > 0 else 1.0
    return own * (rho / mass) + pool * (1 - rho)


def factor(hessian: torch.Tensor, damping: float, names: list[str], allow_fallback: bool = False
           ) -> tuple[torch.Tensor, list[str]]:  # fmt: skip
    """Upper Cholesky factor U of (H + λI)⁻¹ for H [E, i, i], with λ = damping · mean diag H; and who fell back.

    Where the factorisation fails, damping is raised tenfold up to four times. After that it is a UserError that names the
    expert, unless ``allow_fallback``: then that expert gets the identity (round to nearest) and is named in the result.
    """
    size = hessian.shape[-1]
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1).clamp_min(torch.finfo(torch.float32).tiny * size)
    upper = torch.empty_like(hessian)
    fallen = []
    for index, name in enumerate(names):
        found = _factor_one(hessian[index], float(mean[index]), damping)
        if found is None:
            if not allow_fallback:
                raise UserError(f"The Hessian of {name} cannot be factorised", expected="a positive definite matrix",
                                got=f"failure at damping {damping * 10**(DAMPING_TRIES - 1):g}",
                                remedy="use more calibration text, raise quantize.damping, or pass --allow-fallback to "
                                       "round this expert to nearest")  # fmt: skip
            fallen.append(name)
            found = torch.eye(size)
        upper[index] = found
    return upper, fallen


def _factor_one(hessian: torch.Tensor, mean: float, damping: float) -> torch.Tensor | None:
    """One factorisation and one triangular inverse: H = V Vᵀ with V upper (the Cholesky factor seen from the last column),
    so H⁻¹ = UᵀU with U = V⁻¹."""
    identity = torch.eye(len(hessian))
    for attempt in range(DAMPING_TRIES):
        damped = (hessian + identity * (mean * damping * 10**attempt)).flip(0, 1)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        if torch.isfinite(upper).all():
            return upper
    return None
