from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pulp
import pytest

from moecompress.allocate.pmq import Factors, pmq_cost, read_factors, solve_all_layers, solve_factors, solve_layer
from moecompress.errors import UserError

BITS = np.array([1, 2, 3])


def some_factors(layers: int = 3, experts: int = 8, seed: int = 0, ordered: bool = True) -> Factors:
    rng = np.random.default_rng(seed)
    error = rng.random((layers, experts, 3)) * np.exp(rng.normal(0, 1, (layers, 1, 1)))
    error = np.sort(error, axis=2)[:, :, ::-1] if ordered else error
    return Factors(rng.integers(1, 1000, (layers, experts)).astype(float), rng.random((layers, experts)), error)


def file_of(factors: Factors, path: Path) -> Path:
    record = {"about": "made up", "frequency": factors.frequency.tolist(), "routing_weight": factors.weight.tolist()}
    path.write_text(json.dumps(record | {"loss_at_1_2_3_bits": factors.error.tolist()}))
    return path


def brute_force(cost: np.ndarray, budget: int, exactly: bool) -> float:
    """All 3^n assignments of one layer, with the rule of at least one expert at the widest and the second-widest."""
    choices = np.array(list(itertools.product(range(3), repeat=len(cost))))
    total = BITS[choices].sum(axis=1)
    fits = (total == budget) if exactly else (total <= budget)
    fits &= (choices == 2).any(axis=1) & (choices == 1).any(axis=1)
    return float(cost[np.arange(len(cost)), choices].sum(axis=1)[fits].min())


def by_pulp(cost: np.ndarray, budget: int, exactly: bool) -> float:
    problem = pulp.LpProblem("layer", pulp.LpMinimize)
    x = [[problem.add_variable(f"x{i}_{j}", cat=pulp.LpBinary) for j in range(3)] for i in range(len(cost))]
    problem += pulp.lpSum(float(cost[i, j]) * x[i][j] for i in range(len(cost)) for j in range(3))
    spent = pulp.lpSum(int(BITS[j]) * row[j] for row in x for j in range(3))
    problem += (spent == budget) if exactly else (spent <= budget)
    for row in x:
        problem += pulp.lpSum(row) == 1
    problem += pulp.lpSum(row[2] for row in x) >= 1
    problem += pulp.lpSum(row[1] for row in x) >= 1
    problem.solve(pulp.HiGHS(msg=False, gapRel=0))
    return float(pulp.value(problem.objective))


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_a_layer_against_brute_force_and_pulp(exactly: bool, ordered: bool) -> None:
    for seed in range(4):
        cost = pmq_cost(some_factors(1, seed=seed, ordered=ordered))[0]
        for budget in (11, 12, 16, 20, 23) if exactly else (11, 16, 30):
            choice = solve_layer(cost, np.tile(BITS, (8, 1)), budget, exactly=exactly)
            spent = BITS[choice].sum()
            assert spent == budget if exactly else spent <= budget
            assert {1, 2} <= set(choice.tolist())
            objective = cost[np.arange(8), choice].sum()
            assert objective == pytest.approx(brute_force(cost, budget, exactly), rel=1e-12)
            if seed == 0:
                assert objective == pytest.approx(by_pulp(cost, budget, exactly), rel=1e-6)


def test_a_layer_in_bytes_is_exact_too() -> None:
    rng = np.random.default_rng(5)
    cost, weight = (
        np.sort(rng.random((6, 3)))[:, ::-1],
        np.tile([1000, 1370, 1811], (6, 1)) * rng.integers(1, 3, (6, 1)),
    )
    budget = int(weight.min(axis=1).sum()) + 2500
    choices = np.array(list(itertools.product(range(3), repeat=6)))
    fits = weight[np.arange(6), choices].sum(axis=1) <= budget
    fits &= (choices == 2).any(axis=1) & (choices == 1).any(axis=1)
    best = cost[np.arange(6), choices].sum(axis=1)[fits].min()
    choice = solve_layer(cost, weight, budget, exactly=False)
    assert cost[np.arange(6), choice].sum() == pytest.approx(best)


def test_a_very_fine_price_list_is_never_exceeded() -> None:
    rng = np.random.default_rng(6)
    cost, weight = np.sort(rng.random((8, 3)))[:, ::-1], np.sort(rng.integers(10**8, 10**9, (8, 3)))
    budget = int(weight[:, 1].sum())
    choice = solve_layer(cost, weight, budget, exactly=False)
    assert weight[np.arange(8), choice].sum() <= budget


@pytest.mark.parametrize("budget", [10, 24])
def test_budgets_that_cannot_be(budget: int) -> None:
    cost = pmq_cost(some_factors(1))[0]
    with pytest.raises(UserError, match="no allocation meets the budget"):
        solve_layer(cost, np.tile(BITS, (8, 1)), budget, exactly=True)


