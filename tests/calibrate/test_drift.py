"""Drifts of expert inputs against loops in double precision."""

from __future__ import annotations

import pytest
import torch
from tiny import random_experts
from torch.nn.functional import silu

from moecompress.calibrate.capture import Capture
from moecompress.calibrate.moments import entering_down, expert_moments
from moecompress.calibrate.thinner import thinned
from moecompress.model.experts import layout_of, projections

E, D, M, T, K = 4, 12, 8, 60, 2


@pytest.fixture(scope="module")
def experts():
    return random_experts(E, D, M, 0.5)


@pytest.fixture(scope="module")
def streams():
    """What the experts are given now, and what the original's are; expert 3 is never chosen."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)])
    keep = torch.arange(T) % 7 > 0
    hidden = torch.randn(T, D, generator=generator)
    return Capture(hidden, chosen, torch.rand(T, K, generator=generator), keep), hidden + 0.3 * torch.randn(T, D, generator=generator)


def mean(capture: Capture, expert: int, now: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Σ g² now otherᵀ / Σ g² over the tokens of an expert, and how many they are."""
    total, mass, count = torch.zeros(now.shape[1], other.shape[1], dtype=torch.float64), 0.0, 0
    for t in range(T):
        for k in range(K):
            if capture.keep[t] and capture.chosen[t, k] == expert:
                g2 = float(capture.weights[t, k]) ** 2
                total += g2 * torch.outer(now[t].double(), other[t].double())
                mass, count = mass + g2, count + 1
    return total / mass, count


@pytest.mark.parametrize("prior", [0.0, 1.0])
@pytest.mark.parametrize("chunk", [1, 4])
def test_drifts_against_a_loop(experts, streams, prior, chunk):
    (capture, original), layout = streams, layout_of(experts)
    weights = {name: tensor.float() for name, tensor in projections(experts, layout).items()}
    rounded = {name: (4 * tensor).round() / 4 for name, tensor in weights.items()}
    for part in expert_moments(experts, layout, capture, "g2", prior, chunk, original=original):
        here = {name: tensor[part.experts] for name, tensor in rounded.items()}
        after = entering_down(experts, layout, capture, part, here, original, "g2", prior)
        assert after.hessians["input"] is part.hessians["input"] and set(after.drift) == {"input", "inner"}
        for i, e in enumerate(part.experts):
            if e == 3:
                assert not after.drift["input"][i].any() and not after.drift["inner"][i].any()
                continue
            x_off, count = mean(capture, e, capture.hidden, original - capture.hidden)
            now = silu(capture.hidden @ rounded["gate"][e].T) * (capture.hidden @ rounded["up"][e].T)
            before = silu(original @ weights["gate"][e].T) * (original @ weights["up"][e].T)
            a_off, _ = mean(capture, e, now, (before - now) @ weights["down"][e].T)
            share = {"input": count / (count + prior * D), "inner": count / (count + prior * M)}
            assert torch.allclose(after.drift["input"][i].double(), share["input"] * x_off, atol=1e-4)
            assert torch.allclose(after.drift["inner"][i].double(), share["inner"] * a_off, atol=1e-3)
            if prior == 0.0:
                assert torch.allclose(after.hessians["inner"][i].double(), mean(capture, e, now, now)[0], atol=1e-3)


def test_thinner_experts_lack_what_their_other_neurons_gave(experts, streams):
    (capture, original), layout = streams, layout_of(experts)
    weights = {name: tensor.float() for name, tensor in projections(experts, layout).items()}
    rounded = {name: (4 * tensor).round() / 4 for name, tensor in weights.items()}
    (part,) = expert_moments(experts, layout, capture, "g2", 0.0, E, sensitivity=True, original=original)
    thin, _ = next(thinned(part.take([0, 1, 2]), [M // 2], 0.01, "experts"))
    after = entering_down(experts, layout, capture, thin, {name: tensor[:3] for name, tensor in rounded.items()}, original, "g2", 0.0)
    for e in range(3):
        now = (silu(capture.hidden @ rounded["gate"][e].T) * (capture.hidden @ rounded["up"][e].T))[:, thin.keep[e]]
        before = silu(original @ weights["gate"][e].T) * (original @ weights["up"][e].T)
        lacking, _ = mean(capture, e, now, before @ weights["down"][e].T - now @ thin.weights["down"][e].T)
        assert torch.allclose(after.drift["inner"][e].double(), lacking, atol=1e-3)
        assert torch.allclose(after.hessians["inner"][e].double(), mean(capture, e, now, now)[0], atol=1e-3)
        assert torch.equal(after.drift["input"][e], part.drift["input"][e])


def test_no_drift_where_nothing_changed(experts, streams):
    (capture, _), layout = streams, layout_of(experts)
    weights = {name: tensor.float() for name, tensor in projections(experts, layout).items()}
    (part,) = expert_moments(experts, layout, capture, "g2", 1.0, E, original=capture.hidden)
    after = entering_down(experts, layout, capture, part, weights, capture.hidden, "g2", 1.0)
    assert not after.drift["input"].any() and not after.drift["inner"].any()
    for name, hessian in part.hessians.items():
        assert torch.equal(after.hessians[name], hessian)
