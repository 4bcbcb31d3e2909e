"""Nested integers: one code for several numbers of bits, each with error feedback of its own.

A weight has one code c of B bits; at k bits it is worth the middle of all codes that share c's k highest bits. GPTQ and
descent run for all k at once: every k has its own copy of the row, updated by its own errors, and each column takes the code
with the least sum over k of balance_k · (value at k bits − what is wanted at k bits)². All k share their scales.
(The sum over widths is that of MatQuant, arXiv:2502.06786, which trains; the feedback is GPTQ's, arXiv:2210.17323.)
Shapes: E experts, o rows, i columns, K widths from 2 to B bits.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moecompress.kernels import rounding
from moecompress.pack.nested import widths
from moecompress.quantize import gptq as plain
from moecompress.quantize import grid as plain_grid
from moecompress.quantize.grid import Grid

#: One more bit makes an error count 2^BALANCE times as much. A bit divides the squared error by about four, so at 2 every
#: width counts by the share that it loses of what it would have alone.
BALANCE = 2.0


def balance(bits: int) -> torch.Tensor:
    """float32 [K], fewest bits first."""
    return 2.0 ** (BALANCE * torch.arange(len(widths(bits))))


def levels(bits: int) -> torch.Tensor:
    """float32 [2**bits, K]: what every code stands for, in steps of the finest grid."""
    codes, dropped = torch.arange(2**bits)[:, None], bits - torch.tensor(widths(bits))
    return 2**dropped * ((codes >> dropped) - (2 ** (bits - dropped) - 1) / 2)


def fit(weights: torch.Tensor, importance: torch.Tensor, bits: int, group: int) -> Grid:
    """The grid of ``bits`` bits whose steps lie between those that each width would choose for itself.

    weights: float32 [E, o, i]; importance: [E, i], usually the diagonal of the Hessian.
    """
    own = [plain_grid.fit(weights, importance, k, group, True).scales() * 2.0 ** (k - bits) for k in widths(bits)]
    scale = torch.stack(own).log().mean(0).exp()
    row_scales, multipliers = plain_grid.store_scales(scale, group)
    return Grid(bits, group, row_scales, multipliers, None, weights.shape[-1])


def rtn(weights: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes uint8 [E, o, i] of least balanced error, without feedback."""
    scale, _ = grid.by_column()
    count = len(widths(grid.bits))
    return _nearest(weights.unsqueeze(-1).expand(*weights.shape, count), scale, grid.bits).to(torch.uint8)


def gptq(weights: torch.Tensor, upper: torch.Tensor, order: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes uint8 [E, o, i] of weights [E, o, i]; upper and order as in `gptq.gptq`."""
    count, table = len(widths(grid.bits)), levels(grid.bits)
    if _native(weights):
        codes = torch.empty(weights.shape, dtype=torch.uint8)
        ordered = weights.gather(-1, order[:, None, :].expand_as(weights)).repeat_interleave(count, 1)
        rounding.feedback(ordered, upper.contiguous(), grid.scales(), grid.all_zeros(), codes, grid.width, grid.bits,
                          order.contiguous(), descend=False, balance=balance(grid.bits))  # fmt: skip
        return codes
    scale, _ = grid.by_column()

    def choose(column: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step = scale.gather(-1, at[:, ::count]).squeeze(-1)  # (E, o); the K copies of a row are neighbours
        code = _nearest(column.unflatten(1, (-1, count)), step, grid.bits)
        return code.repeat_interleave(count, 1), (step.unsqueeze(-1) * table[code]).flatten(1)

    return plain.feedback(weights.repeat_interleave(count, 1), upper, order, choose)[:, ::count].contiguous()


def values(codes: torch.Tensor, grid: Grid, bits: int) -> torch.Tensor:
    """Weights float32 [E, o, i] as they are when ``bits`` bits are loaded."""
    scale, _ = grid.by_column()
    return scale * levels(grid.bits)[:, bits - widths(grid.bits)[0]][codes.long()]


def descend(weights: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """One sweep of coordinate descent on the balanced sum of tr((W − Ŵ_k) H (W − Ŵ_k)ᵀ)."""
    known = widths(grid.bits)
    pull = torch.stack([(weights - values(codes, grid, k)) @ hessian for k in known], 2)  # (E, o, K, i)
    codes = codes.clone()
    if _native(weights):
        rounding.feedback(pull.flatten(1, 2), hessian.contiguous(), grid.scales(), grid.all_zeros(), codes, grid.width,
                          grid.bits, None, descend=True, balance=balance(grid.bits))  # fmt: skip
        return codes
    (scale, _), table = grid.by_column(), levels(grid.bits)
    for j in range(weights.shape[-1]):
        step = scale[..., j]
        now = step.unsqueeze(-1) * table[codes[..., j].long()]  # (E, o, K)
        code = _nearest(now + pull[..., j] / hessian[:, j, j, None, None], step, grid.bits)
        moved = step.unsqueeze(-1) * table[code] - now
        codes[..., j] = code
        pull[..., j + 1 :] -= moved.unsqueeze(-1) * hessian[:, None, None, j, j + 1 :]
    return codes


def refit(target: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, grid: Grid) -> Grid:
    """All group scales of a row by least squares under H over all widths, given the codes; rows that do not gain keep theirs.

    target: weights [E, o, i] times hessian [E, i, i].
    """
    left, right = torch.zeros(()), torch.zeros(())
    for weight, bits in zip(balance(grid.bits).tolist(), widths(grid.bits), strict=True):
        dropped = grid.bits - bits
        coarse = Grid(bits, grid.group, grid.row_scales, grid.multipliers, None, grid.cols)
        one, other = plain.normal_equations(target, hessian, codes >> dropped, coarse)  # in steps of 2^dropped fine ones
        left, right = left + weight * 4**dropped * one, right + weight * 2**dropped * other
    return plain.solve_scales(left, right, grid)


def join(grids: list[Grid]) -> Grid:
    """One grid of the rows of several."""
    row_scales = torch.cat([grid.row_scales for grid in grids], 1)
    multipliers = [grid.multipliers for grid in grids if grid.multipliers is not None]
    return replace(grids[0], row_scales=row_scales, multipliers=torch.cat(multipliers, 1) if multipliers else None)


def _nearest(wanted: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int64 [...] for what is wanted at every width, [..., K], with finest steps [...]."""
    cost = torch.zeros(())
    for weight, level, goal in zip(balance(bits).tolist(), levels(bits).unbind(1), wanted.unbind(-1), strict=True):
        cost = cost + weight * (step.unsqueeze(-1) * level - goal.unsqueeze(-1)).square()
    return cost.argmin(-1)


def _native(weights: torch.Tensor) -> bool:
    return rounding.available() and weights.device.type == "cpu"
