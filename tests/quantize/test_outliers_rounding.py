"""Rounding with outliers: which weights they are, what they are worth, and that the rest is rounded as if they were not there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moecompress.kernels import rounding
from moecompress.pack import outliers as form
from moecompress.pack.scheme import Scheme
from moecompress.quantize import gptq, outliers
from moecompress.quantize.encode import Settings, encode, expected_error, study
from moecompress.quantize.grid import fit


def heavy(experts: int = 2, rows: int = 24, cols: int = 320, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with heavy tails [E, o, i] and correlated inputs' second moments [E, i, i]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(experts, 600, cols, generator=generator) @ (torch.eye(cols) + 0.05 * torch.randn(cols, cols, generator=generator))
    x = x * torch.rand(cols, generator=generator).mul(3).exp()
    weights = torch.randn(experts, rows, cols, generator=generator)
    return weights * (1 + 6 * (torch.rand(weights.shape, generator=generator) < 0.01)), x.transpose(1, 2) @ x / 600


def studied(hessian: torch.Tensor, settings: Settings = Settings()):
    return study(hessian, [str(i) for i in range(len(hessian))], settings, [Scheme(2, 64)])


def test_the_costliest_of_every_segment_are_chosen():
    weights, hessian = heavy()
    cost = hessian.diagonal(dim1=-2, dim2=-1)
    index = outliers.choose(weights, cost, Scheme(2, 64, False, outliers=0.02))
    grid = fit(weights, cost, 2, 64, False)
    lost = ((weights - gptq.values(gptq.rtn(weights, grid), grid)).square() * cost[:, None]).double()
    assert form.counts(320, 0.02) == [5, 1] and index.shape == (2, 24, 6)
    for expert in range(2):
        for row in range(24):
            line = lost[expert, row].tolist()
            best = sorted(range(256), key=lambda c, line=line: -line[c])[:5] + sorted(range(256, 320), key=lambda c, line=line: -line[c])[:1]
            assert set(index[expert, row].tolist()) == set(best)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_rest_has_the_grid_it_would_have_alone(symmetric):
    """Where a whole group is outliers but for its first columns, the grid is that of these columns."""
    weights, hessian = heavy()
    importance = hessian.diagonal(dim1=-2, dim2=-1).contiguous()
    exact = torch.zeros(weights.shape, dtype=torch.bool)
    exact[:, 3, 40:64] = True
    found = outliers.fit_rest(weights, importance, exact, Scheme(3, 64, symmetric))
    same = fit(weights, importance, 3, 64, symmetric)
    alone = fit(weights[:, 3:4, :40], importance[:, :40], 3, 0, symmetric)
    others = torch.arange(24) != 3
    assert torch.equal(found.scales()[:, others], same.scales()[:, others])
    assert torch.allclose(found.scales()[:, 3, 0], alone.scales()[:, 0, 0], rtol=0.02)


def test_feedback_loses_nothing_at_outliers_with_and_without_the_library(monkeypatch):
    weights, hessian = heavy()
    inputs, grid = studied(hessian), fit(weights, hessian.diagonal(dim1=-2, dim2=-1), 2, 64, False)
    exact = torch.rand(weights.shape) < 0.02
    monkeypatch.setattr(rounding, "available", lambda: False)
    plain = gptq.gptq(weights, inputs.upper, inputs.order, grid, exact)
    assert (plain != gptq.gptq(weights, inputs.upper, inputs.order, grid)).any()
    everywhere = gptq.gptq(weights, inputs.upper, inputs.order, grid, torch.ones_like(exact))
    assert torch.equal(everywhere, gptq.rtn(weights, grid))  # no errors, so no feedback
    monkeypatch.undo()
    if not rounding.available():
        pytest.skip("the compiled library is not there")
    native = gptq.gptq(weights, inputs.upper, inputs.order, grid, exact)
    assert (native != plain).float().mean() < 2e-3  # rounding of sums may tip a code
    with pytest.raises(ValueError, match="exact"):
        gptq.gptq(weights, inputs.upper, inputs.order, grid, exact[:, 1:])


def test_values_are_the_least_squares_solution():
    off, hessian = heavy(rows=3)
    index = torch.stack([torch.randperm(320)[:7].sort().values for _ in range(6)]).view(2, 3, 7)
    values = outliers.solve(off, hessian, index)
    for expert in range(2):
        half = torch.linalg.cholesky(hessian[expert].double())  # H = L Lᵀ: the error is the squared length of R L
        for row in range(3):
            at = index[expert, row]
            exact = torch.linalg.lstsq(half[at].T, off[expert, row].double() @ half).solution
            assert torch.allclose(values[expert, row].double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("name", ["b2g64a_o1", "b2g64s_o2", "b3g0a_o0_5", "b4g128s_o1"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_outliers_help_where_tails_are_heavy_and_the_error_is_the_true_one(name, method):
    weights, hessian = heavy()
    scheme, settings = Scheme.parse(name), Settings(method=method)
    inputs = studied(hessian, settings)
    encoded = encode(weights, inputs, scheme, settings)
    without = encode(weights, inputs, replace(scheme, outliers=0.0), settings)
    lost, whole = ((w @ hessian.double() * w).sum((1, 2)) for w in ((weights - form.dequantize(encoded.bank)).double(), weights.double()))
    assert torch.allclose(encoded.error.double(), lost / whole, rtol=1e-3)
    assert (encoded.error < 0.85 * without.error).all()
    assert torch.isfinite(encode(weights, None, scheme, settings).error).all()


def test_prediction_is_near_what_comes_out():
    weights, hessian = heavy()
    schemes = [Scheme.parse(name) for name in ("b2g64a", "b2g64a_o1", "b3g64a", "b3g64a_o1")]
    inputs = studied(hessian)
    predicted = expected_error(weights, inputs, torch.ones(2, 24), schemes, Settings())
    whole = torch.einsum("noi,nij,noj->n", weights, hessian, weights).double()
    found = torch.stack([encode(weights, inputs, scheme, Settings()).error.double() for scheme in schemes], 1) * whole[:, None]
    ratio = predicted / found
    assert (ratio > 0.7).all() and (ratio < 2).all(), ratio
    assert (predicted[:, 1] < predicted[:, 0]).all() and (predicted[:, 3] < predicted[:, 2]).all()
