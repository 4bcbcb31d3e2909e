"""GPTQ over all experts of a layer at once, then coordinate descent and a least-squares refit of the scales.

Rows are independent and experts share nothing but the loop: one pass over columns serves [E, o, i]. (arXiv:2210.17323;
the descent is the cyclic one of QuantEase, arXiv:2309.01885; the refit solves for all group scales of a row under H.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moecompress.kernels import rounding
from moecompress.quantize.grid import Grid, nearest, store_scales

BLOCK = 128  # columns between two full updates
Choose = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def rtn(weights: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes uint8 [E, o, i] by rounding to nearest."""
    scale, zero = grid.by_column()
    return nearest(weights, scale, zero, grid.bits).to(torch.uint8)


def gptq(weights: torch.Tensor, upper: torch.Tensor, order: torch.Tensor, grid: Grid, exact: torch.Tensor | None = None
         ) -> torch.Tensor:  # fmt: skip
    """Codes uint8 [E, o, i] of weights [E, o, i]; where ``exact`` (bool [E, o, i]) nothing is lost, whatever the code.

    order: [E, i] the columns in the order of processing; upper: [E, i, i] Cholesky factor of the inverse Hessian in that
    order (`hessian.factor`). Groups stay where they are (static groups), so the order costs no storage.
    """
    if rounding.available() and weights.device.type == "cpu":
        return _native(weights, upper, order, grid, exact)
    scale, zero = grid.by_column()

    def choose(column: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s, z = scale.gather(-1, at).squeeze(-1), zero.gather(-1, at).squeeze(-1)
        code = nearest(column, s, z, grid.bits)
        value = s * (code - z)
        return code, value if exact is None else torch.where(exact.gather(-1, at).squeeze(-1), column, value)

    return feedback(weights, upper, order, choose)


def feedback(weights: torch.Tensor, upper: torch.Tensor, order: torch.Tensor, choose: Choose) -> torch.Tensor:
    """Codes uint8 [E, o, i]: columns one by one, the error of each spread over those that follow.

    choose(column [E, o], its index in every row [E, o, 1]) gives codes and values, [E, o] each.
    """
    experts, rows, cols = weights.shape
    spread = order[:, None, :].expand(-1, rows, -1)
    w = weights.gather(-1, spread)
    codes = torch.empty(weights.shape, dtype=torch.uint8)
    for begin in range(0, cols, BLOCK):
        end = min(begin + BLOCK, cols)
        block, errors = w[..., begin:end], torch.empty(experts, rows, end - begin)
        inner = upper[:, begin:end, begin:end]
        for j in range(end - begin):
            column = block[..., j]
            code, value = choose(column, spread[..., begin + j, None])
            error = (column - value) / inner[:, j, j, None]
            codes[..., begin + j] = code
            errors[..., j] = error
            block[..., j + 1 :] -= error.unsqueeze(-1) * inner[:, None, j, j + 1 :]
        w[..., end:] -= errors @ upper[:, begin:end, end:]
    return torch.empty_like(codes).scatter_(-1, spread, codes)


def _native(weights: torch.Tensor, upper: torch.Tensor, order: torch.Tensor, grid: Grid, exact: torch.Tensor | None) -> torch.Tensor:
    codes = torch.empty(weights.shape, dtype=torch.uint8)
    ordered = weights.gather(-1, order[:, None, :].expand(-1, weights.shape[1], -1))
    rounding.feedback(ordered, upper.contiguous(), grid.scales(), grid.all_zeros(), codes, grid.width, grid.bits,
                      order.contiguous(), descend=False, exact=exact)  # fmt: skip
    return codes


def values(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Dequantized weights float32 [E, o, i]."""
    scale, zero = grid.by_column()
    return scale * (codes.float() - zero)


def descend(weights: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """One sweep of coordinate descent on tr((W − Ŵ) H (W − Ŵ)ᵀ): each column moves to its best code given all others."""
    cols = weights.shape[-1]
    scale, zero = grid.by_column()
    codes = codes.float()
    error = weights - scale * (codes - zero)
    pull = error @ hessian  # (E, o, i): minus half the gradient
    if rounding.available() and weights.device.type == "cpu":
        moved_codes = codes.to(torch.uint8)
        rounding.feedback(pull, hessian.contiguous(), grid.scales(), grid.all_zeros(), moved_codes, grid.width, grid.bits,
                          None, descend=True)  # fmt: skip
        return moved_codes
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    for begin in range(0, cols, BLOCK):
        end = min(begin + BLOCK, cols)
        local, inner = pull[..., begin:end], hessian[:, begin:end, begin:end]
        moved = torch.zeros_like(local)
        for j in range(end - begin):
            c, s, z = begin + j, scale[..., begin + j], zero[..., begin + j]
            now = s * (codes[..., c] - z)
            code = nearest(now + local[..., j] / diagonal[:, c, None], s, z, grid.bits)
            delta = s * (code - codes[..., c])
            codes[..., c] = code
            moved[..., j] = delta
            local -= delta.unsqueeze(-1) * inner[:, None, j]
        if end < cols:  # columns before are done for this sweep: their pulls are not needed any more
            pull[..., end:] -= moved @ hessian[:, begin:end, end:]
    return codes.to(torch.uint8)


def refit(target: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, grid: Grid) -> Grid:
    """All group scales of a row by least squares under H, given the codes; rows that do not gain keep theirs.

    target: weights [E, o, i] times hessian [E, i, i].
    """
    if rounding.available() and target.device.type == "cpu":
        steps = grid.row_scales.float()
        multipliers = None if grid.multipliers is None else grid.multipliers.contiguous().clone()
        rounding.refit(codes, grid.all_zeros(), hessian.contiguous(), target.contiguous(), grid.scales(), grid.width, steps, multipliers)
        return Grid(grid.bits, grid.group, steps.to(torch.bfloat16), multipliers, grid.zeros, grid.cols)
    return solve_scales(*normal_equations(target, hessian, codes, grid), grid)


def solve_scales(left: torch.Tensor, right: torch.Tensor, grid: Grid) -> Grid:
    """The grid with the scales of each row that solve left [E, o, G, G] · scales = right [E, o, G], rounded to what is stored;
    rows that do not gain keep theirs."""
    diagonal = left.diagonal(dim1=-2, dim2=-1)
    ridge = torch.diag_embed(diagonal * 1e-4 + diagonal.mean(-1, keepdim=True) * 1e-6 + 1e-30)
    solved, failed = torch.linalg.solve_ex(left + ridge, right.unsqueeze(-1))
    scale = solved.squeeze(-1)
    usable = torch.isfinite(scale).all(-1) & (scale > 0).all(-1) & (failed == 0)
    scale = torch.where(usable.unsqueeze(-1), scale, grid.scales().double()).float()
    row_scales, multipliers = store_scales(scale, grid.group)
    trial = Grid(grid.bits, grid.group, row_scales, multipliers, grid.zeros, grid.cols)
    better = usable & (_scale_error(left, right, trial.scales()) < _scale_error(left, right, grid.scales()))
    kept = torch.where(better, trial.row_scales, grid.row_scales)
    if multipliers is not None:
        assert grid.multipliers is not None
        multipliers = torch.where(better.unsqueeze(-1), multipliers, grid.multipliers)
    return Grid(grid.bits, grid.group, kept, multipliers, grid.zeros, grid.cols)


def normal_equations(target: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, grid: Grid
                     ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """float64 [E, o, G, G] and [E, o, G]: of the least-squares problem for the scales of each row."""
    width, groups = grid.width, grid.scales().shape[-1]
    _, zero = grid.by_column()
    levels = codes.float() - zero
    right = torch.stack([part.sum(-1) for part in (target * levels).split(width, -1)], -1)
    left = torch.empty(*right.shape, groups, dtype=torch.float64)
    for g, part in enumerate(levels.split(width, -1)):
        reached = (part @ hessian[:, g * width : g * width + part.shape[-1]]) * levels  # (E, o, i)
        left[..., g, :] = torch.stack([p.sum(-1) for p in reached.split(width, -1)], -1)
    return left, right.double()


def _scale_error(left: torch.Tensor, right: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Squared error of each row [E, o] under the Hessian, less what does not depend on the scales [E, o, G]."""
    scale = scale.double().unsqueeze(-1)
    return ((left @ scale - 2 * right.unsqueeze(-1)) * scale).sum((-2, -1))


def row_errors(weights: torch.Tensor, hessian: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """(w − ŵ) H (w − ŵ)ᵀ of every row: [E, o]."""
    error = weights - quantized
    return ((error @ hessian) * error).sum(-1)
