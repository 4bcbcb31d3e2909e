"""Widths of experts and bits together, against every choice there is; and the names that such choices have."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from moecompress.allocate.candidates import Unit, prices, unit_id
from moecompress.allocate.joint import Ladder, Level, joint_plan, smallest_joint
from moecompress.allocate.plan import Plan
from moecompress.errors import UserError
from moecompress.pack.scheme import Scheme
from moecompress.recipe import AllocateRecipe, recipe_from

CODES = [Scheme.parse(name) for name in ("t1", "t2", "b8g0s")]
EVERY = [Scheme.parse(name + width) for width in ("", "w32", "w16") for name in ("t1", "t2", "b8g0s")]
MILP, DEFAULT = AllocateRecipe(solver="milp"), AllocateRecipe()


def instance(seed: int, layers: int = 1, experts: int = 2) -> tuple[list[Unit], np.ndarray, Ladder]:
    """Two matrices an expert of 64 neurons; the loss of neurons is in the harm of down."""
    rng = np.random.default_rng(seed)
    units = [Unit(unit_id(layer, e, p), layer, e, p, *shape) for layer in range(layers) for e in range(experts)
             for p, shape in (("up", (64, 32)), ("down", (32, 64)))]  # fmt: skip
    energy = rng.lognormal(0, 1.5, len(units))
    rounding = energy[:, None] * np.array([0.27, 0.07, 0.0001])
    harm = np.concatenate([rounding * share for share in (1, 0.8, 0.6)], 1)
    for row in range(1, len(units), 2):
        lost = float(rng.uniform(0.01, 0.3) * energy[row])
        harm[row, 3:6] += lost
        harm[row, 6:] += 2.5 * lost
    return units, harm, {layer: [Level((), 0.0, np.ones(experts))] for layer in range(layers)}


def least_harm(units: list[Unit], harm: np.ndarray, budget: int) -> float:
    """By trying, for every expert, all widths with all codes of all of its matrices."""
    price = prices(units, EVERY)
    pairs = [(first, second) for first, second in product(range(9), repeat=2) if first // 3 == second // 3]
    best = np.inf
    for choice in product(pairs, repeat=len(units) // 2):
        columns = [column for pair in choice for column in pair]
        rows = range(len(units))
        if price[rows, columns].sum() <= budget:
            best = min(best, float(harm[rows, columns].sum()))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_against_every_choice(seed: int) -> None:
    units, harm, ladder = instance(seed)
    least = smallest_joint(units, EVERY, harm, ladder)
    for share in (1.0, 1.6, 2.5, 5.0):
        budget = int(share * least)
        best = least_harm(units, harm, budget)
        exact, quick = (joint_plan(units, EVERY, harm, ladder, budget, one) for one in (MILP, DEFAULT))
        assert exact.harm == pytest.approx(best, rel=1e-3) and exact.bytes <= budget
        assert best * (1 - 1e-9) <= quick.harm <= 1.05 * best and quick.lower_bound <= best * (1 + 1e-9)
        for plan in (exact, quick):
            widths: dict[str, set[int]] = {}
            for unit, candidate in plan.assignments().items():
                widths.setdefault(unit.rpartition(".")[0], set()).add(candidate.width)
            assert all(len(found) == 1 for found in widths.values())


def test_smallest_is_as_small_as_said() -> None:
    units, harm, ladder = instance(0)
    least = smallest_joint(units, EVERY, harm, ladder)
    assert joint_plan(units, EVERY, harm, ladder, least, DEFAULT).bytes == least == prices(units, EVERY).min(1).sum()
    with pytest.raises(UserError, match="smaller than the smallest possible size"):
        joint_plan(units, EVERY, harm, ladder, least - 1, DEFAULT)


def test_never_worse_than_without_widths() -> None:
    chosen = 0
    for seed in range(4):
        units, harm, ladder = instance(seed, layers=3, experts=6)
        for share in (1.0, 1.5, 3.0):
            budget = int(share * prices(units, CODES)[:, 0].sum())
            plan = joint_plan(units, EVERY, harm, ladder, budget, DEFAULT)
            assert plan.harm <= joint_plan(units, CODES, harm[:, :3], ladder, budget, DEFAULT).harm * (1 + 1e-9)
            chosen += plan.slimmed
            assert plan.slimmed % 2 == 0 and Plan.from_json(plan.to_json()) == plan
    assert chosen


def test_widths_and_fewer_experts_together() -> None:
    units, harm, ladder = instance(2, layers=2, experts=4)
    ladder = {layer: [*levels, Level((1,), 1e-3, np.full(4, 1.1))] for layer, levels in ladder.items()}
    least = smallest_joint(units, EVERY, harm, ladder)
    for settings in (DEFAULT, MILP):
        plan = joint_plan(units, EVERY, harm, ladder, int(1.3 * least), settings)
        assert plan.dropped == 4 and plan.slimmed and plan.bytes <= 1.3 * least
        assert {c.unit.split(".")[1] for c in plan.choices if c.candidate == "dropped"} == {"E001"}


def test_candidates_out_of_order_are_refused() -> None:
    units, harm, ladder = instance(0)
    with pytest.raises(ValueError, match="same codes at each width"):
        joint_plan(units, EVERY[1:], harm[:, 1:], ladder, 10**6, DEFAULT)


@pytest.mark.parametrize("code", ["t2", "t2_5", "b3g64s", "b2g64a", "b2g64a_o1", "b2g64a_o0_5", "n4g64s", "v2", "d0_8", "lr250s50", "ternary", "sign", "b16"])
def test_names_go_there_and_back(code: str) -> None:
    scheme = Scheme.parse(f"{code}w192")
    assert scheme.width == 192 and scheme.name == f"{code}w192" and Scheme.parse(code).width == 0
    assert scheme.price(192, 64) == Scheme.parse(code).price(192, 64)
    assert scheme.fitted(32).width == 192


@pytest.mark.parametrize("name", ["t2w0", "t2w", "t2w01", "t2w-16", "t2w1.5", "t2w16w16", "w16", "droppedw16", "t9w16", "t2w1234567", "t2w16 "])
def test_nonsense_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="no storage scheme"):
        Scheme.parse(name)


def test_recipes_that_cannot_be() -> None:
    for changes in (["allocate.granularity=layer"], ["allocate.allocator=uniform"], ["allocate.allocator=pmq"]):
        with pytest.raises(UserError, match="leave out slim"):
            recipe_from(["allocate.slim=true", *changes])
    with pytest.raises(UserError, match="slim"):
        recipe_from(["allocate.slim=perhaps"])
