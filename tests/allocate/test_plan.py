from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from rich.console import Console

from moecompress.allocate.candidates import Candidate, Unit, prices, unit_id
from moecompress.allocate.plan import Plan, make_plan, shuffled_plan, smallest_bytes, uniform_plan
from moecompress.allocate.pmq import Factors
from moecompress.errors import UserError
from moecompress.recipe import AllocateRecipe

CANDIDATES = [Candidate(2, 64), Candidate(3, 64), Candidate(4, 64), Candidate(8, 128), Candidate(16)]
PROJECTIONS = {"gate": (96, 128), "up": (96, 128), "down": (128, 96)}


def some_units(layers: int = 3, experts: int = 8) -> list[Unit]:
    return [
        Unit(unit_id(layer, expert, projection), layer, expert, projection, rows, cols)
        for layer in range(2, layers + 2)
        for expert in range(experts)
        for projection, (rows, cols) in PROJECTIONS.items()
    ]


def some_harm(units: list[Unit], seed: int = 0) -> np.ndarray:
    size = np.exp(np.random.default_rng(seed).normal(0, 2, (len(units), 1)))
    return size * np.array([0.12, 0.035, 0.01, 4e-5, 0.0])


def budget_of(units: list[Unit], bits: float) -> int:
    return int(sum(unit.weights for unit in units) * bits / 8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_candidates_by_name_and_price(bits: int, group: int, symmetric: bool) -> None:
    candidate = Candidate(bits, group, symmetric)
    assert candidate.name == f"b{bits}g{group}{'s' if symmetric else 'a'}"
    assert Candidate.parse(candidate.name) == candidate
    groups = -(-200 // group) if group else 1
    assert candidate.price(48, 200) == 48 * (208 * bits // 8 + 2 + (groups if group else 0) + (0 if symmetric else -(-groups * bits // 8)))


def test_sixteen_bits_keep_the_dtype_of_the_input() -> None:
    assert Candidate.parse("b16") == Candidate(16)
    assert Candidate(16).name == "b16" and Candidate(16).price(3, 5) == 30 and Candidate(16).price(3, 5, 4) == 60


@pytest.mark.parametrize("name", ["", "b5g64s", "b3g64", "b16g64s", "b3g48s", "3g64s"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UserError, match="no storage scheme is called"):
        Candidate.parse(name)


def test_prices_by_hand() -> None:
    units = some_units(1, 1)
    table = prices(units, CANDIDATES)
    # gate, 2 bits: 96 rows of 32 bytes of codes, 2 of row scale and 2 groups; down: 24 + 2 + 2
    assert table[0, 0] == 96 * (32 + 2 + 2) and table[2, 0] == 128 * (24 + 2 + 2)
    assert table[:, 4].tolist() == [96 * 128 * 2] * 3


def test_global_plan_is_within_budget_better_than_its_controls_and_survives_json() -> None:
    units = some_units()
    harm = some_harm(units)
    for bits in (2.6, 3.0, 4.5):
        budget = budget_of(units, bits)
        plan = make_plan(units, CANDIDATES, harm, budget, AllocateRecipe())
        assert 0.995 * budget <= plan.bytes <= budget
        assert plan.bits == pytest.approx(8 * plan.bytes / sum(unit.weights for unit in units))
        assert plan.lower_bound is not None and plan.lower_bound <= plan.harm
        uniform, shuffled = plan.controls["uniform"], plan.controls["shuffled"]
        assert uniform.bytes <= budget and shuffled.bytes == plan.bytes
        assert plan.harm < uniform.harm and plan.harm < shuffled.harm
        assert Plan.from_json(plan.to_json()) == plan
        for unit, choice in zip(units, plan.choices, strict=True):
            candidate = plan.assignments()[unit.id]
            assert choice.bytes == candidate.price(unit.rows, unit.cols)


def test_json_has_a_unit_a_line_and_diff_names_what_changed() -> None:
    units = some_units(1, 4)
    one = make_plan(units, CANDIDATES, some_harm(units), budget_of(units, 3), AllocateRecipe())
    two = make_plan(units, CANDIDATES, some_harm(units, 1), budget_of(units, 3), AllocateRecipe())
    assert sum('"candidate"' in line for line in one.to_json().splitlines()) == len(units)
    assert one.diff(one) == []
    assert {unit for unit, _, _ in one.diff(two)} == {
        unit for unit in one.assignments() if one.assignments()[unit] != two.assignments()[unit]
    }
    console = Console(width=120, record=True, file=None, quiet=True)
    console.print(one.table())
    console = Console(width=140)
    with console.capture() as capture:
        console.print(one.table())
    assert "L02" in capture.get() and "uniform" in capture.get()


def test_damaged_plans_are_refused() -> None:
    units = some_units(1, 2)
    text = uniform_plan(units, CANDIDATES, some_harm(units), budget_of(units, 3)).to_json()
    for wrong, words in (
        ("{", "not a plan"),
        ("[]", "not a plan"),
        ('{"version": 1}', "not a plan"),
        (text.replace('"version": 1', '"version": 99'), "another version"),
        (text.replace('"bytes": 3456', '"bytes": 3457', 1), "does not match"),
    ):
        with pytest.raises(UserError, match=words):
            Plan.from_json(wrong)


@pytest.mark.parametrize("granularity", ["projection", "layer"])
def test_tied_units_take_the_same_candidate(granularity: str) -> None:
    units = some_units()
    budget = budget_of(units, 3.2)
    plan = make_plan(units, CANDIDATES, some_harm(units), budget, AllocateRecipe(granularity=granularity))  # type: ignore[arg-type]
    free = make_plan(units, CANDIDATES, some_harm(units), budget, AllocateRecipe())
    assert plan.bytes <= budget and free.harm <= plan.harm
    seen: dict[object, set[str]] = {}
    for unit, choice in zip(units, plan.choices, strict=True):
        key = unit.layer if granularity == "layer" else (unit.layer, unit.projection)
        seen.setdefault(key, set()).add(choice.candidate)
    assert all(len(names) == 1 for names in seen.values())


def test_milp_plan_is_at_least_as_good() -> None:
    units = some_units(2, 4)
    quick = make_plan(units, CANDIDATES, some_harm(units), budget_of(units, 3), AllocateRecipe())
    slow = make_plan(units, CANDIDATES, some_harm(units), budget_of(units, 3), AllocateRecipe(solver="milp"))
    assert slow.harm <= quick.harm and slow.bytes <= slow.target_bytes
    assert slow.gap is not None and slow.gap < 2e-3


def test_uniform_spreads_the_raised_units_evenly() -> None:
    units = some_units(4, 16)
    harm = some_harm(units)
    for bits in (2.5, 3.0, 3.4, 7.0):
        budget = budget_of(units, bits)
        plan = uniform_plan(units, CANDIDATES, harm, budget)
        assert 0.99 * budget <= plan.bytes <= budget
        names = [name for name, _ in Counter(choice.candidate for choice in plan.choices).most_common()]
        assert len(names) <= 2
        wide = max(names, key=lambda name: Candidate.parse(name).bits)
        raised: Counter[object] = Counter({(u.layer, u.projection): 0 for u in units})
        where: dict[object, list[int]] = {}
        for unit, choice in zip(units, plan.choices, strict=True):
            if choice.candidate == wide:
                raised[unit.layer, unit.projection] += 1
                where.setdefault((unit.layer, unit.projection), []).append(unit.expert)
        assert max(raised.values()) - min(raised.values()) <= 1
        for experts in where.values():  # no two of eight raised experts in sixteen stand together, nor far apart
            gaps = np.diff(sorted(experts))
            assert len(gaps) == 0 or gaps.max() <= 2 * 16 / len(experts) + 1


def test_uniform_at_a_whole_candidate_uses_only_that() -> None:
    units = some_units()
    harm = some_harm(units)
    exact = int(prices(units, CANDIDATES)[:, 1].sum())
    assert {c.candidate for c in uniform_plan(units, CANDIDATES, harm, exact).choices} == {"b3g64s"}
    assert {c.candidate for c in uniform_plan(units, CANDIDATES, harm, 10**9).choices} == {"b16"}


def test_uniform_respects_what_is_not_allowed() -> None:
    units = some_units()
    harm = some_harm(units)
    harm[5, :2] = np.inf
    plan = uniform_plan(units, CANDIDATES, harm, int(prices(units, CANDIDATES)[:, 0].sum()) + 5000)
    assert plan.choices[5].candidate == "b4g64s" and np.isfinite(plan.harm)
    with pytest.raises(UserError, match=f"{smallest_bytes(units, CANDIDATES, harm):,} bytes"):
        uniform_plan(units, CANDIDATES, harm, smallest_bytes(units, CANDIDATES, harm) - 1)


def test_shuffled_keeps_the_bytes_of_every_shape_and_follows_its_seed() -> None:
    units = some_units()
    harm = some_harm(units)
    harm[0, 0] = np.inf
    plan = make_plan(units, CANDIDATES, harm, budget_of(units, 3), AllocateRecipe())
    one, two = (shuffled_plan(plan, units, CANDIDATES, harm, seed) for seed in (0, 1))
    assert one == shuffled_plan(plan, units, CANDIDATES, harm, 0) and one.choices != two.choices

    def multiset(p: Plan) -> Counter[object]:
        return Counter((c.rows, c.cols, c.candidate) for c in p.choices)

    assert multiset(one) == multiset(two) == multiset(plan)
    assert one.choices[0].candidate == plan.choices[0].candidate and one.bytes == plan.bytes


def pmq_factors(harm: np.ndarray, layers: int = 3, experts: int = 8) -> Factors:
    rng = np.random.default_rng(9)
    error = harm.reshape(layers, experts, 3, -1).sum(axis=2)
    return Factors(rng.random((layers, experts)), rng.random((layers, experts)), error)


def test_pmq_on_a_model() -> None:
    units, candidates = some_units(), CANDIDATES[:3]
    harm = some_harm(units)[:, :3]
    factors = pmq_factors(harm)
    nominal = make_plan(units, candidates, harm, None, AllocateRecipe(allocator="pmq", layer_bits=22), factors=factors)
    of_layer: Counter[int] = Counter()
    for unit, choice in zip(units, nominal.choices, strict=True):
        of_layer[unit.layer] += Candidate.parse(choice.candidate).bits
    assert set(of_layer.values()) == {3 * 22} and nominal.target_bytes == nominal.bytes
    budget = budget_of(units, 3.1)
    plan = make_plan(units, candidates, harm, budget, AllocateRecipe(allocator="pmq"), factors=factors)
    assert 0.97 * budget <= plan.bytes <= budget
    per_expert: dict[object, set[str]] = {}
    per_layer: Counter[int] = Counter()
    for unit, choice in zip(units, plan.choices, strict=True):
        per_expert.setdefault((unit.layer, unit.expert), set()).add(choice.candidate)
        per_layer[unit.layer] += choice.bytes
    assert all(len(names) == 1 for names in per_expert.values())
    assert max(per_layer.values()) <= budget / 3
    with pytest.raises(UserError, match="larger than the target"):
        make_plan(units, candidates, harm, 10_000, AllocateRecipe(allocator="pmq", layer_bits=22), factors=factors)
    with pytest.raises(ValueError, match="needs factors"):
        make_plan(units, candidates, harm, budget, AllocateRecipe(allocator="pmq"))


def test_targets_that_are_missing_or_too_small() -> None:
    units = some_units()
    harm = some_harm(units)
    with pytest.raises(UserError, match="needs a target"):
        make_plan(units, CANDIDATES, harm, None, AllocateRecipe())
    with pytest.raises(UserError, match=f"{smallest_bytes(units, CANDIDATES, harm):,} bytes"):
        make_plan(units, CANDIDATES, harm, 1000, AllocateRecipe())
    harm[7] = np.inf
    with pytest.raises(UserError, match=r"L02\.E002\.up"):
        make_plan(units, CANDIDATES, harm, budget_of(units, 3), AllocateRecipe())
