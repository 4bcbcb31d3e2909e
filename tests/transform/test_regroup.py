"""Scores, searches, groups and alignment against brute force, and against experts whose relation is known."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from tiny import experts_of

from moecompress.calibrate.capture import Capture, route
from moecompress.errors import UserError
from moecompress.model.experts import layout_of
from moecompress.transform import align, drop, merge, outputs, scores
from moecompress.transform.methods import METHODS, Scene
from moecompress.transform.regroup import apply, dropping, merging
from moecompress.transform.routing import Combine, find_combine

T, E, K, D = 60, 6, 2, 16


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def routed_tokens() -> Capture:
    g = generator()
    logits = torch.randn(T, E, generator=g) + torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, -9.0])
    chosen, weights = Combine("softmax", True)(logits, K)
    keep = torch.rand(T, generator=g) > 0.2
    return Capture(torch.randn(T, D, generator=g), chosen, weights, keep, logits)


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_what_the_papers_define(routed_tokens: Capture) -> None:
    c, made = routed_tokens, torch.randn(E, T, D, generator=generator())
    routed = route(c, E)
    norms = torch.cat([made[e, routed.token[routed.of(e)]].norm(dim=-1) for e in range(E)])
    for e in range(E):
        mine = [(float(c.weights[t, j]), float(made[e, t].double().norm()))
                for t in range(T) for j in range(K) if c.keep[t] and c.chosen[t, j] == e]  # fmt: skip
        assert scores.frequency(routed)[e] == len(mine)
        assert float(scores.activation_norm(routed, norms)[e]) == pytest.approx(sum(n for _, n in mine), rel=1e-5)
        wanted = sum(g * n for g, n in mine) / len(mine) if mine else 0.0
        assert float(scores.reap(routed, norms)[e]) == pytest.approx(wanted, rel=1e-5)
    assert routed.counts[5] == 0, "the case without tokens should be among them"


def test_random_is_seeded() -> None:
    assert torch.equal(scores.random(E, 1), scores.random(E, 1))
    assert not torch.equal(scores.random(E, 1), scores.random(E, 2))


def test_best_keeps_the_protected_and_the_groups_even() -> None:
    values = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 0.0])
    assert drop.best(values, 4) == [0, 1, 2, 3]
    assert drop.best(values, 4, protected=[7]) == [0, 1, 2, 7]
    assert drop.best(values, 4, groups=2) == [0, 1, 5, 6]
    assert drop.best(values, 4, protected=[7], groups=2) == [0, 1, 6, 7]


# --- NAEE -----------------------------------------------------------------------------------------------------------


def loss_without(gone: tuple[int, ...], logits: np.ndarray, made: np.ndarray) -> float:
    """‖F' − F‖² in float64, token by token, from the definition: softmax, top 2, renormalised."""
    total = 0.0
    for t in range(len(logits)):
        sides = []
        for absent in (gone, ()):
            alive = [e for e in np.argsort(-logits[t]) if e not in absent][:K]
            p = np.exp(logits[t, alive])
            sides.append((p / p.sum()) @ made[alive, t])
        total += float(((sides[0] - sides[1]) ** 2).sum())
    return total


@pytest.fixture(scope="module")
def outputs_and_logits() -> tuple[torch.Tensor, torch.Tensor]:
    g = generator()
    return torch.randn(E, T, D, generator=g), torch.randn(T, E, generator=g)


@pytest.mark.parametrize(("count", "protected"), [(5, []), (4, []), (3, []), (3, [0, 1])])
def test_naee_is_the_best_of_all_subsets(outputs_and_logits, count: int, protected: list[int]) -> None:
    made, logits = outputs_and_logits
    kept = drop.naee(made, logits, Combine("softmax", True), K, count, protected)
    allowed = [e for e in range(E) if e not in protected]
    subsets = list(combinations(allowed, E - count))
    losses = [loss_without(gone, logits.double().numpy(), made.double().numpy()) for gone in subsets]
    wanted = subsets[int(np.argmin(losses))]
    assert len(losses) > 1
    assert kept == [e for e in range(E) if e not in wanted]


