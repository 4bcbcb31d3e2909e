"""Moments of thinner experts: against the experts themselves, run on the tokens that chose them, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from moecompress.calibrate.capture import Capture, route
from moecompress.calibrate.moments import ExpertMoments, expert_moments
from moecompress.calibrate.thinner import by_width, sorted_bias, thinned, widened, widths_of
from moecompress.model.experts import DOWN, GATE, UP, ExpertsLayout, activate
from moecompress.quantize.neurons import greedy, greedy_many

E, D, M, T = 4, 24, 64, 600


class Experts(nn.Module):
    """Gated experts with biases, as a family's module would have them."""

    has_bias = True

    def __init__(self, concatenated: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.concatenated = concatenated
        self.gate_up_proj, self.down_proj = torch.randn(E, 2 * M, D) * 0.4, torch.randn(E, D, M) * 0.4
        self.gate_up_proj_bias, self.down_proj_bias = torch.randn(E, 2 * M), torch.randn(E, D)

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1) if self.concatenated else (both[..., ::2], both[..., 1::2])
        return nn.functional.silu(gate) * up


@pytest.fixture(params=[True, False])
def experts(request) -> Experts:
    return Experts(request.param)


def layout_of(experts: Experts) -> ExpertsLayout:
    return ExpertsLayout(E, D, M, False, experts.concatenated, True)


def capture() -> Capture:
    """Inputs of low rank, so that neurons can stand in for others."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, 8, generator=g) @ torch.randn(8, D, generator=g) / 3
    chosen = torch.rand(T, E, generator=g).topk(2).indices
    return Capture(hidden, chosen, torch.rand(T, 2, generator=g), torch.ones(T, dtype=torch.bool))


def moments_of(experts: Experts) -> ExpertMoments:
    (found,) = expert_moments(experts, layout_of(experts), capture(), "g2", 0.0, E, sensitivity=True)
    return found


def output(experts: Experts, expert: int, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """float64 [T, d] of an expert with these matrices, which have all neurons' places."""
    gate, up = (x.double() @ weights[p].double().T for p in (GATE, UP))
    inner = activate(experts, layout_of(experts), gate, up, expert)
    return inner @ weights[DOWN].double().T


def test_what_a_thinner_expert_loses(experts: Experts) -> None:
    layout, given = layout_of(experts), capture()
    moments, routed = moments_of(experts), route(given, E)
    last = torch.zeros(E, dtype=torch.float64)
    for width, (thin, loss) in zip((48, 32, 16), thinned(moments, [48, 32, 16], 0.01, "here"), strict=True):
        assert thin.experts == moments.experts and thin.keep.shape == (E, width)
        for position, expert in enumerate(thin.experts):
            pairs = routed.of(expert)
            x, omega = given.hidden[routed.token[pairs]], routed.gate[pairs].double().square()
            keep, own = thin.keep[position], {p: stack[position] for p, stack in thin.weights.items()}
            assert torch.equal(own[GATE], moments.weights[GATE][position][keep]) and own[DOWN].shape == (D, width)
            whole = output(experts, expert, {p: stack[position] for p, stack in moments.weights.items()}, x)
            off = (output(experts, expert, widened(own, keep, layout), x) - whole).square().sum(1)
            assert float(loss[position]) == pytest.approx(float((omega * off).sum() / omega.sum()), rel=1e-2)
            plain = moments.weights[DOWN][position].clone()  # without a refit of down
            plain[:, [n for n in range(M) if n not in keep.tolist()]] = 0
            bare = (output(experts, expert, {**{p: s[position] for p, s in moments.weights.items()}, DOWN: plain}, x) - whole).square().sum(1)
            assert float(loss[position]) < 0.7 * float((omega * bare).sum() / omega.sum())
            inner = moments.hessians["inner"][position]
            assert torch.equal(thin.hessians["inner"][position], inner[keep][:, keep])
        assert thin.hessians["input"] is moments.hessians["input"] and (loss > last).all()
        last = loss


def test_what_an_error_of_a_row_becomes(experts: Experts) -> None:
    """Row weights of gate and up follow the new down matrix."""
    moments = moments_of(experts)
    thin, _ = next(thinned(moments, [32], 0.01, "here"))
    for p in (GATE, UP):
        slope = moments.row_weight[p] / moments.weights[DOWN].square().sum(1)
        wanted = thin.weights[DOWN].square().sum(1) * torch.stack([row[keep] for row, keep in zip(slope, thin.keep, strict=True)])
        torch.testing.assert_close(thin.row_weight[p], wanted, rtol=1e-4, atol=0)
    assert torch.equal(thin.row_weight[DOWN], moments.row_weight[DOWN])


def test_chunks_by_width(experts: Experts) -> None:
    moments = moments_of(experts)
    found = list(by_width(iter([moments]), {1: 16, 3: 16, 2: 48}, 0.01, "here", False))
    assert [part.experts for part in found] == [[0], [1, 3], [2]]
    assert found[0].keep is None and found[1].keep.shape == (2, 16) and found[2].weights[UP].shape == (1, 48, D)
    alone = greedy(moments.weights[DOWN][[1, 3]], moments.hessians["inner"][[1, 3]], 16, 0.01, ["a", "b"])
    assert torch.equal(found[1].keep, alone)
    assert next(by_width(iter([moments]), {}, 0.01, "here", False)) is moments


def test_several_widths_in_one_go_are_nested() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 200, 40, generator=g) @ torch.randn(3, 40, 40, generator=g)
    down, inner = torch.randn(3, 7, 40, generator=g), a.transpose(1, 2) @ a / 200
    found = greedy_many(down, inner, [30, 20, 10], 0.01, ["a", "b", "c"])
    for wide, narrow in pairwise(found):
        assert all(set(narrow[e].tolist()) < set(wide[e].tolist()) for e in range(3))
    assert torch.equal(found[-1], greedy(down, inner, 10, 0.01, ["a", "b", "c"]))  # 30 to leave out: one at a time either way


def test_biases_follow_their_neurons(experts: Experts) -> None:
    layout = layout_of(experts)
    kept = {1: torch.tensor([3, 7, 50]), 2: torch.tensor([0, 63])}
    new = sorted_bias(experts.gate_up_proj_bias, layout, kept)

    def pair(bias: torch.Tensor) -> torch.Tensor:
        return torch.stack(bias.chunk(2) if experts.concatenated else (bias[::2], bias[1::2]), 1)  # (m, 2)

    for expert in range(E):
        old, moved = pair(experts.gate_up_proj_bias[expert]), pair(new[expert])
        first = kept.get(expert, torch.arange(M))
        assert torch.equal(moved[: len(first)], old[first])
        assert sorted(map(tuple, moved.tolist())) == sorted(map(tuple, old.tolist()))
    up = sorted_bias(experts.gate_up_proj_bias[:, :M], ExpertsLayout(E, D, M, False, True, False), kept)
    assert torch.equal(up[1, :3], experts.gate_up_proj_bias[1, [3, 7, 50]])


@pytest.mark.parametrize(("width", "wanted"), [(256, [192, 128, 64]), (768, [576, 384, 192]), (40, [32, 16]), (32, [16]), (16, []), (8, [])])
def test_widths_suit_the_codes(width: int, wanted: list[int]) -> None:
    assert widths_of(ExpertsLayout(E, D, width, False, True, True)) == wanted
