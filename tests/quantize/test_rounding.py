"""GPTQ, descent, refit and scale search against plain double-precision versions written here, and native against torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from plain import plain_gptq

from moecompress.errors import UserError
from moecompress.kernels import rounding
from moecompress.pack.scheme import Scheme
from moecompress.quantize import gptq
from moecompress.quantize.encode import Settings, encode, expected_error, permuted, processing_order, study
from moecompress.quantize.grid import Grid, fit, nearest
from moecompress.quantize.hessian import factor, moment, shrink


def problem(experts=3, rows=20, cols=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) * torch.logspace(0, -1, cols)
    x = torch.randn(experts, 300, cols, generator=generator) @ mix
    return torch.randn(experts, rows, cols, generator=generator), x.transpose(1, 2) @ x / 300


def plain_codes(weights, hessian, damping, order, grid):
    scale, zero = (t.double() for t in grid.by_column())

    def choose(e, r, j, weight):
        code = nearest(weight, scale[e, r, j], zero[e, r, j], grid.bits)
        return code, scale[e, r, j] * (code - zero[e, r, j])

    return plain_gptq(weights, hessian, damping, order, choose)


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(2, 32, True), (3, 0, False), (4, 32, False), (8, 32, True)])
@pytest.mark.parametrize("native", [True, False])
def test_gptq_is_the_textbook_one(monkeypatch, native, bits, group, symmetric, order):
    if native and not rounding.available():
        pytest.skip("the compiled library is not there")
    weights, hessian = problem(experts=2, rows=9, cols=37)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    grid = fit(weights, diagonal, bits, group, symmetric)
    columns = processing_order(diagonal, order)
    upper, fallen = factor(permuted(hessian, columns), 0.01, ["a", "b"])
    monkeypatch.setattr(rounding, "available", lambda: native)
    found = gptq.gptq(weights, upper, columns, grid)
    expected = plain_codes(weights, hessian, 0.01, columns, grid)
    # A weight half-way between two codes may fall either way in float32; everything after it then differs too.
    assert (found == expected).all(-1).double().mean() >= (0.95 if bits < 8 else 0.75)
    assert not fallen


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 8, 32), (3, 9, 31), (2, 17, 130), (1, 5, 257)])
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(2, 32, True), (2, 0, False), (3, 64, False), (4, 128, True)])
def test_native_and_torch_agree(monkeypatch, shape, bits, group, symmetric):
    if not rounding.available():
        pytest.skip("the compiled library is not there")
    weights, hessian = problem(*shape)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    results = []
    for native in (True, False):
        monkeypatch.setattr(rounding, "available", lambda native=native: native)
        grid = fit(weights, diagonal, bits, group, symmetric)
        order = processing_order(diagonal, "activation")
        upper, _ = factor(permuted(hessian, order), 0.01, ["x"] * shape[0])
        codes = gptq.gptq(weights, upper, order, grid)
        lowered = gptq.descend(weights, hessian, codes, grid)
        results.append((grid, codes, lowered))
    (grid, codes, lowered), (grid_, codes_, lowered_) = results
    assert torch.allclose(grid.scales(), grid_.scales(), rtol=0.02)
    assert (codes == codes_).double().mean() > 0.97
    errors = [
        gptq.row_errors(weights, hessian, gptq.values(c, g)).sum() for c, g in ((lowered, grid), (lowered_, grid_))
    ]
    assert errors[0] == pytest.approx(float(errors[1]), rel=0.03)


@pytest.mark.parametrize("native", [True, False])
def test_descent_and_refit_never_raise_the_error(monkeypatch, native):
    if native and not rounding.available():
        pytest.skip("the compiled library is not there")
    monkeypatch.setattr(rounding, "available", lambda: native)
    weights, hessian = problem(cols=70)
    grid = fit(weights, hessian.diagonal(dim1=-2, dim2=-1), 2, 32, True)
    codes = gptq.rtn(weights, grid)
    last = gptq.row_errors(weights, hessian, gptq.values(codes, grid))
    first = last.sum()
    for _ in range(3):
        grid = gptq.refit(weights @ hessian, hessian, codes, grid)
        now = gptq.row_errors(weights, hessian, gptq.values(codes, grid))
        assert (now <= last * 1.0001).all()
        codes = gptq.descend(weights, hessian, codes, grid)
        last = gptq.row_errors(weights, hessian, gptq.values(codes, grid))
        assert (last <= now * 1.0001).all()
    assert last.sum() < 0.5 * first


@pytest.mark.parametrize(("cols", "group"), [(70, 32), (128, 64), (31, 0), (33, 32)])
def test_native_refit_is_torch_refit(monkeypatch, cols, group):
    if not rounding.available():
        pytest.skip("the compiled library is not there")
    weights, hessian = problem(cols=cols)
    grid = fit(weights, hessian.diagonal(dim1=-2, dim2=-1), 3, group, False)
    codes = gptq.rtn(weights, grid)
    found = gptq.refit(weights @ hessian, hessian, codes, grid)
    monkeypatch.setattr(rounding, "available", lambda: False)
    expected = gptq.refit(weights @ hessian, hessian, codes, grid)
    assert not torch.equal(found.scales(), grid.scales())
    assert (found.scales() == expected.scales()).double().mean() > 0.97  # the rest: ties of rounding
    assert torch.allclose(found.scales(), expected.scales(), rtol=0.02)


def test_descent_ends_where_no_single_code_can_improve():
    weights, hessian = problem(experts=1, rows=3, cols=12)
    grid = fit(weights, hessian.diagonal(dim1=-2, dim2=-1), 2, 0, True)
    codes = gptq.rtn(weights, grid)
    for _ in range(20):
        codes = gptq.descend(weights, hessian, codes, grid)
    best = gptq.row_errors(weights, hessian, gptq.values(codes, grid))
    for row, column, code in itertools.product(range(3), range(12), range(4)):
        other = codes.clone()
        other[0, row, column] = code
        assert gptq.row_errors(weights, hessian, gptq.values(other, grid))[0, row] >= best[0, row] - 1e-4


@pytest.mark.parametrize("symmetric", [True, False])
def test_scale_search_beats_every_scale_of_a_fine_sweep(symmetric):
    weights, _ = problem(experts=1, rows=6, cols=32, seed=3)
    importance = torch.rand(1, 32) + 0.1
    grid = fit(weights, importance, 2, 0, symmetric)
    zero = grid.offsets().expand(1, 6, 1)

    def error(scale):
        return (importance[:, None] * (scale * (nearest(weights, scale, zero, 2) - zero) - weights) ** 2).sum(-1)

    full = weights.abs().amax(-1, keepdim=True)
    sweep = torch.stack([error(full * f) for f in torch.linspace(0.2, 1.5, 400)]).amin(0)
    assert (error(grid.scales()) <= 1.06 * sweep).all()


def test_gaussian_distortion_at_two_and_three_bits():
    """Close to the best uniform quantizers of a unit Gaussian: 0.1188 and 0.0374 (Max, 1960)."""
    weights = torch.randn(1, 64, 4096, generator=torch.Generator().manual_seed(0))
    for bits, best in ((2, 0.1188), (3, 0.0374)):
        grid = fit(weights, torch.ones(1, 4096), bits, 0, True)
        assert float((gptq.values(gptq.rtn(weights, grid), grid) - weights).square().mean()) == pytest.approx(
            best, rel=0.03
        )


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_expected_error_ranks_and_predicts_what_rounding_does(method):
    weights, hessian = problem(experts=6, rows=40, cols=64, seed=5)
    weights = weights * torch.logspace(-1, 1, 6)[:, None, None]
    settings = Settings(method=method)
    schemes = [Scheme(2, 32), Scheme(3, 32), Scheme(4, 32), Scheme(16)]
    names = list("abcdef")
    inputs = study(hessian, names, settings)
    predicted = expected_error(weights, inputs, torch.ones(6, 40), schemes, settings)
    for c, scheme in enumerate(schemes[:3]):
        encoded = encode(weights, inputs, scheme, settings)
        whole = gptq.row_errors(weights, hessian, torch.zeros(())).sum(-1)
        ratio = (encoded.error * whole).double() / predicted[:, c]
        assert float(ratio.min()) > 0.65 and float(ratio.max()) < 1.5 and float(ratio.max() / ratio.min()) < 1.35
    assert (predicted[:, 3] == 0).all()


def test_encode_stores_what_it_measured():
    weights, hessian = problem()
    from moecompress.pack.int_format import dequantize

    for method in ("gptq", "rtn"):
        encoded = encode(weights, study(hessian, list("abc"), Settings()), Scheme(3, 32), Settings(method=method))
        stored = dequantize(encoded.bank)
        error = gptq.row_errors(weights, hessian, stored).sum(-1)
        error = error / gptq.row_errors(weights, hessian, torch.zeros(())).sum(-1)
        assert torch.allclose(error, encoded.error, rtol=1e-3)


def test_all_zero_and_constant_matrices_survive():
    weights = torch.zeros(2, 4, 32)
    weights[1] = 0.5
    hessian = torch.zeros(2, 32, 32)
    hessian[1] = torch.eye(32)
    for scheme in (Scheme(2, 32), Scheme(4, 0, False)):
        encoded = encode(weights, study(hessian, ["zero", "constant"], Settings()), scheme, Settings())
        from moecompress.pack.int_format import dequantize

        stored = dequantize(encoded.bank)
        assert torch.isfinite(stored).all()
        assert stored[0].abs().max() < 1e-6
        assert torch.allclose(stored[1], weights[1], rtol=0.02)


def test_failed_factorisation_names_the_expert_unless_fallback_is_allowed():
    broken = (100 * torch.ones(8, 8) - 99 * torch.eye(8))[None]  # indefinite by far
    with pytest.raises(UserError, match=r"layers\.3\.experts\.5"):
        factor(broken, 0.01, ["layers.3.experts.5"])
    upper, fallen = factor(broken, 0.01, ["layers.3.experts.5"], allow_fallback=True)
    assert fallen == ["layers.3.experts.5"] and torch.equal(upper[0], torch.eye(8))
    weights = torch.randn(1, 4, 8)
    inputs = study(broken, ["layers.3.experts.5"], Settings(allow_fallback=True))
    encoded = encode(weights, inputs, Scheme(4, 0), Settings(allow_fallback=True))
    assert inputs.fallen.all() and torch.isfinite(encoded.error).all()


def test_damping_is_raised_before_giving_up():
    h = torch.ones(8, 8)  # rank one: needs damping, and gets it
    upper, fallen = factor(h[None], 1e-7, ["x"])
    assert not fallen and torch.isfinite(upper).all()


def test_shrinking_toward_the_pool():
    own, pool = moment(torch.randn(5, 4)), torch.eye(4)
    assert torch.equal(shrink(own, 0.0, 0, pool, 10), pool)
    mixed = shrink(own, 5.0, 5, pool, 15)
    assert torch.allclose(mixed, 0.25 * own / 5 + 0.75 * pool)
    assert torch.allclose(shrink(own, 5.0, 5, pool, 0), own / 5)


def test_rounding_library_refuses_wrong_sizes():
    if not rounding.available():
        pytest.skip("the compiled library is not there")
    good = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="codes"):
        rounding.feedback(good, torch.zeros(1, 8, 8), good[..., :1].contiguous(), good[..., :1].contiguous(),
                          torch.zeros(1, 4, 9, dtype=torch.uint8), 8, 2, None, False)  # fmt: skip
    with pytest.raises(ValueError, match="status 3"):
        rounding.feedback(good, torch.eye(8)[None].contiguous(), torch.ones(1, 4, 1), torch.ones(1, 4, 1),
                          torch.zeros(1, 4, 8, dtype=torch.uint8), 8, 2, torch.full((1, 8), 8), False)  # fmt: skip
    assert isinstance(Grid(2, 0, torch.ones(1, 4, dtype=torch.bfloat16), None, None, 8).by_column()[0], torch.Tensor)
