"""The plan: what will be stored for every expert matrix, what it weighs, what harm is predicted, and what the same
bytes would do without thinking (uniform) or with the choices dealt out at random (shuffled)."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from moecompress.allocate.candidates import Candidate, Unit, prices
from moecompress.allocate.pmq import Factors, layer_budget, pmq_cost, solve_layer, solve_per_layer
from moecompress.allocate.solve import Allocation, merge_units, minimum_bytes, solve_lagrangian, solve_milp
from moecompress.errors import UserError
from moecompress.pack.scheme import DROPPED
from moecompress.recipe import AllocateRecipe

if TYPE_CHECKING:
    from rich.table import Table

VERSION = 1


@dataclass(frozen=True)
class Choice:
    """The fate of one unit: ``candidate`` by name, exact stored ``bytes``, predicted ``harm``."""

    unit: str
    candidate: str
    rows: int
    cols: int
    bytes: int
    harm: float


@dataclass(frozen=True)
class Control:
    """What another plan of the same target would weigh and harm."""

    bytes: int
    harm: float


@dataclass(frozen=True)
class Plan:
    """One choice per unit, in the order of the model. Harm is in the units of the harm it was made from.

    ``target_bytes``: what the expert matrices may weigh. ``lower_bound``: no plan of this granularity within the target
    has less predicted harm, None where the allocator minimises something else; ``gap``: the part of ``harm`` that
    lies above it. ``shared``: dropped expert ("L07.E031") -> the expert of the layer whose output, times a factor, takes its
    place (-1: none does); in other layers tokens that had chosen dropped experts are routed again. ``merged``: layers in which
    those who serve for others are refitted to do so (calibrate/merging.py).
    """

    allocator: str
    solver: str | None
    granularity: str
    target_bytes: int
    candidates: tuple[str, ...]
    choices: tuple[Choice, ...]
    lower_bound: float | None = None
    gap: float | None = None
    controls: Mapping[str, Control] = field(default_factory=dict)
    shared: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    merged: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(choice.bytes for choice in self.choices)

    @property
    def harm(self) -> float:
        return float(sum(choice.harm for choice in self.choices))

    @property
    def weights(self) -> int:
        return sum(choice.rows * choice.cols for choice in self.choices)

    @property
    def bits(self) -> float:
        """Stored bits per weight of the units, scales and padding included."""
        return 8 * self.bytes / self.weights if self.choices else 0.0

    @property
    def dropped(self) -> int:
        """How many units are left out."""
        return sum(choice.candidate == DROPPED.name for choice in self.choices)

    @property
    def slimmed(self) -> int:
        """How many units are of thinner experts."""
        return sum(candidate.width > 0 for candidate in self.assignments().values())

    def assignments(self) -> dict[str, Candidate]:
        """Candidate of every unit id."""
        parsed = {name: Candidate.parse(name) for name in {choice.candidate for choice in self.choices}}
        return {choice.unit: parsed[choice.candidate] for choice in self.choices}

    def diff(self, other: Plan) -> list[tuple[str, str | None, str | None]]:
        """(unit, candidate here, candidate there) of every unit that differs; None where a plan lacks the unit."""
        here = {choice.unit: choice.candidate for choice in self.choices}
        there = {choice.unit: choice.candidate for choice in other.choices}
        return [(unit, here.get(unit), there.get(unit)) for unit in (here | there) if here.get(unit) != there.get(unit)]

    def to_json(self) -> str:
        """JSON with one unit a line, so that two plans can be compared with any diff tool."""
        head = {
            "version": VERSION,
            "allocator": self.allocator,
            "solver": self.solver,
            "granularity": self.granularity,
            "target_bytes": self.target_bytes,
            "bytes": self.bytes,
            "bits_per_weight": self.bits,
            "harm": self.harm,
            "lower_bound": self.lower_bound,
            "gap": self.gap,
            "candidates": list(self.candidates),
            "controls": {name: dataclasses.asdict(control) for name, control in self.controls.items()},
        } | ({"shared": self.shared} if self.shared else {}) | ({"merged": list(self.merged)} if self.merged else {})
        lines = ",\n".join(
            f"    {json.dumps(choice.unit)}: "
            + json.dumps({k: v for k, v in dataclasses.asdict(choice).items() if k != "unit"})
            for choice in self.choices
        )
        return json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "units": {\n' + lines + "\n  }\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote; UserError if it is none, or its totals do not match its units."""
        try:
            record = json.loads(text)
            if record["version"] != VERSION:
                raise UserError("this plan was written by another version", expected=VERSION, got=record["version"])
            plan = cls(
                **{key: record[key] for key in ("allocator", "solver", "granularity", "target_bytes")},
                candidates=tuple(record["candidates"]),
                choices=tuple(Choice(unit=unit, **rest) for unit, rest in record["units"].items()),
                lower_bound=record["lower_bound"],
                gap=record["gap"],
                controls={name: Control(**control) for name, control in record["controls"].items()},
                shared={expert: (int(by), float(factor)) for expert, (by, factor) in record.get("shared", {}).items()},
                merged=tuple(int(layer) for layer in record.get("merged", ())),
            )
            total = record["bytes"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                "this is not a plan", expected="the JSON that moecompress plan writes", got=repr(error)
            ) from None
        if plan.bytes != total:
            raise UserError("the plan's total does not match its units", expected=total, got=plan.bytes,
                            remedy="make the plan again; it was edited or damaged")  # fmt: skip
        return plan

    def table(self) -> Table:
        """A rich table: one row a layer with its choices, stored bits per weight and share of the predicted harm."""
        from rich.table import Table

        by_layer: dict[str, list[Choice]] = defaultdict(list)
        for choice in self.choices:
            by_layer[choice.unit.split(".")[0]].append(choice)
        names = [name for name in self.candidates if any(choice.candidate == name for choice in self.choices)]
        table = Table(title=f"{self.allocator} plan: {self.bytes:,} of {self.target_bytes:,} bytes, "
                            f"{self.bits:.3f} bits per weight, predicted harm {self.harm:.4g}")  # fmt: skip
        for header in ("layer", *names, "bits", "harm"):
            table.add_column(header, justify="left" if header == "layer" else "right")
        for layer, choices in by_layer.items():
            counts = Counter(choice.candidate for choice in choices)
            bits = 8 * sum(choice.bytes for choice in choices) / sum(choice.rows * choice.cols for choice in choices)
            share = sum(choice.harm for choice in choices) / self.harm if self.harm else 0.0
            table.add_row(layer, *(str(counts[name]) if counts[name] else "·" for name in names),
                          f"{bits:.3f}", f"{share:.1%}")  # fmt: skip
        lines = [f"{name}: {control.bytes:,} bytes, predicted harm {control.harm:.4g}"
                 for name, control in self.controls.items()]  # fmt: skip
        if self.gap is not None:
            lines.append(f"at most {self.gap:.2%} of the predicted harm could be saved at this size")
        if self.merged:
            lines.append(f"experts that layers {', '.join(map(str, self.merged))} leave out are merged into others")
        table.caption = "\n".join(lines) or None
        return table


