"""The pieces of the split against brute force."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from moecompress.convert import split


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_balanced_assignment_is_the_cheapest(generator: torch.Generator) -> None:
    cost = torch.rand(6, 3, generator=generator)
    labels = split.balanced_assignment(cost)
    assert labels.bincount().tolist() == [2, 2, 2]
    best = min(sum(float(cost[row, e]) for row, e in enumerate(way)) for way in set(permutations([0, 0, 1, 1, 2, 2])))
    assert float(cost.gather(1, labels[:, None]).sum()) == pytest.approx(best)


def test_clusters_find_planted_groups(generator: torch.Generator) -> None:
    planted = torch.arange(24) % 4
    features = torch.eye(4)[planted] + 0.05 * torch.randn(24, 4, generator=generator)
    labels = split.balanced_clusters(torch.nn.functional.normalize(features, dim=1), 4, 3, generator)
    assert len(set(zip(planted.tolist(), labels.tolist(), strict=True))) == 4


def test_clusters_of_identical_neurons_are_balanced(generator: torch.Generator) -> None:
    labels = split.balanced_clusters(torch.ones(12, 5), 3, 2, generator)
    assert labels.bincount().tolist() == [4, 4, 4]


def test_shared_neurons_have_the_highest_energy() -> None:
    importance = torch.tensor([[1.0, 5.0, 0.0, 3.0], [1.0, 5.0, 9.0, 3.0]])
    shared, others = split.choose_shared(importance, 2)
    assert shared.tolist() == [2, 1] and others.tolist() == [3, 0]


def test_importance_is_the_norm_of_a_neurons_contribution(generator: torch.Generator) -> None:
    h, down = torch.randn(5, 7, generator=generator), torch.randn(3, 7, generator=generator)
    brute = torch.stack([torch.outer(h[:, n], down[:, n]).norm(dim=1) for n in range(7)], dim=1)
    torch.testing.assert_close(split.neuron_importance(h, down), brute)
    strength = split.expert_strength(brute[:, 1:], 2)
    torch.testing.assert_close(strength[:, 1], brute[:, 4:].square().sum(1).sqrt())


def test_foreseeable_rows_have_the_predictions_covariances(generator: torch.Generator) -> None:
    x = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    importance = (x @ torch.randn(4, 6, generator=generator, dtype=torch.float64)).abs()
    centred = x - x.mean(0)
    predictions = centred @ torch.linalg.lstsq(centred, importance - importance.mean(0)).solution  # (T, n)
    rows = split.foreseeable(x, importance, 0.0)
    torch.testing.assert_close(rows @ rows.T, predictions.T @ predictions / len(x))


def test_routing_recovers_a_linear_rule(generator: torch.Generator) -> None:
    x = torch.randn(500, 8, generator=generator)
    weight, bias = torch.randn(4, 8, generator=generator), torch.randn(4, generator=generator)
    strength = x @ weight.T + bias
    routing = split.fit_routing(x, strength, 1e-6)
    torch.testing.assert_close(routing.scores(x), strength, atol=1e-3, rtol=1e-3)
    assert routing.choose(x, 2).sum(1).eq(2).all()
    assert torch.equal(routing.choose(x, 1).argmax(1), strength.argmax(1))
    scale = routing.logit_scale(2.0**-8)
    assert 2.0**-9 < routing.largest * scale <= 2.0**-8


def test_an_expert_that_nothing_reaches_is_raised(generator: torch.Generator) -> None:
    x = torch.randn(1000, 8, generator=generator)
    weight = torch.randn(4, 8, generator=generator)
    routing = split.Routing(weight, torch.tensor([0.0, 0.0, 0.0, -99.0]), float((x @ weight.T).abs().max()))
    assert routing.choose(x, 2).mean(0)[3] == 0
    raised = split.reach_all(routing, x, 2, 0.05)
    assert raised.choose(x, 2).mean(0)[3] == pytest.approx(0.05, abs=0.002)
    assert torch.equal(raised.bias[:3], routing.bias[:3])


def test_refit_solves_the_normal_equations(generator: torch.Generator) -> None:
    h = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    mask = (torch.rand(200, 6, generator=generator) < 0.7).double()
    down = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    kept, target = h * mask, h @ down.T
    exact = split.refit_down(kept, target - kept @ down.T, down, 0.0)
    best = torch.linalg.lstsq(kept, target).solution.T
    torch.testing.assert_close(exact, best)
    held = split.refit_down(kept, target - kept @ down.T, down, 1e9)
    torch.testing.assert_close(held, down, atol=1e-6, rtol=1e-6)
