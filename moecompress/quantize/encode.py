"""One way to codes: fit a grid, round by GPTQ, then alternate scale refits and coordinate descent."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moecompress.pack.int_format import IntBank, pack
from moecompress.pack.scheme import Scheme
from moecompress.quantize import gptq
from moecompress.quantize.grid import Grid, fit
from moecompress.quantize.hessian import factor


@dataclass(frozen=True)
class Settings:
    """How to round. refine: rounds of scale refit and descent after GPTQ. order: activation (large inputs first) or natural."""

    method: str = "gptq"
    damping: float = 0.01
    order: str = "activation"
    refine: int = 2
    allow_fallback: bool = False


@dataclass(frozen=True)
class Encoded:
    """Matrices [n, o, i] as codes; error: [n], tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ)."""

    bank: IntBank
    error: torch.Tensor
    fallen: list[str]


def encode(weights: torch.Tensor, hessian: torch.Tensor | None, scheme: Scheme, names: list[str], settings: Settings) -> Encoded:
    """weights: float32 [n, o, i]; hessian: float32 [n, i, i] or None (plain rounding, all inputs alike)."""
    experts, _, cols = weights.shape
    fallen: list[str] = []
    if hessian is None or settings.method == "rtn":
        diagonal = torch.ones(experts, cols) if hessian is None else hessian.diagonal(dim1=-2, dim2=-1)
        grid = fit(weights, diagonal, scheme.bits, scheme.group, scheme.symmetric)
        codes = gptq.rtn(weights, grid)
        hessian = torch.diag_embed(diagonal) if hessian is None else hessian
    else:
        grid, codes, fallen = _feedback(weights, hessian, scheme, names, settings)
    lost = gptq.row_errors(weights, hessian, gptq.values(codes, grid)).sum(-1)
    whole = gptq.row_errors(weights, hessian, torch.zeros(())).sum(-1)
    bank = pack(codes, grid.row_scales, grid.multipliers, grid.zeros, scheme.bits, scheme.group)
    return Encoded(bank, lost / whole.clamp_min(torch.finfo(torch.float32).tiny), fallen)


def _feedback(weights: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, names: list[str], settings: Settings
              ) -> tuple[Grid, torch.Tensor, list[str]]:  # fmt: skip
    cols = weights.shape[-1]
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    order = processing_order(diagonal, settings.order)
    upper, fallen = factor(permuted(hessian, order), settings.damping, names, settings.allow_fallback)
    if fallen:  # without a usable Hessian only its diagonal is believed: rounding to nearest
        rounded = torch.tensor([name in fallen for name in names])
        hessian = torch.where(rounded[:, None, None], torch.diag_embed(diagonal), hessian)
    grid = fit(weights, diagonal, scheme.bits, scheme.group, scheme.symmetric)
    codes = gptq.gptq(weights, upper, order, grid)
    # The descent optimises the Hessian itself; damping keeps it from chasing directions that calibration never saw.
    damped = hessian + torch.diag_embed((settings.damping * diagonal.mean(-1)).clamp_min(1e-30)[:, None].expand(-1, cols))
    for _ in range(settings.refine):
        grid = gptq.refit(weights, damped, codes, grid)
        codes = gptq.descend(weights, damped, codes, grid)
    return grid, codes, fallen


def processing_order(diagonal: torch.Tensor, order: str) -> torch.Tensor:
    """[n, i] column order: channels with the most activation energy first, while there is room to make up for them."""
    if order == "natural":
        return torch.arange(diagonal.shape[-1]).expand(len(diagonal), -1)
    return torch.argsort(diagonal, dim=-1, descending=True, stable=True)


def permuted(hessian: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    size = hessian.shape[-1]
    rows = hessian.gather(1, order[:, :, None].expand(-1, -1, size))
    return rows.gather(2, order[:, None, :].expand(-1, size, -1))


def expected_error(weights: torch.Tensor, hessian: torch.Tensor, row_weight: torch.Tensor, schemes: list[Scheme],
                   names: list[str], settings: Settings) -> torch.Tensor:  # fmt: skip
    """Expected output error [n, C] of each scheme under GPTQ, without running GPTQ.

    Error feedback turns tr(Δ H Δᵀ) into Σ_j D_j δ_j² with D the diagonal of the LDL factorisation of H in the order of
    processing and δ_j plain rounding errors of column j (they are nearly uniform on the grid cell, so those of the
    original weights stand for those of the updated ones). row_weight [n, o] converts rows to the expert's output.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    order = processing_order(diagonal, settings.order)
    upper, _ = factor(permuted(hessian, order), settings.damping, names, allow_fallback=True)
    pivots = upper.diagonal(dim1=-2, dim2=-1).square().reciprocal()  # (n, i) in processing order
    column_cost = torch.empty_like(pivots).scatter_(1, order, pivots)
    result = torch.zeros(len(weights), len(schemes), dtype=torch.float64)
    for index, scheme in enumerate(schemes):
        if scheme.bits == 16:
            continue
        grid = fit(weights, diagonal, scheme.bits, scheme.fitted(weights.shape[-1]).group, scheme.symmetric)
        rounding = (weights - gptq.values(gptq.rtn(weights, grid), grid)).square()
        result[:, index] = torch.einsum("noi,no,ni->n", rounding, row_weight, column_cost).double()
    return result
