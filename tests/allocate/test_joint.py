"""The allocation of experts and bits together, against every choice there is."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from moecompress.allocate.candidates import Candidate, Unit, prices, unit_id
from moecompress.allocate.joint import Level, joint_plan
from moecompress.allocate.plan import Plan, make_plan
from moecompress.errors import UserError
from moecompress.recipe import AllocateRecipe

CANDIDATES = [Candidate.parse(name) for name in ("b2g64s", "b4g64s", "b8g64s")]
DEFAULT = AllocateRecipe()


def instance(seed: int, layers: int = 2, experts: int = 3):
    """One matrix an expert, so that everything can be tried: units, harm, ladder with 0, 1 or 2 experts gone."""
    rng = np.random.default_rng(seed)
    units = [Unit(unit_id(layer, e, "up"), layer, e, "up", 64, 64) for layer in range(layers) for e in range(experts)]
    energy = rng.lognormal(0, 1.5, len(units))
    harm = energy[:, None] * np.array([0.12, 0.01, 0.0001])
    ladder = {}
    for layer in range(layers):
        own = energy[layer * experts : (layer + 1) * experts]
        order = np.argsort(own)
        levels = [Level((), 0.0, np.ones(experts))]
        for gone in (1, 2):
            levels.append(Level(tuple(order[:gone].tolist()), float(rng.uniform(0.1, 0.6) * own[order[:gone]].sum()),
                                1 + rng.uniform(0, 0.5, experts)))  # fmt: skip
        ladder[layer] = levels
    return units, harm, ladder


def least_harm(units, harm, ladder, budget: int) -> float:
    """By trying all levels and candidates."""
    price = prices(units, CANDIDATES)
    best = np.inf
    for levels in product(*ladder.values()):
        own = sum(level.harm for level in levels)
        left = [i for i, u in enumerate(units) if u.expert not in levels[u.layer].gone]
        growth = np.array([levels[units[i].layer].growth[units[i].expert] for i in left])
        for choice in product(range(len(CANDIDATES)), repeat=len(left)):
            if price[left, choice].sum() <= budget:
                best = min(best, own + float((harm[left, choice] * growth).sum()))
    return best


def smallest(units) -> int:
    return int(prices(units, CANDIDATES)[:, 0].sum())


@pytest.mark.parametrize("solver", ["lagrangian", "milp"])
@pytest.mark.parametrize("seed", range(6))
def test_against_every_choice(seed: int, solver: str) -> None:
    units, harm, ladder = instance(seed)
    for share in (0.7, 1.0, 1.4, 2.2):
        budget = int(share * smallest(units))
        plan = joint_plan(units, CANDIDATES, harm, ladder, budget, AllocateRecipe(solver=solver))
        best = least_harm(units, harm, ladder, budget)
        assert plan.bytes <= budget
        assert plan.lower_bound <= best * (1 + 1e-9)
        assert best * (1 - 1e-9) <= plan.harm <= best * (1 + (1e-3 if solver == "milp" else 0.03))


def test_fates_belong_together_and_enough_experts_stay() -> None:
    units, harm, ladder = instance(3, layers=4)
    both = [Unit(unit_id(u.layer, u.expert, p), u.layer, u.expert, p, 64, 64) for u in units for p in ("up", "down")]
    plan = joint_plan(both, CANDIDATES, np.repeat(harm, 2, 0), ladder, int(1.2 * smallest(units)), DEFAULT)
    dropped = {c.unit.rpartition(".")[0] for c in plan.choices if c.candidate == "dropped"}
    assert plan.dropped == 2 * len(dropped) > 0
    assert [c.unit for c in plan.choices] == [u.id for u in both]
    gone = {layer: {int(name[-3:]) for name in dropped if name.startswith(f"L{layer:02d}")} for layer in ladder}
    assert all(gone[layer] in [set(level.gone) for level in ladder[layer]] for layer in ladder)
    again = Plan.from_json(plan.to_json())
    assert again == plan and "dropped" in again.candidates


def test_without_levels_it_is_the_ordinary_plan() -> None:
    units, harm, ladder = instance(5, layers=3)
    bare = {layer: levels[:1] for layer, levels in ladder.items()}
    budget = int(1.5 * smallest(units))
    plan = joint_plan(units, CANDIDATES, harm, bare, budget, DEFAULT)
    assert plan.choices == make_plan(units, CANDIDATES, harm, budget, DEFAULT).choices and plan.dropped == 0


def test_never_worse_than_without_levels() -> None:
    for seed in range(5):
        units, harm, ladder = instance(seed, layers=8, experts=6)
        for share in (1.0, 1.3, 2.0):
            budget = int(share * smallest(units))
            joint = joint_plan(units, CANDIDATES, harm, ladder, budget, DEFAULT)
            assert joint.harm <= make_plan(units, CANDIDATES, harm, budget, DEFAULT).harm * (1 + 1e-9)
            assert joint.lower_bound <= joint.harm <= 1.05 * joint.lower_bound  # so few and large steps leave a gap


def test_never_worse_with_merging_than_without() -> None:
    """Merged levels leave out what shared ones do, with another harm and growth; plans say which they took."""
    taken = 0
    for seed in range(4):
        rng = np.random.default_rng(100 + seed)
        units, harm, ladder = instance(seed, layers=6, experts=5)
        shared = {layer: [replace(level, shared=tuple((4, 1.0) for _ in level.gone)) for level in levels] for layer, levels in ladder.items()}
        wide = {layer: levels + [replace(level, harm=level.harm * rng.uniform(0.3, 1.2), growth=level.growth * rng.uniform(0.9, 1.3), merged=True)
                                 for level in levels[1:]] for layer, levels in shared.items()}  # fmt: skip
        for share in (0.8, 1.0, 1.3, 2.0):
            budget = int(share * smallest(units))
            without = joint_plan(units, CANDIDATES, harm, shared, budget, DEFAULT)
            plan = joint_plan(units, CANDIDATES, harm, wide, budget, DEFAULT)
            assert plan.lower_bound <= plan.harm <= without.harm * (1 + 1e-9) and plan.bytes <= budget
            assert set(plan.merged) <= {int(name[1:3]) for name in plan.shared} and not without.merged
            assert Plan.from_json(plan.to_json()) == plan
            taken += len(plan.merged)
    assert taken


def test_impossible_target_is_refused() -> None:
    units, harm, ladder = instance(1)
    with pytest.raises(UserError, match="smaller than the smallest possible size"):
        joint_plan(units, CANDIDATES, harm, ladder, int(0.3 * smallest(units)), DEFAULT)
