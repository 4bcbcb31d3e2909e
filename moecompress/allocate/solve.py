"""Choose one candidate for every unit: least total harm within a budget of bytes (a multiple-choice knapsack).

Plain arrays: ``price`` int64 (u, c) in bytes, ``harm`` float64 (u, c), infinite where a candidate is not allowed.
Two solvers that check each other: ``solve_lagrangian`` (greedy on the convex hulls, then swaps; a fraction of a second
for a large model) and ``solve_milp`` (branch and bound; minutes, closes the last hundredth of a per cent).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moecompress.errors import UserError

#: moves looked at together in one round of swaps
_POOL = 1000
_ROUNDS = 300


@dataclass(frozen=True)
class Allocation:
    """``choice`` int64 (u,): the candidate of every unit. ``lower_bound``: no choice within the budget has less harm.

    ``gap`` is (harm - lower_bound) / harm: how much better the best choice could be at most; 0 if harm is 0.
    """

    choice: np.ndarray
    bytes: int
    harm: float
    lower_bound: float
    gap: float


def minimum_bytes(price: np.ndarray, harm: np.ndarray) -> int:
    """The smallest total that the allowed candidates permit."""
    return int(np.where(np.isfinite(harm), price, np.iinfo(np.int64).max).min(axis=1).sum())


def merge_units(price: np.ndarray, harm: np.ndarray, group_of_unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tie units together: price and harm (g, c) of groups whose members all take the same candidate.

    ``group_of_unit`` int (u,) numbers the groups 0 … g-1. Expand a choice with ``choice[group_of_unit]``.
    """
    count = int(group_of_unit.max()) + 1 if len(group_of_unit) else 0
    merged_price = np.zeros((count, price.shape[1]), dtype=np.int64)
    merged_harm = np.zeros((count, price.shape[1]))
    np.add.at(merged_price, group_of_unit, price)
    np.add.at(merged_harm, group_of_unit, harm)
    return merged_price, merged_harm


def solve_lagrangian(price: np.ndarray, harm: np.ndarray, budget_bytes: int) -> Allocation:
    """Greedy along every unit's lower convex hull, steepest step first; the leftover goes to swaps of up to two units.

    The greedy part is the optimum of the linear relaxation up to one unit, which gives the lower bound (Sinha and
    Zoltners 1979). Never exceeds the budget. UserError if the budget is below the smallest possible size.
    """
    price, harm = _checked(price, harm, budget_bytes)
    choice, unit, to, gain, extra = _hull_steps(price, harm)
    rows = np.arange(len(price))
    left = budget_bytes - int(price[rows, choice].sum())
    used = np.cumsum(extra)
    fits = int(np.searchsorted(used, left, side="right"))  # steps 0 … fits-1 are taken whole
    bound = float(harm[rows, choice].sum() - gain[:fits].sum())
    slope = 0.0
    if fits < len(extra):
        slope = float(gain[fits] / extra[fits])
        bound -= slope * (left - (int(used[fits - 1]) if fits else 0))
    # A unit's steps are in hull order here, so the last write is its furthest step.
    choice[unit[:fits]] = to[:fits]
    choice = _swap(price, harm, choice, budget_bytes, slope)
    return _allocation(price, harm, choice, bound)


def solve_milp(
    price: np.ndarray,
    harm: np.ndarray,
    budget_bytes: int,
    *,
    gap: float = 1e-3,
    time_limit_s: float = 60.0,
    backend: Literal["highs", "cbc"] = "highs",
) -> Allocation:
    """The same problem by branch and bound (PuLP with HiGHS or CBC), stopped at a relative ``gap`` or a time limit.

    Starts from the Lagrangian answer and returns it if that already proves the gap, which large models nearly always
    do. Otherwise returns the better of the two answers, with the gap really attained.
    """
    start = solve_lagrangian(price, harm, budget_bytes)
    price, harm = _checked(price, harm, budget_bytes)
    if start.gap <= max(gap, 1e-12):
        return start
    found, bound = _branch_and_bound(price, harm, budget_bytes, gap, time_limit_s, backend)
    bound = max(bound, start.lower_bound)
    best = start.choice
    if found is not None:
        rows = np.arange(len(price))
        within = int(price[rows, found].sum()) <= budget_bytes  # the solver works in floating point
        if within and harm[rows, found].sum() < start.harm:
            best = found
    return _allocation(price, harm, best, bound)


