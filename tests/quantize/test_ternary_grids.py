"""Two- and three-valued grids: known distortions of a Gaussian, GPTQ and the refit against double-precision versions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from plain import plain_gptq

from moecompress.quantize import ternary
from moecompress.quantize.encode import Settings, permuted, processing_order, study
from moecompress.quantize.gptq import row_errors
from moecompress.quantize.hessian import factor
from moecompress.quantize.ternary import KINDS, encode, fit, gptq, refit, rtn, values


def problem(experts=2, rows=12, cols=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) * torch.logspace(0, -1, cols)
    x = torch.randn(experts, 300, cols, generator=generator) @ mix
    return torch.randn(experts, rows, cols, generator=generator), x.transpose(1, 2) @ x / 300


def entropy(trits: torch.Tensor) -> float:
    share = trits.flatten().bincount(minlength=3).double() / trits.numel()
    return float(-(share * share.clamp_min(1e-300).log2()).sum())


@pytest.mark.parametrize(
    ("kind", "plain", "refitted"),
    [("sign", 0.363, 0.363), ("lloyd", 0.190, 0.190), ("absmean", 0.263, 0.213), ("qmoe", 0.689, 0.538)],
)
def test_distortion_of_a_unit_gaussian(kind, plain, refitted):
    weights = torch.randn(2, 512, 768, generator=torch.Generator().manual_seed(0))
    for refits, expected in ((0, plain), (1, refitted)):
        found = encode(weights, None, kind, refits)
        assert found.error.tolist() == pytest.approx([expected] * 2, rel=0.05)
    rate, bits = found.zero_rate, entropy(found.trits)
    known = {"sign": (0.0, 1.0), "lloyd": (0.46, 1.536), "absmean": (0.31, 1.583), "qmoe": (0.885, 0.63)}[kind]
    assert (rate, bits) == pytest.approx(known, rel=0.03)


def test_lloyd_finds_the_levels_of_a_gaussian():
    levels = fit(torch.randn(1, 4, 200_000, generator=torch.Generator().manual_seed(0)), "lloyd")
    assert torch.allclose(levels.values, torch.tensor([-1.224, 1.224]), atol=0.01)
    assert torch.allclose(levels.thresholds, torch.tensor([-0.612, 0.612]), atol=0.005)


def test_grids_are_those_of_their_papers():
    weights = torch.tensor([[[-4.0, -2.5, -1.5, 0.0, 0.9, 1.1, 2.0], [0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0]]])
    qmoe = fit(weights, "qmoe")
    assert qmoe.values.tolist() == [[[-4.0, 2.0], [0.0, 8.0]]]
    assert rtn(weights, qmoe).tolist() == [[[0, 0, 1, 1, 1, 2, 2], [1, 1, 1, 1, 2, 2, 2]]]
    absmean = fit(weights, "absmean")
    mean = float(weights.abs().mean())
    assert absmean.values[0, 1].tolist() == pytest.approx([-mean, mean], rel=0.004)
    assert torch.equal(rtn(weights, absmean), ((weights / absmean.values[0, 0, 1]).round().clamp(-1, 1) + 1).to(torch.uint8))
    sign = fit(weights, "sign")
    assert sign.values[0, 1].tolist() == pytest.approx([-3.5, 3.5], rel=0.004)
    assert rtn(weights, sign).tolist() == [[[0, 0, 0, 2, 2, 2, 2], [2] * 7]]
    with pytest.raises(ValueError, match="no ternary grid"):
        fit(weights, "median")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_stay_zeros_and_single_columns_work(kind):
    weights, hessian = problem(cols=31)
    weights[0, 3] = 0
    found = encode(weights, study(hessian, ["a", "b"], Settings()), kind)
    assert torch.isfinite(found.error).all() and torch.isfinite(found.levels).all()
    dense = values(found.trits, ternary.Levels(found.levels.float(), found.levels))
    if kind == "absmean":  # one scale a matrix: feedback has nothing to correct in a row of zeros
        assert (found.trits[0, 3] == 1).all()
    assert (dense[0, 3] == 0).all()
    tall = torch.randn(2, 5, 1)
    assert encode(tall, None, kind).trits.shape == (2, 5, 1)


def plain_trits(weights, hessian, damping, order, levels):
    def choose(e, r, _, weight):
        (low, high), (below, above) = levels.values[e, r].tolist(), levels.thresholds[e, r].tolist()
        return (0, low) if weight < below else (2, high) if weight >= above else (1, 0.0)

    return plain_gptq(weights, hessian, damping, order, choose)


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("kind", KINDS)
def test_gptq_is_the_textbook_one(kind, order):
    weights, hessian = problem(rows=9, cols=37)
    columns = processing_order(hessian.diagonal(dim1=-2, dim2=-1), order)
    upper, _ = factor(permuted(hessian, columns), 0.1, ["a", "b"])
    levels = fit(weights, kind)
    found, expected = gptq(weights, upper, columns, levels), plain_trits(weights, hessian, 0.1, columns, levels)
    # A weight on a threshold may fall either way in float32; everything after it in the row then differs too.
    assert (found == expected).all(-1).double().mean() >= 0.9


def plain_levels(weights, hessian, trits, symmetric):
    """Least squares on whitened rows, float64."""
    root = torch.linalg.cholesky(hessian.double())  # H = root rootᵀ
    result = torch.zeros(*weights.shape[:2], 2)
    for e, r in itertools.product(range(weights.shape[0]), range(weights.shape[1])):
        low, high = (trits[e, r] == 0).double(), (trits[e, r] == 2).double()
        basis = torch.stack([high - low] if symmetric else [low, high], -1)
        found = torch.linalg.lstsq(root[e].T @ basis, root[e].T @ weights[e, r].double(), driver="gelsd").solution
        result[e, r] = torch.stack([-found[0], found[0]]) if symmetric else found
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_refit_is_least_squares_under_the_hessian(kind):
    weights, hessian = problem()
    levels = fit(weights, kind)
    trits = rtn(weights, levels)
    found = refit(weights, hessian, trits, levels, symmetric=kind == "sign")
    before, after = (row_errors(weights, hessian, values(trits, lv)) for lv in (levels, found))
    best = replace(levels, values=plain_levels(weights, hessian, trits, kind == "sign"))
    assert (after <= before).all()
    assert (after <= 1.01 * row_errors(weights, hessian, values(trits, best))).all()
    assert torch.equal(found.values, found.values.bfloat16().float())
    assert torch.equal(found.thresholds, levels.thresholds)


@pytest.mark.parametrize("kind", KINDS)
def test_feedback_refit_and_second_rounding_each_lower_the_error(kind):
    weights, hessian = problem(rows=64, cols=130)
    inputs = study(hessian, ["a", "b"], Settings(damping=0.1))
    plain = fit(weights, kind)
    nearest = row_errors(weights, hessian, values(rtn(weights, plain), plain)).sum()
    nearest = nearest / row_errors(weights, hessian, torch.zeros(())).sum()
    errors = [float(encode(weights, inputs, kind, refits).error.mean()) for refits in (0, 1, 2)]
    assert errors[0] < 0.9 * nearest
    assert errors[2] < errors[1] < errors[0]
    found = encode(weights, inputs, kind)
    dense = values(found.trits, replace(plain, values=found.levels.float()))
    whole = row_errors(weights, hessian, torch.zeros(())).sum(-1)
    assert torch.allclose(found.error, row_errors(weights, hessian, dense).sum(-1) / whole, rtol=1e-4)
    if kind == "sign":
        assert (found.trits != 1).all() and torch.equal(found.levels[..., 0], -found.levels[..., 1])


def test_experts_do_not_see_each_other():
    weights, hessian = problem(experts=3)
    inputs = study(hessian, list("abc"), Settings())
    together, alone = encode(weights, inputs, "qmoe"), encode(weights[1:2], inputs.take([1]), "qmoe")
    assert torch.equal(together.trits[1:2], alone.trits)
    assert torch.equal(together.levels[1:2], alone.levels)
