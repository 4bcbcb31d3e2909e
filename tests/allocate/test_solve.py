from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from moecompress.allocate.solve import merge_units, minimum_bytes, solve_lagrangian, solve_milp
from moecompress.errors import UserError


def brute_force(price: np.ndarray, harm: np.ndarray, budget: int) -> float:
    units = range(len(price))
    return min(
        sum(harm[u, c] for u, c in zip(units, choice, strict=True))
        for choice in itertools.product(range(price.shape[1]), repeat=len(price))
        if sum(price[u, c] for u, c in zip(units, choice, strict=True)) <= budget
    )


def small_instance(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Up to six units; every second one with prices and harms that make sense, the others without any order."""
    rng = np.random.default_rng(seed)
    units, candidates = rng.integers(1, 7), rng.integers(1, 5)
    price = rng.integers(1, 100, (units, candidates))
    harm = rng.random((units, candidates)) * np.exp(rng.normal(0, 1, (units, 1)))
    if seed % 2:
        price = np.tile(np.sort(price[0]), (units, 1))
        harm = np.sort(harm, axis=1)[:, ::-1]
    forbidden = rng.random(harm.shape) < 0.1
    forbidden[:, rng.integers(candidates)] = False
    harm = np.where(forbidden, np.inf, harm)
    budget = rng.integers(minimum_bytes(price, harm), price.max(axis=1).sum() + 1)
    return price, harm, int(budget)


def test_lagrangian_against_brute_force() -> None:
    ratios = []
    for seed in range(200):
        price, harm, budget = small_instance(seed)
        best = brute_force(price, harm, budget)
        found = solve_lagrangian(price, harm, budget)
        rows = np.arange(len(price))
        assert found.bytes == price[rows, found.choice].sum() <= budget
        assert found.harm == pytest.approx(harm[rows, found.choice].sum())
        assert found.lower_bound <= best * (1 + 1e-9) <= found.harm * (1 + 2e-9)
        assert found.harm - found.gap * found.harm == pytest.approx(found.lower_bound)
        ratios.append(found.harm / best)
    # Not exact on tiny instances, but nearly always.
    assert np.mean(np.array(ratios) > 1 + 1e-9) < 0.03 and max(ratios) < 1.3


@pytest.mark.filterwarnings("ignore:PULP_CBC_CMD is deprecated")
@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_milp_against_brute_force(backend: str) -> None:
    for seed in range(25):
        price, harm, budget = small_instance(seed)
        found = solve_milp(price, harm, budget, gap=0.0, backend=backend)  # type: ignore[arg-type]
        assert found.bytes <= budget
        assert found.harm == pytest.approx(brute_force(price, harm, budget), rel=1e-7)
        assert found.lower_bound <= found.harm


def model_instance(layers: int, experts: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gate, up and down matrices with prices of the format and harms that fall roughly fourfold a bit."""
    rng = np.random.default_rng(seed)
    units = layers * experts * 3
    gate, down = [419328, 615936, 812544, 1600512, 3145728], [421888, 618496, 815104, 1601536, 3145728]
    price = np.array([gate, gate, down] * (layers * experts))
    fall = np.array([0.12, 0.035, 0.01, 4e-5, 0.0])
    return price, np.exp(rng.normal(0, 2, (units, 1))) * fall * np.exp(rng.normal(0, 0.3, (units, 5)))


def test_lagrangian_and_milp_agree_on_a_larger_instance() -> None:
    price, harm = model_instance(4, 16, seed=0)
    for bits in (2.4, 3.1, 4.7):
        budget = int(len(price) * 768 * 2048 * bits / 8)
        quick = solve_lagrangian(price, harm, budget)
        slow = solve_milp(price, harm, budget, gap=1e-6, time_limit_s=3)
        assert 0.995 * budget <= quick.bytes <= budget and slow.bytes <= budget
        assert slow.lower_bound <= slow.harm <= quick.harm <= slow.harm * 1.005
        assert slow.gap <= quick.gap


def test_lagrangian_takes_less_than_a_second_for_a_large_model() -> None:
    price, harm = model_instance(48, 128, seed=1)
    budget = int(len(price) * 768 * 2048 * 3 / 8)
    seconds = []
    for _ in range(3):  # the machine may be busy
        start = time.perf_counter()
        found = solve_lagrangian(price, harm, budget)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0
    assert 0.995 * budget <= found.bytes <= budget and found.gap < 1e-3


def test_all_the_budget_in_the_world_and_none() -> None:
    price, harm = model_instance(1, 4, seed=2)
    rich = solve_lagrangian(price, harm, int(price.max(axis=1).sum()))
    assert (rich.choice == 4).all() and rich.harm == rich.gap == 0.0
    least = minimum_bytes(price, harm)
    assert (solve_lagrangian(price, harm, least).choice == 0).all()
    with pytest.raises(UserError, match=f"at least {least:,} bytes"):
        solve_lagrangian(price, harm, least - 1)


def test_what_is_not_allowed_is_not_chosen() -> None:
    price = np.array([[1, 2, 3], [1, 2, 3]])
    harm = np.array([[np.inf, 5.0, np.inf], [9.0, np.inf, 1.0]])
    assert solve_lagrangian(price, harm, 4).choice.tolist() == [1, 0]
    assert solve_lagrangian(price, harm, 5).choice.tolist() == [1, 2]
    with pytest.raises(UserError, match="no candidate that is allowed"):
        solve_lagrangian(price, np.full((2, 3), np.inf), 9)
    with pytest.raises(ValueError, match="must be a number"):
        solve_lagrangian(price, np.full((2, 3), np.nan), 9)


def test_a_wider_candidate_that_harms_more_is_left_alone() -> None:
    price, harm = np.array([[1, 2, 3]]), np.array([[4.0, 6.0, 4.0]])
    assert solve_lagrangian(price, harm, 3).choice.tolist() == [0]


def test_straight_hulls_keep_the_order_of_their_steps() -> None:
    rng = np.random.default_rng(4)
    price = np.sort(rng.integers(1, 10**6, (50, 6)), axis=1)
    harm = rng.random((50, 1)) * (2 * 10**6 - price) / 3.0  # on a line, up to rounding
    least, most = int(price[:, 0].sum()), int(price[:, -1].sum())
    for budget in rng.integers(least, most, 20):
        found = solve_lagrangian(price, harm, int(budget))
        assert found.bytes <= budget and found.lower_bound <= found.harm
        assert found.harm == pytest.approx(found.lower_bound, rel=1e-2)


def test_merged_units_share_their_choice() -> None:
    rng = np.random.default_rng(3)
    price, harm = rng.integers(1, 50, (6, 3)), rng.random((6, 3))
    harm[4, 0] = np.inf
    group_of_unit = np.array([0, 1, 0, 2, 2, 1])
    merged_price, merged_harm = merge_units(price, harm, group_of_unit)
    assert merged_price[0].tolist() == (price[0] + price[2]).tolist()
    assert merged_harm[2, 0] == np.inf
    tied = solve_milp(merged_price, merged_harm, 150, gap=0.0)
    free = solve_milp(price, harm, 150, gap=0.0)
    assert tied.harm >= free.harm
    assert harm[np.arange(6), tied.choice[group_of_unit]].sum() == pytest.approx(tied.harm)
