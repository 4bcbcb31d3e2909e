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
    upper = torch.empty_like(hessian)
    identity, fallen = torch.eye(hessian.shape[-1]), []
    for index, name in enumerate(names):
        # H = V Vᵀ with V upper (the Cholesky factor seen from the last column), so H⁻¹ = UᵀU with U = V⁻¹.
        lower = damped_cholesky(hessian[index].flip(0, 1), damping)
        if lower is None:
            refuse(name, damping, allow_fallback)
            fallen.append(name)
            upper[index] = identity
        else:
            upper[index] = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return upper, fallen


def lower_factors(hessian: torch.Tensor, damping: float, names: list[str], allow_fallback: bool = False
                  ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Lower Cholesky factors [n, i, i] of H + λI as in `factor`, and [n] True for those that have none: they get the diagonal's."""
    lower, fallen = torch.empty_like(hessian), torch.zeros(len(names), dtype=torch.bool)
    for index, name in enumerate(names):
        found = damped_cholesky(hessian[index], damping)
        if found is None:
            refuse(name, damping, allow_fallback)
            fallen[index] = True
            found = torch.diag(hessian[index].diagonal().clamp_min(1e-30).sqrt())
        lower[index] = found
    return lower, fallen


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H + λI for H [E, i, i], λ = damping · mean diag H of each."""
    extra = (damping * hessian.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp_min(1e-30)
    return hessian + torch.diag_embed(extra[:, None].expand(-1, hessian.shape[-1]))


def damped_cholesky(hessian: torch.Tensor, damping: float) -> torch.Tensor | None:
    """Lower factor of H + λI for H [i, i], λ = damping · mean diag H, raised tenfold up to four times; None if that fails."""
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny * len(hessian))
    for attempt in range(DAMPING_TRIES):
        lower, failed = torch.linalg.cholesky_ex(hessian + torch.eye(len(hessian), dtype=hessian.dtype) * (mean * damping * 10**attempt))
        if not failed and torch.isfinite(lower).all() and lower.diagonal().min() > 0:
            return lower
    return None


def refuse(name: str, damping: float, allow_fallback: bool) -> None:
    """UserError that names the expert whose Hessian has no factor, unless a fallback is allowed."""
    if not allow_fallback:
        raise UserError(f"The Hessian of {name} cannot be factorised", expected="a positive definite matrix",
                        got=f"failure at damping {damping * 10**(DAMPING_TRIES - 1):g}",
                        remedy="use more calibration text, raise quantize.damping, or pass --allow-fallback to "
                               "round this expert to nearest")  # fmt: skip