def _checked(price: np.ndarray, harm: np.ndarray, budget_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    price, harm = np.asarray(price, dtype=np.int64), np.asarray(harm, dtype=np.float64)
    if price.shape != harm.shape or price.ndim != 2:
        raise ValueError(f"price {price.shape} and harm {harm.shape} must have one shape (units, candidates)")
    if np.isnan(harm).any() or np.isneginf(harm).any():
        raise ValueError("harm must be a number, or infinite where a candidate is not allowed")
    none = np.flatnonzero(~np.isfinite(harm).any(axis=1))
    if len(none):
        raise UserError(f"{len(none)} units have no candidate that is allowed (the first is number {none[0]})",
                        remedy="list a wider candidate, such as 16 bits")  # fmt: skip
    smallest = minimum_bytes(price, harm)
    if budget_bytes < smallest:
        raise UserError(
            "the budget is smaller than the smallest possible size of the experts",
            expected=f"at least {smallest:,} bytes",
            got=f"{budget_bytes:,} bytes",
            remedy="raise the target, or list a narrower candidate",
        )
    return price, harm


def _hull_steps(
    price: np.ndarray, harm: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cheapest choice (u,), and the steps up the convex hulls, steepest first: unit, candidate, gain, extra bytes."""
    rows = np.arange(len(price))
    # The cheapest allowed candidate; among equally cheap ones the least harmful.
    cheapest = np.where(np.isfinite(harm), price, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    start = np.where(price == cheapest, harm, np.inf).argmin(axis=1)
    current = start.copy()
    last = np.full(len(price), np.inf)  # slope of a unit's step before
    steps: list[tuple[np.ndarray, ...]] = []
    for _ in range(price.shape[1] - 1):
        extra = price - price[rows, current][:, None]
        gain = harm[rows, current][:, None] - harm
        up = (extra > 0) & (gain > 0)
        slope = np.where(up, gain, -np.inf) / np.where(up, extra, 1)
        # Of equally steep steps the longest: the shorter ones lie on the same edge of the hull.
        steepest = up & (slope == slope.max(axis=1, keepdims=True))
        to = np.where(steepest, extra, -1).argmax(axis=1)
        moving = np.flatnonzero(up.any(axis=1))
        if not len(moving):
            break
        target = to[moving]
        # Slopes fall along a hull; on a straight edge rounding could say otherwise and put the steps out of order.
        last[moving] = np.minimum(last[moving], slope[moving, target])
        steps.append((moving, target, gain[moving, target], extra[moving, target], last[moving]))
        current[moving] = target
    if not steps:
        empty = np.zeros(0, dtype=np.int64)
        return start, empty, empty, np.zeros(0), empty
    unit, to, gain, extra, slope = (np.concatenate(column) for column in zip(*steps, strict=True))
    # Stable, so that a unit's steps stay in order where two have one slope.
    order = np.argsort(-slope, kind="stable")
    return start, unit[order], to[order], gain[order], extra[order]


def _swap(price: np.ndarray, harm: np.ndarray, choice: np.ndarray, budget_bytes: int, slope: float) -> np.ndarray:
    """Improve ``choice`` by moving one unit, or two at once, as long as harm falls and the bytes fit."""
    rows, choice = np.arange(len(price)), choice.copy()
    for _ in range(_ROUNDS):
        left = budget_bytes - int(price[rows, choice].sum())
        extra = price - price[rows, choice][:, None]
        change = harm - harm[rows, choice][:, None]
        pool = _pool(extra, change, slope)
        # Number 0 stands for staying put, so that single moves are pairs too.
        unit = np.concatenate(([-1], pool // price.shape[1]))
        to = np.concatenate(([0], pool % price.shape[1]))
        bytes_, harm_ = extra.ravel()[pool], change.ravel()[pool]
        bytes_, harm_ = np.concatenate(([0], bytes_)), np.concatenate(([0.0], harm_))
        total = np.where(bytes_[:, None] + bytes_[None, :] <= left, harm_[:, None] + harm_[None, :], np.inf)
        total[unit[:, None] == unit[None, :]] = np.inf
        first, second = np.unravel_index(int(total.argmin()), total.shape)
        if not total[first, second] < -1e-12 * max(1e-300, float(np.abs(harm_).max())):
            break
        for move in (first, second):
            if unit[move] >= 0:
                choice[unit[move]] = to[move]
    return choice


def _pool(extra: np.ndarray, change: np.ndarray, slope: float) -> np.ndarray:
    """Flat indices of the moves closest to the best exchange rate: those that are worth pairing."""
    cost = (change + slope * extra).ravel()
    cost[~np.isfinite(cost) | ((extra == 0) & (change >= 0)).ravel()] = np.inf
    count = min(_POOL, int(np.isfinite(cost).sum()))
    return np.argpartition(cost, count - 1)[:count] if count else np.zeros(0, dtype=np.int64)


def _branch_and_bound(
    price: np.ndarray, harm: np.ndarray, budget_bytes: int, gap: float, time_limit_s: float, backend: str
) -> tuple[np.ndarray | None, float]:
    """Choice or None, and the solver's lower bound (minus infinity where it does not tell)."""
    import pulp

    allowed = np.isfinite(harm)
    # Numbers near one keep the solver's tolerances meaningful.
    harm_scale = max(float(harm[allowed].max() - harm[allowed].min()), 1e-300)
    price_scale = max(float(price.mean()), 1.0)
    problem = pulp.LpProblem("bits", pulp.LpMinimize)
    taken = {
        (int(u), int(c)): problem.add_variable(f"x_{u}_{c}", cat=pulp.LpBinary)
        for u, c in zip(*allowed.nonzero(), strict=True)
    }
    problem += pulp.lpSum(x * float(harm[key] / harm_scale) for key, x in taken.items())
    problem += pulp.lpSum(x * float(price[key] / price_scale) for key, x in taken.items()) <= budget_bytes / price_scale
    for u in range(len(price)):
        problem += pulp.lpSum(taken[u, int(c)] for c in np.flatnonzero(allowed[u])) == 1
    bound = -np.inf
    if backend == "highs":
        problem.solve(pulp.HiGHS(msg=False, gapRel=gap, timeLimit=time_limit_s, threads=1))
        bound = float(problem.solverModel.getInfo().mip_dual_bound) * harm_scale
    else:
        problem.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=gap, timeLimit=time_limit_s, threads=1))
    value = np.zeros(price.shape)
    for key, x in taken.items():
        value[key] = x.varValue or 0.0
    found = value.max(axis=1) > 0.5
    return (value.argmax(axis=1) if found.all() else None), bound


def _allocation(price: np.ndarray, harm: np.ndarray, choice: np.ndarray, bound: float) -> Allocation:
    rows = np.arange(len(price))
    total = float(harm[rows, choice].sum())
    bound = min(bound, total)  # equal up to rounding where the relaxation is whole
    gap = (total - bound) / total if total > 0 else 0.0
    return Allocation(choice, int(price[rows, choice].sum()), total, bound, gap)
