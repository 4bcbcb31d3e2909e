"""Outliers: the most sensitive weights of every row leave the grid before it is fitted, and keep 16 bits.

(GWQ, arXiv:2411.00850, takes the largest gradients |∂L/∂w| of the loss, which needs a backward pass. Here a weight is as
sensitive as the error that plain rounding makes of it is costly: (w − ŵ)² / [H⁻¹]_jj, as in SpQR, arXiv:2306.03078, where the
diagonal of the inverse says what is left once all other columns have made up for it. Every row has as many outliers as any
other, so what a gradient knows of a whole row would change nothing. And an outlier is not the weight as it was: given all
codes, the outliers of a row together are the least-squares solution, so they also make up for the other errors.)
Shapes: E experts, o rows, i columns, k outliers in a row.
"""

from __future__ import annotations

import torch

from moecompress.pack.outliers import SEGMENT, counts
from moecompress.pack.scheme import Scheme
from moecompress.quantize import gptq
from moecompress.quantize.grid import Grid, fit

#: Floats of the equations that are solved at a time.
EQUATIONS = 1 << 24


def choose(weights: torch.Tensor, cost: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Columns int64 [E, o, k] of the outliers of weights [E, o, i], rising; cost: [E, i], of a squared error in a column."""
    grid = fit(weights, cost, int(scheme.bits), scheme.group, scheme.symmetric)
    lost = (weights - gptq.values(gptq.rtn(weights, grid), grid)).square() * cost[:, None]
    segments = zip(lost.split(SEGMENT, -1), counts(weights.shape[-1], scheme.outliers), strict=True)
    return torch.cat([part.topk(count, -1).indices.sort(-1).values + SEGMENT * number for number, (part, count) in enumerate(segments)], -1)


def mask(weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """bool [E, o, i]: where the outliers are."""
    return torch.zeros(weights.shape, dtype=torch.bool).scatter_(-1, index, True)


def fit_rest(weights: torch.Tensor, importance: torch.Tensor, exact: torch.Tensor, scheme: Scheme) -> Grid:
    """The grid for what is left when the outliers, where ``exact``, are set aside; importance: [E, i]."""
    experts, rows, cols = weights.shape
    rest = weights.masked_fill(exact, 0).view(experts * rows, 1, cols)
    left = importance[:, None].expand(weights.shape).masked_fill(exact, 0).view(experts * rows, cols)
    grid = fit(rest, left, int(scheme.bits), scheme.group, scheme.symmetric)
    parts = [None if t is None else t.view(experts, rows, *t.shape[2:]) for t in (grid.row_scales, grid.multipliers, grid.zeros)]
    assert parts[0] is not None
    return Grid(grid.bits, grid.group, parts[0], parts[1], parts[2], cols)


def solve(off: torch.Tensor, hessian: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Values bfloat16 [E, o, k] at ``index`` that leave the least of tr(R H Rᵀ), R = off [E, o, i] less those values."""
    experts, _, cols = off.shape
    k = index.shape[-1]
    right = (off @ hessian).gather(-1, index)
    flat, parts = hessian.flatten(1), []
    step = max(1, EQUATIONS // (experts * k * k))
    for at, wanted in zip(index.split(step, 1), right.split(step, 1), strict=True):
        pairs = (at.unsqueeze(-1) * cols + at.unsqueeze(-2)).flatten(1)
        left = flat.gather(1, pairs).view(*at.shape, k)
        solved, failed = torch.linalg.solve_ex(left, wanted.unsqueeze(-1))
        usable = (failed == 0).unsqueeze(-1) & torch.isfinite(solved.squeeze(-1))
        parts.append(torch.where(usable, solved.squeeze(-1), off[:, : at.shape[1]].gather(-1, at)))
        off = off[:, at.shape[1] :]
    return torch.cat(parts, 1).to(torch.bfloat16)


def without(weights: torch.Tensor, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """What the codes must say: weights [E, o, i] less the outliers."""
    return weights.scatter_add(-1, index, -values.float())
