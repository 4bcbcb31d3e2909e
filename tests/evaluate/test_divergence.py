"""Divergences against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moecompress.evaluate.divergence import Divergence, bootstrap, jaccard, token_divergence


def test_tokens_against_the_definitions():
    torch.manual_seed(0)
    q, p, ids = torch.randn(2, 150, 11), torch.randn(2, 150, 11), torch.randint(0, 11, (2, 150))
    kl, agree, nll, reference_nll = token_divergence(q, p, ids)
    for b in range(2):
        for t in range(150):
            a, c = p[b, t].double().softmax(-1), q[b, t].double().softmax(-1)
            assert float(kl[b, t]) == pytest.approx(float((a * (a / c).log()).sum()), abs=1e-5)
            assert bool(agree[b, t]) == (int(p[b, t].argmax()) == int(q[b, t].argmax()))
    assert float(nll.mean()) == pytest.approx(
        float(F.cross_entropy(q[:, :-1].flatten(0, 1), ids[:, 1:].flatten())), abs=1e-5
    )
    assert float(reference_nll.mean()) == pytest.approx(
        float(F.cross_entropy(p[:, :-1].flatten(0, 1), ids[:, 1:].flatten())), abs=1e-5
    )
    assert nll.shape == (2, 149)


def test_jaccard():
    assert jaccard(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 4]])) == pytest.approx((1 + 1 / 3) / 2)


def test_summary_and_bootstrap():
    kl = torch.rand(20, 8)
    found = Divergence(
        kl, kl > 0.5, torch.full((20, 7), math.log(3.0)), torch.full((20, 7), math.log(2.0)), {0: 1.0, 1: 0.5}
    ).summary()
    assert found["perplexity"] == pytest.approx(3) and found["reference_perplexity"] == pytest.approx(2)
    assert found["router_agreement"] == 0.75
    low, high = found["kl_interval_95"]
    assert low < found["kl_mean"] < high
    assert bootstrap(torch.ones(5)) == (1.0, 1.0)