@pytest.mark.parametrize("seed", range(6))
def test_naee_goes_backward_greedily_when_subsets_are_many(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    made = torch.randn(E, T, D, generator=g)
    logits = torch.randn(T, E, generator=g) + torch.randn(E, generator=g)
    kept = drop.naee(made, logits, Combine("softmax", True), K, 3, most_subsets=0)
    gone: tuple[int, ...] = ()
    for _ in range(3):
        rest = [e for e in range(E) if e not in gone]
        gone = (*gone, min(rest, key=lambda e: loss_without((*gone, e), logits.double().numpy(), made.double().numpy())))
    assert kept == [e for e in range(E) if e not in gone]


# --- routing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Combine("softmax", True), Combine("softmax", False), Combine("sigmoid", True, 2.5),
                                  Combine("sigmoid", False, 1.0, 3 * torch.randn(E, generator=generator()))])  # fmt: skip
def test_the_rule_of_a_router_is_found(routed_tokens: Capture, rule: Combine) -> None:
    logits = routed_tokens.router_logits
    chosen, weights = rule(logits, K)
    biases = [] if rule.bias is None else [torch.zeros(E), rule.bias]
    found = find_combine(Capture(routed_tokens.hidden, chosen, weights, routed_tokens.keep, logits), biases)
    assert (found.score, found.normalise, found.bias is rule.bias) == (rule.score, rule.normalise, True)
    assert found.scale == pytest.approx(rule.scale, rel=1e-5)


@pytest.mark.parametrize("rule", [Combine("softmax", True), Combine("softmax", False), Combine("sigmoid", True, 2.5),
                                  Combine("sigmoid", False, 1.0, torch.tensor([0.1, 9.0, 0.0, 0.3, 8.0, 0.2]))])  # fmt: skip
def test_routing_without_experts_is_routing_among_the_others(rule: Combine) -> None:
    logits = torch.randn(T, E, generator=generator())
    kept = [0, 2, 3, 5]
    chosen, weights = rule(logits, K, without=[1, 4])
    bias = None if rule.bias is None else rule.bias[kept]
    among, wanted = Combine(rule.score, rule.normalise, rule.scale, bias)(logits[:, kept], K)
    assert torch.equal(chosen, torch.tensor(kept)[among])
    assert torch.allclose(weights, wanted)


def test_an_unknown_rule_is_refused(routed_tokens: Capture) -> None:
    c = routed_tokens
    other = Capture(c.hidden, c.chosen, torch.rand(T, K, generator=generator()), c.keep, c.router_logits)
    with pytest.raises(UserError, match="no rule"):
        find_combine(other)


# --- alignment ------------------------------------------------------------------------------------------------------


def permuted_copy(family: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A family's experts, of which 2 is 0 with its neurons in another order; and that order: new neuron i is old order[i]."""
    module = experts_of(family)
    layout = layout_of(module)
    order = torch.randperm(layout.width, generator=generator())
    weights = {name: tensor.detach().clone() for name, tensor in outputs.canonical(module, layout).items()}
    for name, axis in align.NEURON_AXIS.items():
        if name in weights:
            weights[name][2] = weights[name][0].index_select(axis - 1, order)
    if "down_bias" in weights:
        weights["down_bias"][2] = weights["down_bias"][0]
    with torch.no_grad():
        for name, tensor in outputs.stored(weights, layout).items():
            module._parameters[name].copy_(tensor)
    return module, order


FORMS = ["mixtral", "gpt_oss", "nemotron_h"]  # gated; interleaved, transposed, with biases; without a gate


@pytest.mark.parametrize("family", FORMS)
def test_alignment_recovers_a_planted_permutation(family: str) -> None:
    module, order = permuted_copy(family)
    layout = layout_of(module)
    weights = outputs.canonical(module, layout)
    assert torch.equal(align.by_weights(weights, 2, 0), order)
    x = torch.randn(40, layout.hidden, generator=generator())
    inner = torch.stack([outputs.inner(module, layout, x, e).detach() for e in range(4)])
    assert torch.equal(align.by_activations(weights, inner, 2, 0), order)
    noisy = {name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator()) for name, tensor in weights.items()}
    assert torch.equal(align.by_weights(noisy, 2, 0), order)


