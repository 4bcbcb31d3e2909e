"""One budget for two levers: how many experts a layer keeps, and at how many bits. A layer comes with a ladder of *levels*, from
all experts to few, each with the measured harm of leaving its experts out; on every level all that is left can have any bits.

At a price λ of a byte the layers are independent, and inside a level so are the matrices: each layer takes the level with
the least Σ min over candidates of harm + λ·bytes, plus the level's own harm. A bisection finds the λ of the budget (algorithm
of Everett 1963), its dual value is a lower bound, and the levels that it passes through are then allocated exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moecompress.allocate.candidates import Candidate, Unit
from moecompress.allocate.plan import Choice, Plan, make_plan, stored_bytes_and_harm
from moecompress.allocate.solve import minimum_bytes, solve_lagrangian
from moecompress.errors import UserError
from moecompress.pack.scheme import DROPPED
from moecompress.recipe import AllocateRecipe

_BISECTIONS = 60
#: Plans that are made in full to compare levels.
_TRIALS = 96
#: Variables up to which levels are chosen by branch and bound, if that is asked for.
_EXACT = 20_000


@dataclass(frozen=True)
class Level:
    """One way to thin out a layer of E experts. gone: experts that are left out.
    harm: predicted harm of that, in the unit of the plan's. growth: float64 [E], by what the harm of rounding an expert grows,
    since it serves more tokens then. shared: of each that is gone, the expert whose output takes its place and with what
    factor (-1: nobody's); empty where tokens are routed again. merged: are those who serve for others refitted to it?"""

    gone: tuple[int, ...]
    harm: float
    growth: np.ndarray
    shared: tuple[tuple[int, float], ...] = ()
    merged: bool = False


#: Layer -> its levels, the first of which leaves nothing out.
Ladder = Mapping[int, Sequence[Level]]


@dataclass(frozen=True)
class _Rung:
    """A level as arrays: the units that are left, and their harm [units left, candidates]."""

    left: np.ndarray
    harm: np.ndarray
    own: float


def joint_plan(units: Sequence[Unit], candidates: Sequence[Candidate], harm: np.ndarray, ladder: Ladder, budget_bytes: int,
               settings: AllocateRecipe, seed: int = 0) -> Plan:  # fmt: skip
    """Choose levels and candidates together; units that are left out have the candidate "dropped" and no bytes.

    harm: float64 (u, c), infinite where a candidate is not allowed. UserError if no level fits the budget.
    """
    price, harm = stored_bytes_and_harm(units, candidates, harm)
    rungs = _rungs(units, harm, ladder)
    levels, bound = best_levels(price, rungs, budget_bytes)
    simple = _without_merging(price, rungs, ladder, budget_bytes)
    if simple is not None:  # the search is not exact: a wider choice must not end with a worse one
        levels = min(levels, simple, key=lambda one: _harm(price, rungs, one, budget_bytes))
    variables = price.shape[1] * sum(len(rung.left) for options in rungs.values() for rung in options)
    if settings.solver == "milp" and settings.granularity == "expert" and variables <= _EXACT:
        found = exact_levels(price, rungs, budget_bytes)
        if found is not None:
            levels = min(levels, found, key=lambda one: _harm(price, rungs, one, budget_bytes))
    chosen = {layer: ladder[layer][level] for layer, level in zip(rungs, levels, strict=True)}
    left = np.concatenate([rungs[layer][level].left for layer, level in zip(rungs, levels, strict=True)])
    tail = np.concatenate([rungs[layer][level].harm for layer, level in zip(rungs, levels, strict=True)])
    order = np.argsort(left, kind="stable")
    left, tail = left[order], tail[order]
    kept = make_plan([units[i] for i in left], candidates, tail, budget_bytes, settings, seed=seed)
    plan = _with_dropped(kept, units, left, chosen)
    bound = min(max(bound, 0.0), plan.harm)
    return replace(plan, lower_bound=bound, gap=(plan.harm - bound) / plan.harm if plan.harm > 0 else 0.0)


def smallest_joint(units: Sequence[Unit], candidates: Sequence[Candidate], harm: np.ndarray, ladder: Ladder) -> int:
    """The least that the units can weigh with the candidates that they are allowed and any levels."""
    price, harm = stored_bytes_and_harm(units, candidates, harm)
    return sum(min(minimum_bytes(price[rung.left], rung.harm) for rung in options) for options in _rungs(units, harm, ladder).values())


def best_levels(price: np.ndarray, rungs: Mapping[int, Sequence[_Rung]], budget_bytes: int) -> tuple[tuple[int, ...], float]:
    """Level of every layer, and a lower bound on the harm of any choice of levels and candidates."""
    seen, bound = _on_the_way(price, rungs, budget_bytes)
    best, value = None, np.inf
    known: dict[tuple[int, ...], float] = {}

    def harm_of(levels: tuple[int, ...]) -> float:
        if levels not in known:
            known[levels] = _harm(price, rungs, levels, budget_bytes)
        return known[levels]

    for levels in seen:
        if harm_of(levels) < value:
            best, value = levels, harm_of(levels)
    if best is None:
        raise UserError("the target is smaller than the smallest possible size of the experts, dropped ones left out",
                        got=f"{budget_bytes:,} bytes", remedy="raise the target, or list a narrower candidate")  # fmt: skip
    improved = True
    while improved:  # one layer a rung up or down, the best of which is taken; with many layers the bisection is close enough
        around = [_moved(best, place, rung) for place, options in enumerate(rungs.values())
                  for rung in _beside(options, best[place])]  # fmt: skip
        if len(known) + len(around) > _TRIALS:
            break
        nearest = min(around, key=harm_of, default=best)
        improved = harm_of(nearest) < value
        if improved:
            best, value = nearest, harm_of(nearest)
    return best, bound


def _without_merging(price: np.ndarray, rungs: Mapping[int, Sequence[_Rung]], ladder: Ladder, budget_bytes: int) -> tuple[int, ...] | None:
    """The best levels in which nothing is merged; None where that is no other question, or none fits."""
    allowed = {layer: [n for n, level in enumerate(ladder[layer]) if not level.merged] for layer in rungs}
    if all(len(allowed[layer]) == len(rungs[layer]) for layer in rungs):
        return None
    try:
        levels, _ = best_levels(price, {layer: [rungs[layer][n] for n in allowed[layer]] for layer in rungs}, budget_bytes)
    except UserError:
        return None
    return tuple(allowed[layer][level] for layer, level in zip(rungs, levels, strict=True))


def exact_levels(price: np.ndarray, rungs: Mapping[int, Sequence[_Rung]], budget_bytes: int, gap: float = 1e-4,
                 time_limit_s: float = 60.0) -> tuple[int, ...] | None:  # fmt: skip
    """The levels of the best choice of levels and candidates by branch and bound (PuLP, HiGHS), None where none was found."""
    import pulp

    problem = pulp.LpProblem("experts_and_bits", pulp.LpMinimize)
    scale = max(float(np.max([rung.harm[np.isfinite(rung.harm)].max() for r in rungs.values() for rung in r if rung.harm.size])), 1e-300)
    harm, size, taken = [], [], {}
    for layer, options in rungs.items():
        for level, rung in enumerate(options):
            here = taken[layer, level] = problem.add_variable(f"z_{layer}_{level}", cat=pulp.LpBinary)
            harm.append(here * (rung.own / scale))
            for row, unit in enumerate(rung.left.tolist()):
                allowed = np.flatnonzero(np.isfinite(rung.harm[row])).tolist()
                x = {c: problem.add_variable(f"x_{layer}_{level}_{unit}_{c}", cat=pulp.LpBinary) for c in allowed}
                problem += pulp.lpSum(x.values()) == here  # a matrix has one candidate on the level that is taken, else none
                harm += [v * float(rung.harm[row, c] / scale) for c, v in x.items()]
                size += [v * (float(price[unit, c]) / budget_bytes) for c, v in x.items()]
        problem += pulp.lpSum(taken[layer, level] for level in range(len(options))) == 1
    problem += pulp.lpSum(harm)
    problem += pulp.lpSum(size) <= 1
    problem.solve(pulp.HiGHS(msg=False, gapRel=gap, timeLimit=time_limit_s, threads=1))
    if any(z.varValue is None for z in taken.values()):
        return None
    levels = tuple(max(range(len(options)), key=lambda n: taken[layer, n].varValue) for layer, options in rungs.items())
    return levels if np.isfinite(_harm(price, rungs, levels, budget_bytes)) else None


def _beside(options: Sequence[_Rung], rung: int) -> list[int]:
    """The rungs that leave next to as many units as ``rung`` does: one more, one less, and the others with as many."""
    sizes = sorted({len(option.left) for option in options})
    here = sizes.index(len(options[rung].left))
    near = set(sizes[max(0, here - 1) : here + 2])
    return [n for n, option in enumerate(options) if n != rung and len(option.left) in near]


def _moved(levels: tuple[int, ...], place: int, rung: int) -> tuple[int, ...]:
    return (*levels[:place], rung, *levels[place + 1 :])


def _rungs(units: Sequence[Unit], harm: np.ndarray, ladder: Ladder) -> dict[int, list[_Rung]]:
    layers = np.array([unit.layer for unit in units])
    experts = np.array([unit.expert for unit in units])
    rungs: dict[int, list[_Rung]] = {}
    for layer, levels in ladder.items():
        rungs[layer] = []
        for level in levels:
            left = np.flatnonzero((layers == layer) & ~np.isin(experts, level.gone))
            rungs[layer].append(_Rung(left, harm[left] * level.growth[experts[left]][:, None], level.harm))
    return rungs


def _on_the_way(price: np.ndarray, rungs: Mapping[int, Sequence[_Rung]], budget_bytes: int
                ) -> tuple[list[tuple[int, ...]], float]:  # fmt: skip
    """Levels that are optimal at some price of a byte, met in a bisection for the price of the budget; and the best dual value."""
    seen: dict[tuple[int, ...], None] = {tuple(0 for _ in rungs): None}
    bound, low, high = -np.inf, 1e-30, 1e6
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        levels, size, value = _at_price(price, rungs, middle)
        seen[levels] = None
        bound = max(bound, value - middle * budget_bytes)
        low, high = (middle, high) if size > budget_bytes else (low, middle)
    seen[_at_price(price, rungs, 1e6)[0]] = None
    return list(seen), bound


def _at_price(price: np.ndarray, rungs: Mapping[int, Sequence[_Rung]], of_a_byte: float) -> tuple[tuple[int, ...], int, float]:
    """The best level of every layer, bytes, and harm plus price of all."""
    levels, size, total = [], 0, 0.0
    for options in rungs.values():
        values, sizes = [], []
        for rung in options:
            cost = rung.harm + of_a_byte * price[rung.left]
            choice = cost.argmin(1)
            rows = np.arange(len(choice))
            values.append(rung.own + float(cost[rows, choice].sum()))
            sizes.append(int(price[rung.left][rows, choice].sum()))
        best = int(np.argmin(values))
        levels.append(best)
        size, total = size + sizes[best], total + values[best]
    return tuple(levels), size, total


def _harm(price: np.ndarray, rungs: Mapping[int, Sequence[_Rung]], levels: tuple[int, ...], budget_bytes: int) -> float:
    """Least harm with these levels within the budget, infinite if they do not fit."""
    parts = [options[level] for options, level in zip(rungs.values(), levels, strict=True)]
    left, harm = np.concatenate([part.left for part in parts]), np.concatenate([part.harm for part in parts])
    if minimum_bytes(price[left], harm) > budget_bytes:
        return np.inf
    return solve_lagrangian(price[left], harm, budget_bytes).harm + sum(part.own for part in parts)


def _with_dropped(kept: Plan, units: Sequence[Unit], left: np.ndarray, chosen: Mapping[int, Level]) -> Plan:
    """The plan of the units that are ``left``, with the others in their places and their levels' harm on them."""
    of_kept = dict(zip(left.tolist(), kept.choices, strict=True))
    missing = [unit for index, unit in enumerate(units) if index not in of_kept]
    each = {layer: sum(unit.layer == layer for unit in missing) for layer in chosen}
    choices = tuple(
        of_kept[index] if index in of_kept
        else Choice(unit.id, DROPPED.name, unit.rows, unit.cols, 0, chosen[unit.layer].harm / each[unit.layer])
        for index, unit in enumerate(units)
    )  # fmt: skip
    if not missing:
        return kept
    shared = {f"L{layer:02d}.E{expert:03d}": by for layer, level in chosen.items()
              for expert, by in zip(level.gone, level.shared, strict=False)}  # fmt: skip
    merged = tuple(layer for layer, level in chosen.items() if level.merged and level.gone)
    return replace(kept, choices=choices, candidates=(*kept.candidates, DROPPED.name), controls={}, shared=shared, merged=merged)
