"""Policies against loops over tokens, and what the experts compute with them against transformers' own eager loop."""

from __future__ import annotations

import pytest
import torch

from moecompress.runtime import seam
from moecompress.runtime.skipping import POLICIES, Rule, skip

WEIGHTS_ALONE = ["odp", "naee", "top-p", "modes"]


def loop(policy: str, weights: list[float], threshold: float, importance: float) -> list[bool]:
    """One token, as the docstring of its policy says it."""
    k = len(weights)
    first = max(range(k), key=lambda j: weights[j])
    if policy == "odp":
        return [w < threshold * weights[first] for w in weights]
    if policy == "naee":
        second = max(w for j, w in enumerate(weights) if j != first)
        return [j != first and second < threshold * weights[first] for j in range(k)]
    if policy == "top-p":
        kept, mass = set(), 0.0
        for j in sorted(range(k), key=lambda j: -weights[j]):
            if mass >= threshold * sum(weights):
                break
            kept.add(j)
            mass += weights[j]
        return [j not in kept for j in range(k)]
    return [importance * w < threshold for w in weights]


def some_weights(tokens: int, k: int) -> torch.Tensor:
    weights = torch.rand(tokens, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64) ** 3
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("policy", WEIGHTS_ALONE)
def test_policy_is_its_loop(policy: str, k: int) -> None:
    weights = some_weights(300, k)
    counts = []
    for threshold in (0.05, 0.3, 0.7):
        skipped = POLICIES[policy](weights, threshold, 1.6)
        assert skipped.tolist() == [loop(policy, row, threshold, 1.6) for row in weights.tolist()]
        counts.append(int(skipped.sum()))
    assert len(set(counts)) > 1 and max(counts) < 300 * k


@pytest.mark.parametrize("policy", ["odp", "naee", "top-p"])
def test_first_expert_always_computes(policy: str) -> None:
    weights = torch.cat([some_weights(50, 4), torch.full((1, 4), 0.25), torch.tensor([[0.0, 1.0, 0.0, 0.0]])])
    for threshold in (0.0, 1.0):
        assert not POLICIES[policy](weights, threshold, 1.0).all(-1).any()


@pytest.mark.parametrize("policy", WEIGHTS_ALONE)
def test_weights_of_the_rest(policy: str) -> None:
    weights, chosen = 2.5 * some_weights(100, 4), torch.arange(400).reshape(100, 4)
    skipped = POLICIES[policy](weights, 0.4, 1.0)
    rule = Rule(threshold=0.4, experts=4)
    for renormalise in (True, False):
        left, new = skip(policy, rule, renormalise, chosen, weights)
        assert torch.equal(left, torch.where(skipped, -1, chosen))
        for token in range(100):
            rest = [w for w, gone in zip(weights[token].tolist(), skipped[token].tolist(), strict=True) if not gone]
            scale = sum(weights[token].tolist()) / sum(rest) if renormalise and rest else 1.0
            expected = [0.0 if gone else w * scale for w, gone in zip(weights[token].tolist(), skipped[token].tolist(), strict=True)]
            assert new[token].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_skipped_leaves_every_bit(dtype: torch.dtype) -> None:
    weights, chosen = some_weights(1000, 8).to(dtype), torch.zeros(1000, 8, dtype=torch.long)
    left, new = skip("odp", Rule(threshold=0.0, experts=8), True, chosen, weights)
    assert torch.equal(new, weights) and torch.equal(left, chosen)




def test_rows_of_skipped_pairs_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices, x = torch.randn(5, 8, 8, generator=generator), torch.randn(40, 8, generator=generator)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(40)])
    chosen[torch.rand(40, 3, generator=generator) < 0.4] = -1
    chosen[7] = -1  # a token without any expert
    weights = torch.rand(40, 3, generator=generator).masked_fill(chosen < 0, 0)
    rows = []

    def compute(module, hidden, chosen, weights):
        rows.append(len(hidden))
        assert (chosen >= 0).all()
        return (torch.einsum("tkoi,ti->tko", matrices[chosen], hidden) * weights[..., None]).sum(1)

    monkeypatch.setattr(seam, "compute", compute)
    y = seam.compute_left(torch.nn.Identity(), x, chosen, weights)
    expected = torch.zeros(40, 8)
    for token in range(40):
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            if expert >= 0:
                expected[token] += weight * (matrices[expert] @ x[token])
    torch.testing.assert_close(y, expected)
    assert rows == [int((chosen >= 0).sum())]
    assert torch.equal(seam.compute_left(torch.nn.Identity(), x, torch.full_like(chosen, -1), weights), torch.zeros(40, 8))
    assert len(rows) == 1
