"""Routing tables and moments against loops and autograd."""

from __future__ import annotations

import pytest
import torch
from tiny import random_experts

from moecompress.calibrate.capture import Capture, route
from moecompress.calibrate.moments import chunk_size, expert_moments
from moecompress.model.experts import layout_of, parameters_from, projections

E, D, M, T, K = 5, 12, 8, 40, 2


@pytest.fixture
def experts():
    return random_experts(E, D, M, 0.5)


@pytest.fixture
def capture():
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)])  # expert 4 is never chosen
    keep = torch.ones(T, dtype=torch.bool)
    keep[::7] = False
    return Capture(torch.randn(T, D, generator=generator), chosen, torch.rand(T, K, generator=generator), keep)


def test_route_lists_every_kept_pair_once(capture):
    routed = route(capture, E)
    found = {(int(t), e) for e in range(E) for t in routed.token[routed.of(e)]}
    expected = {(t, int(e)) for t in range(T) if capture.keep[t] for e in capture.chosen[t]}
    assert found == expected and int(routed.counts.sum()) == len(expected) and routed.counts[4] == 0
    for e in range(E):
        for token, gate in zip(routed.token[routed.of(e)], routed.gate[routed.of(e)], strict=True):
            slot = capture.chosen[token].tolist().index(e)
            assert gate == capture.weights[token, slot]


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_hessians_against_a_loop_in_double(experts, capture, chunk):
    layout = layout_of(experts)
    found = list(expert_moments(experts, layout, capture, "g2", 0.0, chunk))
    assert [e for part in found for e in part.experts] == list(range(E))
    weights = projections(experts, layout)
    for part in found:
        for i, e in enumerate(part.experts):
            if e == 4:
                continue
            h_in, h_mid, mass = torch.zeros(D, D).double(), torch.zeros(M, M).double(), 0.0
            for t in range(T):
                for k in range(K):
                    if capture.keep[t] and capture.chosen[t, k] == e:
                        x, g2 = capture.hidden[t].double(), float(capture.weights[t, k]) ** 2
                        a = torch.nn.functional.silu(weights["gate"][e].double() @ x) * (weights["up"][e].double() @ x)
                        h_in += g2 * torch.outer(x, x)
                        h_mid += g2 * torch.outer(a, a)
                        mass += g2
            assert torch.allclose(part.hessians["input"][i].double(), h_in / mass, atol=1e-4)
            assert torch.allclose(part.hessians["inner"][i].double(), h_mid / mass, atol=1e-3)
            assert float(part.mass[i]) == pytest.approx(mass, rel=1e-4)


def test_unreached_expert_gets_the_pool_and_no_nan(experts, capture):
    (part,) = expert_moments(experts, layout_of(experts), capture, "g2", 1.0, E, sensitivity=True)
    kept = capture.hidden[capture.keep]
    assert torch.allclose(part.hessians["input"][4], kept.T @ kept / len(kept), atol=1e-4)
    for tensors in (part.hessians, part.row_weight):
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert part.hessians["inner"][4].diagonal().sum() > 0


def test_row_weights_predict_the_output_error_of_small_perturbations(experts, capture):
    """Against the real thing: perturb rows of gate or up at random, and measure the change of the expert's output."""
    layout = layout_of(experts)
    (part,) = expert_moments(experts, layout, capture, "g2", 0.0, E, sensitivity=True)
    routed, weights = route(capture, E), projections(experts, layout)
    generator = torch.Generator().manual_seed(2)
    for projection in ("gate", "up"):
        predicted, measured = 0.0, 0.0
        for e in range(4):
            x, g = capture.hidden[routed.token[routed.of(e)]], routed.gate[routed.of(e)]
            w = {name: tensor[e].clone() for name, tensor in weights.items()}

            def output(w, x=x):
                return (torch.nn.functional.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T

            clean = output(w)
            for _ in range(60):
                delta = 1e-3 * torch.randn(M, D, generator=generator)
                changed = output(w | {projection: w[projection] + delta})
                measured += float((g[:, None] ** 2 * (changed - clean) ** 2).sum())
                rows = ((delta @ part.hessians[part.source(projection)][e]) * delta).sum(-1)
                predicted += float((rows * part.row_weight[projection][e]).sum() * part.mass[e])
        assert predicted == pytest.approx(measured, rel=0.3)


def test_projections_and_parameters_are_inverse(experts):
    layout = layout_of(experts)
    again = parameters_from(projections(experts, layout), layout)
    assert all(torch.equal(again[name], getattr(experts, name)) for name in layout.parameters)


def test_chunks_fit_the_workspace(experts):
    layout = layout_of(experts)
    assert chunk_size(layout, 0) == 1 and chunk_size(layout, 10**12) == E