def test_all_layers_at_once_against_brute_force() -> None:
    cost = pmq_cost(some_factors(2, 4, seed=7))
    flat = cost.reshape(8, 3)
    choices = np.array(list(itertools.product(range(3), repeat=8)))
    value = flat[np.arange(8), choices].sum(axis=1)
    for budget in (8, 13, 16, 24):
        best = value[BITS[choices].sum(axis=1) <= budget].min()
        choice = solve_all_layers(cost, BITS.tolist(), budget)
        assert np.take_along_axis(cost, choice[:, :, None], 2).sum() == pytest.approx(best)


def test_cost_by_hand() -> None:
    factors = Factors(np.array([[30.0, 10.0]]), np.array([[2.0, 6.0]]), np.array([[[5.0, 2.0], [7.0, 3.0]]]))
    paper = pmq_cost(factors, alpha=2.0, beta=1.5, gamma=2.0)
    assert paper[0, 0, 0] == pytest.approx(0.75**2 * 0.25**1.5 * 25)
    code = pmq_cost(factors, alpha=2.0, beta=1.5, gamma=9.0, variant="code")
    assert code[0, 1, 1] == pytest.approx(1000 * 0.25**2 * 0.75**1.5 * 3**2)


def test_factors_file(tmp_path: Path) -> None:
    factors = some_factors(4, seed=8)
    path = file_of(factors, tmp_path / "f.json")
    for kwargs in ({}, {"gamma": 2.0}, {"variant": "code"}, {"alpha": 2.0, "beta": 1.0}):
        layered = solve_factors(path, allocator="pmq", layer_bits=16, **kwargs)
        together = solve_factors(path, allocator="global", target_bits=2.0, **kwargs)
        uniform = solve_factors(path, allocator="uniform", target_bits=2.0, **kwargs)
        assert together["objective"] <= layered["objective"] * (1 + 1e-12)
        assert together["objective"] <= uniform["objective"]
        assert all(sum(row) == 16 for row in layered["bits"])
        assert together["average_bits"] <= 2.0
        names = {"alpha", "beta", "gamma"}
        cost = pmq_cost(factors, **{"alpha": 1.0, "beta": 1.5, "gamma": 1.0} | kwargs)  # type: ignore[arg-type]
        for answer in (layered, together):
            assert json.loads(json.dumps(answer)) == answer and names <= set(answer)
            again = sum(cost[i, e, b - 1] for i, row in enumerate(answer["bits"]) for e, b in enumerate(row))
            assert answer["objective"] == pytest.approx(again)
            assert sum(answer["objective_per_layer"]) == pytest.approx(again)
    # Each layer of the paper's variant is the optimum that brute force finds.
    layered = solve_factors(path, layer_bits=17)
    best = [brute_force(layer, 17, exactly=True) for layer in pmq_cost(factors)]
    assert layered["objective_per_layer"] == pytest.approx(best)


def test_layer_bits_count_per_eight_experts(tmp_path: Path) -> None:
    path = file_of(some_factors(2, 4), tmp_path / "f.json")
    answer = solve_factors(path, layer_bits=16)
    assert [sum(row) for row in answer["bits"]] == [8, 8]
    assert solve_factors(path, target_bits=2.0)["bits"] == answer["bits"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frequency": None}, "the keys frequency"),
        ({"frequency": [[1.0]]}, "do not fit together"),
        ({"routing_weight": "x"}, "ragged"),
        ({"frequency": [[0.0] * 8] * 3}, "no token reached"),
        ({"frequency": [[-1.0] * 8] * 3}, "negative"),
        ({"loss_at_2_3_bits": [1]}, "not a file of PMQ factors"),
    ],
)
def test_wrong_files(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = file_of(some_factors(), tmp_path / "f.json")
    record = {key: value for key, value in (json.loads(path.read_text()) | change).items() if value is not None}
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=words):
        solve_factors(path, layer_bits=16)


def test_wrong_calls(tmp_path: Path) -> None:
    path = file_of(some_factors(), tmp_path / "f.json")
    assert read_factors(path)[1] == [1, 2, 3]
    with pytest.raises(UserError, match="one budget"):
        solve_factors(path)
    with pytest.raises(UserError, match="one budget"):
        solve_factors(path, layer_bits=16, target_bits=2)
    with pytest.raises(UserError, match="uniform plan"):
        solve_factors(path, allocator="uniform", target_bits=2.5)
    with pytest.raises(UserError, match="no factors at"):
        solve_factors(tmp_path / "none.json", layer_bits=16)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not a file of PMQ factors"):
        solve_factors(tmp_path / "bad.json", layer_bits=16)
