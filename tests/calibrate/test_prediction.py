"""Measured errors against the formula of an expert in double precision, and what is made of them."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import random_experts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moecompress.allocate.plan import Choice, Plan
from moecompress.calibrate.capture import Capture, route
from moecompress.calibrate.moments import expert_moments
from moecompress.calibrate.prediction import (
    compare,
    correction,
    decoded,
    output_errors,
    rank_correlation,
    sampled,
    tried,
)
from moecompress.calibrate.statistics import LayerStatistics, Statistics
from moecompress.model.experts import layout_of
from moecompress.pack.scheme import Scheme
from moecompress.quantize.encode import Settings, encode, expected_error, study

E, D, M, T, K = 6, 64, 64, 400, 2
SCHEMES = [Scheme(3, 32), Scheme(2.0, 0, code="trellis"), Scheme(16)]


@pytest.fixture(scope="module")
def experts() -> Qwen3MoeExperts:
    return random_experts(E, D, M, 0.1)


@pytest.fixture(scope="module")
def capture() -> Capture:
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)])  # the last expert is never chosen
    keep = torch.ones(T, dtype=torch.bool)
    keep[::7] = False
    return Capture(torch.randn(T, D, generator=generator), chosen, torch.rand(T, K, generator=generator), keep)


def expert(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    gate, up, down = (w[name].double() for name in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@torch.no_grad()
def test_output_errors_against_a_loop_in_double(experts, capture):
    layout, routed = layout_of(experts), route(capture, E)
    moments = next(expert_moments(experts, layout, capture, "g2", 1.0, E))
    weights = {name: stack[3] for name, stack in moments.weights.items()}
    other = {name: w + 0.02 * torch.randn(w.shape, generator=torch.Generator().manual_seed(2)) for name, w in weights.items()}
    found = output_errors(experts, layout, 3, capture.hidden, routed, weights, other)
    for name in weights:
        lost = mass = 0.0
        for t in range(T):
            for k in range(K):
                if capture.keep[t] and capture.chosen[t, k] == 3:
                    x, g = capture.hidden[t].double(), float(capture.weights[t, k])
                    off = expert(x, weights) - expert(x, {**weights, name: other[name]})
                    lost, mass = lost + g * g * float(off.square().sum()), mass + g * g
        assert found[name] == pytest.approx(lost / mass, rel=1e-4)


@torch.no_grad()
def test_trials_compare_rounded_matrices_with_what_was_expected(experts, capture):
    layout, routed, settings = layout_of(experts), route(capture, E), Settings(seed=4)
    moments = next(expert_moments(experts, layout, capture, "g2", 0.0, 3, sensitivity=True))
    names = [str(e) for e in moments.experts]
    inputs = {name: study(h, names, settings, SCHEMES) for name, h in moments.hessians.items()}
    expected = {name: expected_error(moments.weights[name], inputs[moments.source(name)], moments.row_weight[name], SCHEMES, settings)
                for name in layout.projections}  # fmt: skip
    ratio = tried(experts, layout, moments, 1, inputs, capture.hidden, routed, expected, SCHEMES, settings, {})
    assert ratio.shape == (1, 3, 3) and ratio[..., 2].isnan().all()  # nothing is lost at 16 bits
    # Down is linear, so what rounding reports is what running the expert shows.
    for c, scheme in enumerate(SCHEMES[:2]):
        found = encode(moments.weights["down"][1:2], inputs["inner"].take([1]), scheme, settings)
        whole = float((moments.weights["down"][1] @ moments.hessians["inner"][1] * moments.weights["down"][1]).sum())
        assert float(ratio[0, 2, c] * expected["down"][1, c]) == pytest.approx(float(found.error) * whole, rel=2e-3)
    assert (ratio[..., :2] > 0.2).all() and (ratio[..., :2] < 4).all()


def test_decoded_is_the_bank_s_own_matrix():
    weights = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))
    for scheme in (Scheme(3, 32), Scheme(2.0, 0, code="trellis"), Scheme(1.6, 0, code="ternary")):
        tensors = encode(weights, None, scheme, Settings(seed=5)).bank.tensors()
        matrix = decoded(scheme, {name: tensor[2:] for name, tensor in tensors.items()}, (32, 64), 5)
        assert float((matrix - weights[2]).square().mean()) < 0.3 < float((matrix - weights[1]).square().mean())


def test_sampled_are_the_busy_experts():
    chosen = torch.tensor([[0]] * 40 + [[1]] * 30 + [[2]] * 20 + [[3]] * 10 + [[4]] * 5 + [[5]] * 2)
    routed = route(Capture(torch.zeros(len(chosen), 4), chosen, torch.ones(len(chosen), 1), torch.ones(len(chosen), dtype=torch.bool)), 6)
    assert sampled(routed, 4) == [0, 1, 2] and sampled(routed, 2) == [0, 2] and sampled(routed, 0) == []


def test_correction_is_a_geometric_mean():
    ratios = torch.tensor([[[1.0, torch.nan]], [[4.0, torch.nan]]], dtype=torch.float64)
    assert torch.allclose(correction([ratios[:1], ratios[1:], ratios[:0]]), torch.tensor([[2.0, 1.0]], dtype=torch.float64))


def test_compare_names_what_is_off():
    harm = torch.ones(4, 1, 2, dtype=torch.float64) * torch.arange(1, 5)[:, None, None]
    square = torch.ones(4, dtype=torch.float64)
    statistics = Statistics(["a", "b"], ["up"], {7: LayerStatistics(torch.ones(4), square, square, harm, 9, 0.5)}, "", "")
    choices = [Choice(f"L07.E{e:03d}.up", "ab"[e % 2], 8, 8, 1, 0.0) for e in range(4)]
    plan = Plan("global", None, "expert", 4, ("a", "b"), tuple(choices))
    measured = {f"L07.E{e:03d}.up": (e + 1) / 1.05 * (1.1 if e % 2 == 0 else 2.0) for e in range(4)}
    found = compare(measured, plan, statistics)
    assert found["units"]["L07.E002.up"] == {"scheme": "a", "predicted": pytest.approx(3 / 1.05), "measured": measured["L07.E002.up"]}
    assert found["ratio"] == {"a": pytest.approx(1.1), "b": pytest.approx(2.0)} and found["off"] == ["b"]
    # 1, 2, 3, 4 against ranks 1, 3, 2, 4: 1 − 6 · (0 + 1 + 1 + 0) / (4 · 15)
    assert found["spearman"] == pytest.approx(0.8)
    assert rank_correlation([1, 2], [1, 2]) is None and rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_a_run_says_how_its_predictions_held(packed_tiny):
    record = json.loads((packed_tiny / "moecompress" / "manifest.json").read_text())["prediction"]
    plan = Plan.from_json((packed_tiny / "moecompress" / "plan.json").read_text())
    statistics = Statistics.load(packed_tiny / "moecompress")
    harm = {choice.unit: choice.harm for choice in plan.choices}
    assert len({unit.split(".")[0] for unit in record["units"]}) == 3
    for unit, row in record["units"].items():
        layer = statistics.layers[int(unit[1:3])]
        mass = layer.gate_square[int(unit[5:8])] + 0.05 * layer.gate_square.mean()
        assert row["predicted"] == pytest.approx(harm[unit] / float(mass) * layer.tokens / layer.sensitivity, rel=1e-6)
        assert 0.02 < row["measured"] / row["predicted"] < 50
