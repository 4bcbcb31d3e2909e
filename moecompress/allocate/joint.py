"""One budget for three levers: how many experts a layer keeps, how many neurons an expert keeps, and at how many bits. A layer
comes with a ladder of *levels*, from all experts to few, each with the measured harm of leaving its experts out; on every level all
that is left can have any bits. Candidates with a ``width`` are of experts that are left with so many neurons: all matrices of an
expert have one width, and what the neurons' loss does is in the harm of its down matrix.

At a price λ of a byte the layers are independent, inside a level so are the experts, and at a width so are the matrices: each
expert takes the width, and each layer the level, with the least Σ min over candidates of harm + λ·bytes, plus the level's own
harm. A bisection finds the λ of the budget (algorithm of Everett 1963), its dual value is a lower bound, and the levels and widths
that it passes through are then allocated exactly.
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
    """A level as arrays: the units that are left, their harm and bytes [units left, widths, candidates of a width], and the number
    [units left] of each one's expert among those that are left."""

    left: np.ndarray
    harm: np.ndarray
    price: np.ndarray
    expert: np.ndarray
    own: float

    def of_experts(self, values: np.ndarray) -> np.ndarray:
        """Sums over the matrices of each expert: ``values`` [units left, widths] -> [experts left, widths]."""
        total = np.zeros((int(self.expert[-1]) + 1 if len(self.expert) else 0, values.shape[1]), dtype=values.dtype)
        np.add.at(total, self.expert, values)
        return total

    def widths_at(self, of_a_byte: float) -> bytes:
        """The best width of every expert at a price of a byte, numbered."""
        return self.of_experts((self.harm + of_a_byte * self.price).min(2)).argmin(1).astype(np.uint8).tobytes()

    def at(self, widths: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and harm [units left, candidates] once the experts have these widths."""
        rows, each = np.arange(len(self.left)), np.frombuffer(widths, dtype=np.uint8)[self.expert]
        return self.price[rows, each], self.harm[rows, each]

    @property
    def whole(self) -> bytes:
        """All experts as wide as they were."""
        return bytes(len(self.of_experts(np.zeros((len(self.left), 1)))))


#: What is decided before candidates are: for every layer, the number of its level, and the widths of the experts left there.
State = tuple[tuple[int, bytes], ...]


def joint_plan(units: Sequence[Unit], candidates: Sequence[Candidate], harm: np.ndarray, ladder: Ladder, budget_bytes: int,
               settings: AllocateRecipe, seed: int = 0) -> Plan:  # fmt: skip
    """Choose levels, widths and candidates together; units that are left out have the candidate "dropped" and no bytes.

    candidates: the same codes, in the same order, at each width, first at 0 (all neurons). harm: float64 (u, c), infinite where a
    candidate is not allowed. UserError if no level fits the budget.
    """
    price, harm = stored_bytes_and_harm(units, candidates, harm)
    rungs = _rungs(units, candidates, price, harm, ladder)
    state, bound = best_state(rungs, budget_bytes)
    simple = _without_merging(rungs, ladder, budget_bytes)
    if simple is not None:  # the search is not exact: a wider choice must not end with a worse one
        state = min(state, simple, key=lambda one: _harm(rungs, one, budget_bytes))
    variables = sum(rung.harm.size for options in rungs.values() for rung in options)
    if settings.solver == "milp" and settings.granularity == "expert" and variables <= _EXACT:
        found = exact_state(rungs, budget_bytes)
        if found is not None:
            state = min(state, found, key=lambda one: _harm(rungs, one, budget_bytes))
    chosen = {layer: ladder[layer][level] for layer, (level, _) in zip(rungs, state, strict=True)}
    picked = [(options[level], widths) for options, (level, widths) in zip(rungs.values(), state, strict=True)]
    left = np.concatenate([rung.left for rung, _ in picked])
    tail = np.concatenate([_only(rung, widths) for rung, widths in picked])
    order = np.argsort(left, kind="stable")
    left, tail = left[order], tail[order]
    kept = make_plan([units[i] for i in left], candidates, tail, budget_bytes, settings, seed=seed)
    plan = _with_dropped(kept, units, left, chosen)
    bound = min(max(bound, 0.0), plan.harm)
    return replace(plan, lower_bound=bound, gap=(plan.harm - bound) / plan.harm if plan.harm > 0 else 0.0)


def smallest_joint(units: Sequence[Unit], candidates: Sequence[Candidate], harm: np.ndarray, ladder: Ladder) -> int:
    """The least that the units can weigh with the candidates that they are allowed and any levels."""
    price, harm = stored_bytes_and_harm(units, candidates, harm)
    return sum(min(_least(rung) for rung in options) for options in _rungs(units, candidates, price, harm, ladder).values())


def best_state(rungs: Mapping[int, Sequence[_Rung]], budget_bytes: int) -> tuple[State, float]:
    """Level of every layer with its widths, and a lower bound on the harm of any choice of levels, widths and candidates."""
    seen, bound = _on_the_way(rungs, budget_bytes)
    best, value, of_a_byte = None, np.inf, 0.0
    known: dict[State, float] = {}

    def harm_of(state: State) -> float:
        if state not in known:
            known[state] = _harm(rungs, state, budget_bytes)
        return known[state]

    for state, priced in seen.items():
        if harm_of(state) < value:
            best, value, of_a_byte = state, harm_of(state), priced
    if best is None:
        raise UserError("the target is smaller than the smallest possible size of the experts, dropped ones left out",
                        got=f"{budget_bytes:,} bytes", remedy="raise the target, or list a narrower candidate")  # fmt: skip
    improved = True
    while improved:  # one layer a rung up or down, the best of which is taken; with many layers the bisection is close enough
        around = [_moved(best, place, (rung, options[rung].widths_at(of_a_byte))) for place, options in enumerate(rungs.values())
                  for rung in _beside(options, best[place][0])]  # fmt: skip
        thinner = [_moved(best, place, (best[place][0], widths)) for place, options in enumerate(rungs.values())
                   for widths in _other_widths(options[best[place][0]], best[place][1])]  # fmt: skip
        if len(known) + len(around) + len(thinner) <= _TRIALS:  # few enough to try them one by one
            around += thinner
        if len(known) + len(around) > _TRIALS:
            break
        nearest = min(around, key=harm_of, default=best)
        improved = harm_of(nearest) < value
        if improved:
            best, value = nearest, harm_of(nearest)
    return best, bound


def _without_merging(rungs: Mapping[int, Sequence[_Rung]], ladder: Ladder, budget_bytes: int) -> State | None:
    """The best state in which nothing is merged; None where that is no other question, or none fits."""
    allowed = {layer: [n for n, level in enumerate(ladder[layer]) if not level.merged] for layer in rungs}
    if all(len(allowed[layer]) == len(rungs[layer]) for layer in rungs):
        return None
    try:
        state, _ = best_state({layer: [rungs[layer][n] for n in allowed[layer]] for layer in rungs}, budget_bytes)
    except UserError:
        return None
    return tuple((allowed[layer][level], widths) for layer, (level, widths) in zip(rungs, state, strict=True))


def exact_state(rungs: Mapping[int, Sequence[_Rung]], budget_bytes: int, gap: float = 1e-4, time_limit_s: float = 60.0) -> State | None:
    """Levels and widths of the best choice of levels, widths and candidates by branch and bound (PuLP, HiGHS), None where none was
    found."""
    import pulp

    problem = pulp.LpProblem("experts_widths_and_bits", pulp.LpMinimize)
    scale = max(float(np.max([rung.harm[np.isfinite(rung.harm)].max() for r in rungs.values() for rung in r if rung.harm.size])), 1e-300)
    harm, size, taken, wide = [], [], {}, {}
    for layer, options in rungs.items():
        for level, rung in enumerate(options):
            here = taken[layer, level] = problem.add_variable(f"z_{layer}_{level}", cat=pulp.LpBinary)
            harm.append(here * (rung.own / scale))
            for expert in range(len(rung.whole)):
                each = [problem.add_variable(f"y_{layer}_{level}_{expert}_{w}", cat=pulp.LpBinary) for w in range(rung.harm.shape[1])]
                wide[layer, level, expert] = each
                problem += pulp.lpSum(each) == here  # an expert has one width on the level that is taken, else none
            for row, unit in enumerate(rung.left.tolist()):
                for w, this_wide in enumerate(wide[layer, level, int(rung.expert[row])]):
                    allowed = np.flatnonzero(np.isfinite(rung.harm[row, w])).tolist()
                    x = {c: problem.add_variable(f"x_{layer}_{level}_{unit}_{w}_{c}", cat=pulp.LpBinary) for c in allowed}
                    problem += pulp.lpSum(x.values()) == this_wide  # a matrix has one candidate of its expert's width
                    harm += [v * float(rung.harm[row, w, c] / scale) for c, v in x.items()]
                    size += [v * (float(rung.price[row, w, c]) / budget_bytes) for c, v in x.items()]
        problem += pulp.lpSum(taken[layer, level] for level in range(len(options))) == 1
    problem += pulp.lpSum(harm)
    problem += pulp.lpSum(size) <= 1
    problem.solve(pulp.HiGHS(msg=False, gapRel=gap, timeLimit=time_limit_s, threads=1))
    if any(z.varValue is None for z in taken.values()):
        return None
    state = []
    for layer, options in rungs.items():
        level = max(range(len(options)), key=lambda n: taken[layer, n].varValue)
        each = [wide[layer, level, expert] for expert in range(len(options[level].whole))]
        state.append((level, bytes(max(range(len(ys)), key=lambda w: ys[w].varValue) for ys in each)))
    return tuple(state) if np.isfinite(_harm(rungs, tuple(state), budget_bytes)) else None


def _beside(options: Sequence[_Rung], rung: int) -> list[int]:
    """The rungs that leave next to as many units as ``rung`` does: one more, one less, and the others with as many."""
    sizes = sorted({len(option.left) for option in options})
    here = sizes.index(len(options[rung].left))
    near = set(sizes[max(0, here - 1) : here + 2])
    return [n for n, option in enumerate(options) if n != rung and len(option.left) in near]


def _moved(state: State, place: int, to: tuple[int, bytes]) -> State:
    return (*state[:place], to, *state[place + 1 :])


def _other_widths(rung: _Rung, widths: bytes) -> list[bytes]:
    """The same with one expert's width changed."""
    return [bytes([*widths[:expert], other, *widths[expert + 1 :]]) for expert in range(len(widths))
            for other in range(rung.harm.shape[1]) if other != widths[expert]]  # fmt: skip


def _rungs(units: Sequence[Unit], candidates: Sequence[Candidate], price: np.ndarray, harm: np.ndarray, ladder: Ladder
           ) -> dict[int, list[_Rung]]:  # fmt: skip
    widths = list(dict.fromkeys(candidate.width for candidate in candidates))
    if [candidate.width for candidate in candidates] != np.repeat(widths, len(candidates) // len(widths)).tolist():
        raise ValueError("candidates must be the same codes at each width")
    layers = np.array([unit.layer for unit in units])
    experts = np.array([unit.expert for unit in units])
    by_width = (len(units), len(widths), len(candidates) // len(widths))
    price, harm = price.reshape(by_width), harm.reshape(by_width)
    rungs: dict[int, list[_Rung]] = {}
    for layer, levels in ladder.items():
        rungs[layer] = []
        for level in levels:
            left = np.flatnonzero((layers == layer) & ~np.isin(experts, level.gone))
            grown = harm[left] * level.growth[experts[left]][:, None, None]
            rungs[layer].append(_Rung(left, grown, price[left], np.unique(experts[left], return_inverse=True)[1], level.harm))
    return rungs


def _only(rung: _Rung, widths: bytes) -> np.ndarray:
    """Harm [units left, widths · candidates], infinite at all widths but those of the experts."""
    each = np.frombuffer(widths, dtype=np.uint8)[rung.expert]
    return np.where(np.arange(rung.harm.shape[1])[:, None] == each[:, None, None], rung.harm, np.inf).reshape(len(each), -1)


def _least(rung: _Rung) -> int:
    """The least that the experts of a level can weigh."""
    cheapest = np.where(np.isfinite(rung.harm), rung.price, np.iinfo(np.int64).max // 4096).min(2)
    return int(rung.of_experts(cheapest).min(1).sum())


def _on_the_way(rungs: Mapping[int, Sequence[_Rung]], budget_bytes: int) -> tuple[dict[State, float], float]:
    """States that are optimal at some price of a byte (given with them), met in a bisection for the price of the budget; and the
    best dual value."""
    seen: dict[State, float] = {tuple((0, options[0].whole) for options in rungs.values()): 0.0}
    bound, low, high = -np.inf, 1e-30, 1e6
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        state, size, value = _at_price(rungs, middle)
        seen[state] = middle
        bound = max(bound, value - middle * budget_bytes)
        low, high = (middle, high) if size > budget_bytes else (low, middle)
    seen.setdefault(_at_price(rungs, 1e6)[0], 1e6)
    return seen, bound


def _at_price(rungs: Mapping[int, Sequence[_Rung]], of_a_byte: float) -> tuple[State, int, float]:
    """The best level of every layer with its widths, bytes, and harm plus price of all."""
    state, size, total = [], 0, 0.0
    for options in rungs.values():
        values, sizes, widths = [], [], []
        for rung in options:
            widths.append(rung.widths_at(of_a_byte))
            price, harm = rung.at(widths[-1])
            cost = harm + of_a_byte * price
            choice, rows = cost.argmin(1), np.arange(len(cost))
            values.append(rung.own + float(cost[rows, choice].sum()))
            sizes.append(int(price[rows, choice].sum()))
        best = int(np.argmin(values))
        state.append((best, widths[best]))
        size, total = size + sizes[best], total + values[best]
    return tuple(state), size, total


def _harm(rungs: Mapping[int, Sequence[_Rung]], state: State, budget_bytes: int) -> float:
    """Least harm with these levels and widths within the budget, infinite if they do not fit."""
    parts = [(options[level], widths) for options, (level, widths) in zip(rungs.values(), state, strict=True)]
    price, harm = (np.concatenate(column) for column in zip(*(rung.at(widths) for rung, widths in parts), strict=True))
    if not np.isfinite(harm).any(1).all() or minimum_bytes(price, harm) > budget_bytes:
        return np.inf
    return solve_lagrangian(price, harm, budget_bytes).harm + sum(rung.own for rung, _ in parts)


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