def make_plan(
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    harm: np.ndarray,
    budget_bytes: int | None,
    settings: AllocateRecipe,
    *,
    factors: Factors | None = None,
    seed: int = 0,
) -> Plan:
    """Choose a candidate for every unit within ``budget_bytes``, as ``settings`` say.

    ``harm`` float64 (u, c): predicted harm, infinite where a candidate is not allowed. ``factors`` are for allocator
    pmq: layers and experts in rising order, errors in the order of ``candidates``; all units of an expert share a
    candidate there. With pmq's ``layer_bits`` the budget may be None: nominal bits decide the size.
    UserError if the budget cannot be met. The controls ``uniform`` and ``shuffled`` have the same target.
    """
    price, harm = stored_bytes_and_harm(units, candidates, harm)
    if settings.allocator == "pmq":
        choice = _pmq_choice(units, candidates, price, harm, budget_bytes, settings, factors)
        solved = None
        size = int(price[np.arange(len(units)), choice].sum())
        budget_bytes = size if budget_bytes is None else budget_bytes
    elif budget_bytes is None:
        raise UserError("a plan needs a target", remedy="give target.bits or target.size")
    elif settings.allocator == "uniform":
        return uniform_plan(units, candidates, harm, budget_bytes)
    else:
        solved = _global(units, price, harm, budget_bytes, settings)
        choice = solved.choice
    plan = Plan(
        allocator=settings.allocator,
        solver="dynamic program" if solved is None else settings.solver,
        granularity=settings.granularity,
        target_bytes=budget_bytes,
        candidates=tuple(candidate.name for candidate in candidates),
        choices=_choices(units, candidates, price, harm, choice),
        lower_bound=None if solved is None else solved.lower_bound,
        gap=None if solved is None else solved.gap,
    )
    uniform = uniform_plan(units, candidates, harm, budget_bytes)
    shuffled = shuffled_plan(plan, units, candidates, harm, seed)
    controls = {other.allocator: Control(other.bytes, other.harm) for other in (uniform, shuffled)}
    return replace(plan, controls=controls)