@pytest.mark.parametrize("family", FORMS)
@torch.no_grad()
def test_merging_permuted_copies_is_lossless(family: str) -> None:
    module, _ = permuted_copy(family)
    layout = layout_of(module)
    weights = outputs.canonical(module, layout)
    centroid = torch.tensor([0, 1, 0, 3])
    order = torch.arange(layout.width).repeat(4, 1)
    order[2] = align.by_weights(weights, 0, 2)
    merged = apply(merging(centroid, torch.tensor([3.0, 1.0, 1.0, 0.0]), order), weights)
    plain = apply(merging(centroid, torch.tensor([3.0, 1.0, 1.0, 0.0])), weights)
    for name, tensor in merged.items():
        assert torch.allclose(tensor, weights[name][[0, 1, 3]], atol=1e-7), name
        assert torch.equal(tensor[1:], weights[name][[1, 3]]), "an expert alone is copied"
    assert not torch.allclose(plain["up"][0], weights["up"][0], atol=1e-2), "without alignment it is lossy"


@pytest.mark.parametrize("family", FORMS)
@torch.no_grad()
def test_outputs_are_the_modules_own(family: str) -> None:
    module = experts_of(family)
    layout = layout_of(module)
    x = torch.randn(7, layout.hidden, generator=generator())
    for expert in range(4):
        own = module(x, torch.full((7, 1), expert), torch.ones(7, 1))
        assert torch.allclose(outputs.output(module, layout, x, expert), own, atol=1e-5)
    for name, tensor in outputs.stored(outputs.canonical(module, layout), layout).items():
        assert torch.equal(tensor, module._parameters[name])


# --- groups ---------------------------------------------------------------------------------------------------------


def test_m_smoe_joins_the_dominant_expert_with_the_most_similar_logits() -> None:
    a, b = torch.randn(2, T, generator=generator())
    noise = 0.1 * torch.randn(T, 4, generator=generator())
    logits = torch.stack([a, 5 * a, b, b], dim=1) + noise
    assert merge.by_router(torch.tensor([1, 9, 8, 2]), logits, 2).tolist() == [1, 1, 2, 2]


def test_hc_smoe_merges_what_computes_the_same() -> None:
    mean = torch.tensor([[0.0, 0], [10, 0], [0.1, 0], [10, 0.2], [0, 10]])
    usage = torch.tensor([1, 2, 3, 1, 0])
    assert merge.by_outputs(mean, usage, 3).tolist() == [2, 1, 2, 1, 4]
    same = torch.ones(5, 2)  # no distance tells them apart: still as many as asked for
    assert len(merge.by_outputs(same, usage, 3).unique()) == 3


def test_ream_groups_around_the_most_salient() -> None:
    mean = torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [0.1, 1], [1, 0.2]])
    logits = torch.zeros(T, 5)
    saliency = torch.tensor([5.0, 9, 1, 2, 3])
    assert merge.by_saliency(saliency, mean, logits, 2, size=3).tolist() == [0, 1, 0, 1, 1]  # 1 is first, and takes two
    assert merge.by_saliency(saliency, mean, logits, 2, size=2).tolist()[3] == 1


def test_shares_are_usage_and_equal_where_there_is_none() -> None:
    made = merging(torch.tensor([1, 1, 3, 3]), torch.tensor([1, 3, 0, 0]))
    assert made.target.tolist() == [0, 0, 1, 1] and made.keep.tolist() == [1, 3]
    assert made.share.tolist() == [0.25, 0.75, 0.5, 0.5]
    assert dropping([3, 1], 4).target.tolist() == [-1, 0, -1, 1]


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_method_keeps_as_many_as_asked(method: str) -> None:
    module = experts_of("mixtral")
    layout = layout_of(module)
    logits = torch.randn(T, 4, generator=generator())
    chosen, weights = Combine("softmax", True)(logits, K)
    hidden = torch.randn(T, layout.hidden, generator=generator())
    made = METHODS[method](Scene(module, layout, Capture(hidden, chosen, weights, torch.ones(T).bool(), logits), 3))
    assert len(made.keep) == 3 and made.target[made.keep].tolist() == [0, 1, 2]
    assert int((made.target < 0).sum()) == (0 if method in ("m-smoe", "hc-smoe", "ream") else 1)
