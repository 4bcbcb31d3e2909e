"""Refitting one expert to serve for several, against float64 and against experts that are the same function."""

from __future__ import annotations

import pytest
import torch
from tiny import experts_of

from moecompress.calibrate.capture import Capture, route
from moecompress.calibrate.merging import RIDGE, Group, members_of, merge
from moecompress.model.experts import DOWN, inner, layout_of, output, projections
from moecompress.transform import align
from moecompress.transform.outputs import canonical, stored
from moecompress.transform.regroup import NEURON_AXIS, apply, merging

T, E, D = 300, 4, 64


def capture() -> Capture:
    g = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(E - 1, generator=g)[:2] for _ in range(T)])  # nobody chose the last
    weights = torch.rand(T, 2, generator=g)
    return Capture(torch.randn(T, D, generator=g), chosen, weights, torch.rand(T, generator=g) > 0.1)


def pairs_of(c: Capture, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and weights of an expert, token by token."""
    found = [(t, j) for t in range(T) for j in range(2) if c.keep[t] and c.chosen[t, j] == expert]
    return torch.tensor([t for t, _ in found]).long(), torch.tensor([float(c.weights[t, j]) for t, j in found])


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
@torch.no_grad()
def test_the_same_function_merges_without_error(family: str) -> None:
    """Expert 1 is expert 0 with its neurons in another order: nothing is to be refitted, and the average of the two, lined up,
    is either of them."""
    module = experts_of(family)
    layout, c = layout_of(module), capture()
    order = torch.randperm(layout.width, generator=torch.Generator().manual_seed(2))
    weights = {name: tensor.clone() for name, tensor in canonical(module, layout).items()}
    for name, tensor in weights.items():
        tensor[1] = tensor[0].index_select(NEURON_AXIS[name] - 1, order) if name in NEURON_AXIS else tensor[0]
    for name, tensor in stored(weights, layout).items():
        module._parameters[name].data.copy_(tensor)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    whole = module(c.hidden, c.chosen, c.weights)
    into, share = torch.tensor([0, 0, 2, 3]), torch.ones(4)
    merge(module, layout, c, into, share)
    served = module(c.hidden, into[c.chosen], c.weights)
    assert float((served - whole).norm() / whole.norm()) < 1e-5
    group = Group.of(module, layout, c.hidden, route(c, E), [0, 1])
    torch.testing.assert_close(group.shares(projections(module, layout)[DOWN][0]), torch.ones(2).double(), rtol=1e-4, atol=0)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-5)
    line = torch.arange(layout.width).repeat(E, 1)
    line[1] = align.by_weights(weights, 0, 1)
    average = apply(merging(into, torch.tensor([3.0, 1, 1, 1]), line), weights)
    for name, tensor in average.items():
        torch.testing.assert_close(tensor[0], weights[name][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("tokens", [T, 12])  # more and fewer than neurons: both forms of the solution
@torch.no_grad()
def test_fit_against_float64(family: str, tokens: int) -> None:
    module = experts_of(family)
    layout, c = layout_of(module), capture()
    c.keep[tokens:] = False
    down = projections(module, layout)[DOWN][2].double()
    share = torch.tensor([1.0, 0.7, -0.2])
    members = [2, 0, 1]
    features, left, bias = [], [], module.down_proj_bias[2].double() if family == "gpt_oss" else torch.zeros(D).double()
    for factor, expert in zip(share.tolist(), members, strict=True):
        token, gate = pairs_of(c, expert)
        x = c.hidden[token]
        a = factor * gate[:, None].double() * inner(module, layout, x, 2).double()
        wanted = gate[:, None].double() * output(module, layout, x, expert).double()
        features.append(a)
        left.append(wanted - a @ down.T - factor * gate[:, None].double() * bias)
    a, y = torch.cat(features), torch.cat(left)
    ridge = RIDGE * float(a.square().sum()) / len(a)
    best = torch.linalg.solve(a.T @ a + ridge * torch.eye(layout.width).double(), a.T @ y).T

    def loss(change: torch.Tensor) -> float:
        return float((y - a @ change.T).square().sum() + ridge * change.square().sum())

    group = Group.of(module, layout, c.hidden, route(c, E), members)
    change = group.fitted(down, share).double() - down
    assert loss(change) == pytest.approx(loss(best), rel=1e-6) and loss(best) < 0.95 * loss(torch.zeros_like(best))
    torch.testing.assert_close(change, best, rtol=1e-3, atol=1e-4)
    shares = group.shares(down)
    for position, expert in enumerate(members[1:], 1):  # of a unit's output, by the derivative of the squared error
        token, gate = pairs_of(c, expert)
        got, wanted = (gate[:, None].double() * output(module, layout, c.hidden[token], e).double() for e in (2, expert))
        assert abs(float((got * (wanted - shares[position] * got)).sum())) < 1e-4 * float(got.square().sum())


@torch.no_grad()
def test_who_serves_nobody_and_whom_nobody_chose_stay_as_they_are() -> None:
    module = experts_of("qwen3_moe")
    layout, c = layout_of(module), capture()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert members_of(torch.tensor([1, 1, -1, 3])) == [[1, 0]]
    merge(module, layout, c, torch.tensor([0, 1, 2, 2]), torch.ones(4))  # the last has no tokens: nothing new to serve
    merge(module, layout, c, torch.tensor([0, -1, 2, 3]), torch.tensor([1.0, 0, 1, 1]))
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-6)
    down = projections(module, layout)[DOWN]
    assert (Group.of(module, layout, c.hidden, route(c, E), [3, 3]).fitted(down[3], torch.ones(2)) == down[3]).all()  # no tokens at all


@torch.no_grad()
def test_few_pairs_stand_for_all() -> None:
    """Each member's sample weighs what all of its tokens do: exactly, where all are alike."""
    module = experts_of("mixtral")
    layout, c = layout_of(module), capture()
    c.hidden[:], c.weights[:] = c.hidden[:1], 0.5
    few, every = (Group.of(module, layout, c.hidden, route(c, E), [0, 1, 2], most) for most in (90, 10_000))
    assert (few.member.bincount() == 30).all() and len(every.member) == sum(len(pairs_of(c, e)[0]) for e in range(3))
    for position in range(3):
        power = [float(group.wanted[group.member == position].square().sum()) for group in (few, every)]
        assert power[0] == pytest.approx(power[1], rel=1e-5)