def uniform_plan(units: Sequence[Unit], candidates: Sequence[Candidate], harm: np.ndarray, budget_bytes: int) -> Plan:
    """The plan that does not look: one candidate for all, and the next wider one for as many as the bytes allow.

    The raised units are spread evenly over the experts, with the same share in every layer and projection. Where a
    unit may not have the candidate (infinite harm) it takes the next wider one it may have.
    """
    price, harm = stored_bytes_and_harm(units, candidates, harm)
    choice = _uniform_choice(units, price, harm, budget_bytes)
    return Plan(
        allocator="uniform",
        solver=None,
        granularity="expert",
        target_bytes=budget_bytes,
        candidates=tuple(candidate.name for candidate in candidates),
        choices=_choices(units, candidates, price, harm, choice),
    )


def shuffled_plan(
    plan: Plan, units: Sequence[Unit], candidates: Sequence[Candidate], harm: np.ndarray, seed: int = 0
) -> Plan:
    """The plan's choices dealt out at random among units of the same shape: the same bytes, without the knowledge.

    Units that may not have every candidate keep theirs.
    """
    price, harm = stored_bytes_and_harm(units, candidates, harm)
    column = {candidate.name: index for index, candidate in enumerate(candidates)}
    choice = np.array([column[item.candidate] for item in plan.choices], dtype=np.int64)
    generator = np.random.default_rng(seed)
    free = np.isfinite(harm).all(axis=1)
    of_shape: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for index, unit in enumerate(units):
        if free[index]:
            of_shape[unit.rows, unit.cols, unit.weights_dtype_bytes].append(index)
    for _, members in sorted(of_shape.items()):
        choice[members] = choice[generator.permutation(members)]
    choices = _choices(units, candidates, price, harm, choice)
    return replace(plan, allocator="shuffled", choices=choices, lower_bound=None, gap=None, controls={})


def smallest_bytes(units: Sequence[Unit], candidates: Sequence[Candidate], harm: np.ndarray) -> int:
    """The least that the units can weigh with the candidates they are allowed."""
    return minimum_bytes(*stored_bytes_and_harm(units, candidates, harm))


def stored_bytes_and_harm(units: Sequence[Unit], candidates: Sequence[Candidate], harm: np.ndarray
                          ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Bytes int64 (u, c), and ``harm`` as float64; UserError where a unit has no candidate that is allowed."""
    harm = np.asarray(harm, dtype=np.float64)
    if harm.shape != (len(units), len(candidates)):
        raise ValueError(f"harm is {harm.shape}, there are {len(units)} units and {len(candidates)} candidates")
    stuck = np.flatnonzero(~np.isfinite(harm).any(axis=1))
    if len(stuck):
        raise UserError(
            f"no candidate is allowed for {units[stuck[0]].id} and {len(stuck) - 1} other units",
            expected="calibration tokens for every expert",
            remedy="calibrate on more text, allow quantize.allow_fallback, or list 16 bits as a candidate",
        )
    return prices(units, candidates), harm


def _choices(
    units: Sequence[Unit], candidates: Sequence[Candidate], price: np.ndarray, harm: np.ndarray, choice: np.ndarray
) -> tuple[Choice, ...]:
    return tuple(
        Choice(
            unit.id, candidates[column].name, unit.rows, unit.cols, int(price[row, column]), float(harm[row, column])
        )
        for row, (unit, column) in enumerate(zip(units, choice.tolist(), strict=True))
    )


def _global(
    units: Sequence[Unit], price: np.ndarray, harm: np.ndarray, budget_bytes: int, settings: AllocateRecipe
) -> Allocation:
    """One budget over everything, with the units tied as the granularity says."""
    tie: dict[str, Callable[[Unit], object]] = {
        "expert": lambda unit: unit.id,
        "projection": lambda unit: (unit.layer, unit.projection),
        "layer": lambda unit: unit.layer,
    }
    keys = [tie[settings.granularity](unit) for unit in units]
    number = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    group_of_unit = np.array([number[key] for key in keys], dtype=np.int64)
    tied_price, tied_harm = merge_units(price, harm, group_of_unit)
    solver = {"lagrangian": solve_lagrangian, "milp": solve_milp}[settings.solver]
    solved = solver(tied_price, tied_harm, budget_bytes)
    return replace(solved, choice=solved.choice[group_of_unit])


def _pmq_choice(
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    price: np.ndarray,
    harm: np.ndarray,
    budget_bytes: int | None,
    settings: AllocateRecipe,
    factors: Factors | None,
) -> np.ndarray:
    """MC-MoE's program a layer, in nominal bits (``layer_bits``) or in the layer's share of the bytes."""
    experts = sorted({(unit.layer, unit.expert) for unit in units})
    layers = sorted({layer for layer, _ in experts})
    each = len(experts) // len(layers)
    expected = (len(layers), each, len(candidates))
    if factors is None or factors.error.shape != expected or len(experts) != len(layers) * each:
        raise ValueError(f"allocator pmq needs factors with errors {expected}")
    order = np.argsort(price.sum(axis=0), kind="stable")  # from narrow to wide
    cost = pmq_cost(factors, alpha=settings.alpha, beta=settings.beta, gamma=settings.gamma)
    number = {expert: index for index, expert in enumerate(experts)}
    expert_of_unit = np.array([number[unit.layer, unit.expert] for unit in units], dtype=np.int64)
    expert_price, expert_harm = merge_units(price, harm, expert_of_unit)
    expert_price = expert_price[:, order]
    cost[np.isinf(expert_harm).reshape(cost.shape)] = np.inf  # not allowed
    cost = cost[:, :, order]
    if settings.layer_bits is not None:
        bits = [candidates[index].bits for index in order]
        chosen = solve_per_layer(cost, bits, layer_budget(settings.layer_bits, each), exactly=True).reshape(-1)
    elif budget_bytes is not None:
        weights = np.zeros(len(layers))
        for unit in units:
            weights[layers.index(unit.layer)] += unit.weights
        shares = np.floor(budget_bytes * weights / weights.sum()).astype(np.int64)
        chosen = np.concatenate([
            solve_layer(cost[row], expert_price[row * each : (row + 1) * each], int(shares[row]), exactly=False)
            for row in range(len(layers))
        ])  # fmt: skip
    else:
        raise UserError("allocator pmq needs a budget", remedy="give allocate.layer_bits, target.bits or target.size")
    choice = order[chosen][expert_of_unit]
    size = int(price[np.arange(len(units)), choice].sum())
    if budget_bytes is not None and size > budget_bytes:
        raise UserError(
            "the experts at allocate.layer_bits are larger than the target",
            expected=f"at most {budget_bytes:,} bytes",
            got=f"{size:,} bytes",
            remedy="leave out allocate.layer_bits, lower it, or raise the target",
        )
    return choice


def _uniform_choice(units: Sequence[Unit], price: np.ndarray, harm: np.ndarray, budget_bytes: int) -> np.ndarray:
    rows = np.arange(len(units))
    smallest = minimum_bytes(price, harm)
    if budget_bytes < smallest:
        raise UserError(
            "the target is smaller than the smallest possible size of the experts",
            expected=f"at least {smallest:,} bytes",
            got=f"{budget_bytes:,} bytes",
            remedy="raise the target, or list a narrower candidate",
        )
    order = np.argsort(price.sum(axis=0), kind="stable")  # from narrow to wide
    allowed = np.isfinite(harm)[:, order]
    levels = []
    for level in range(len(order)):
        wider = allowed[:, level:].argmax(axis=1) + level
        narrower = level - allowed[:, level::-1].argmax(axis=1)
        levels.append(order[np.where(allowed[:, level:].any(axis=1), wider, narrower)])
    # Where shapes differ the cheapest candidate of a unit need not be the cheapest overall.
    levels[0] = np.where(np.isfinite(harm), price, np.iinfo(np.int64).max).argmin(axis=1)
    totals = [int(price[rows, level].sum()) for level in levels]
    below = max(index for index, total in enumerate(totals) if total <= budget_bytes)
    choice = levels[below].copy()
    if below + 1 == len(levels):
        return choice
    above, left = levels[below + 1], budget_bytes - totals[below]
    for row in _even_order(units):
        extra = int(price[row, above[row]] - price[row, choice[row]])
        if extra <= left:
            choice[row] = above[row]
            left -= extra
    return choice


def _even_order(units: Sequence[Unit]) -> list[int]:
    """Unit numbers such that any first part holds about the same share of every layer and projection, its experts
    spread out."""
    classes: dict[tuple[int, str], list[int]] = defaultdict(list)
    for row, unit in enumerate(units):
        classes[unit.layer, unit.projection].append(row)
    keyed = []
    for number, ((layer, _), members) in enumerate(sorted(classes.items())):
        members = sorted(members, key=lambda row: units[row].expert)
        spread = sorted(range(len(members)), key=lambda place: _bit_reversed((place + layer) % len(members)))
        keyed += [(rank / len(members), _bit_reversed(number), members[place]) for rank, place in enumerate(spread)]
    return [row for _, _, row in sorted(keyed)]


def _bit_reversed(number: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8 …: the van der Corput sequence, evenly spread at every length."""
    value, step = 0.0, 0.5
    while number:
        value += step * (number & 1)
        number, step = number >> 1, step / 2
    return value
