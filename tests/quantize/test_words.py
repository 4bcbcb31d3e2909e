"""The dictionary code at a fixed price: it always fits, QMoE's own thresholds where they fit, and what plans expect."""

from __future__ import annotations

import pytest
import torch
from test_ternary_grids import problem

from moecompress.pack import dictionary
from moecompress.pack.scheme import Scheme
from moecompress.quantize import ternary, words
from moecompress.quantize.encode import Settings, encode, expected_error, study
from moecompress.quantize.gptq import row_errors
from moecompress.recipe import DICTIONARY_RATES


def gaussian(cols: int = 768, matrices: int = 2, rows: int = 96) -> torch.Tensor:
    return torch.randn(matrices, rows, cols, generator=torch.Generator().manual_seed(cols))


@pytest.mark.parametrize("bits", DICTIONARY_RATES)
@pytest.mark.parametrize("cols", [17, 160])
def test_every_matrix_has_its_price(bits, cols):
    """Also those that no zero rate of their own would bring there: GPTQ on inputs that are nearly alike, and all zeros."""
    weights, hessian = problem(3, 24, cols)
    weights[2] = 0
    scheme, settings = Scheme.parse(f"d{bits:g}".replace(".", "_")), Settings(damping=0.1)
    found = encode(weights, study(hessian, ["a", "b", "c"], settings, [scheme]), scheme, settings)
    assert sum(tensor.nbytes for tensor in found.bank.tensors().values()) == 3 * scheme.price(24, cols)
    back = dictionary.dequantize(found.bank)
    error = row_errors(weights, hessian, back).sum(-1)[:2] / row_errors(weights, hessian, torch.zeros(())).sum(-1)[:2]
    assert torch.allclose(error, found.error[:2], rtol=1e-3) and bool((error < 1).all()) and not back[2].any()


def test_zeros_alone_fit_at_every_rate():
    for bits in DICTIONARY_RATES:
        for cols in (1, 27, 28, 29, 300):
            zeros = torch.ones(1, 3, cols, dtype=torch.uint8)
            assert int(dictionary.needed(zeros, dictionary.rate_prices(bits))) <= dictionary.room(3, cols, bits)


def test_the_zero_rate_of_a_rate_is_the_one_that_needs_it():
    u = torch.rand(1, 300, 768, generator=torch.Generator().manual_seed(0))
    for bits, zeros in dictionary.ZEROS.items():
        z = zeros / 1000
        trits = torch.where(u < z, 1, torch.where(u < (1 + z) / 2, 0, 2)).to(torch.uint8)
        need = int(dictionary.needed(trits, dictionary.rate_prices(bits))) * 16 / trits.numel()
        assert need == pytest.approx(bits, rel=0.02)


def test_where_qmoes_thresholds_fit_they_stay():
    """A Gaussian of 768 columns has 88.5 % zeros under {min, 0, max}: they need less than 0.9 bits."""
    weights = gaussian()
    assert words.widening(weights, 0.9).tolist() == [1, 1] and bool((words.widening(weights, 0.7) > 1).all())
    found, plain = words.encode(weights, None, 0.9, 0), ternary.encode(weights, None, "qmoe", 0)
    assert torch.equal(dictionary.decode(found.bank), plain.trits) and torch.equal(found.bank.levels, plain.levels)


def test_narrower_room_is_used_and_refits_pay():
    weights = gaussian()
    found = [words.encode(weights, None, 0.7, refits) for refits in (0, 1)]
    for each in found:
        used = each.bank.ends[:, -1] / each.bank.words.shape[1]
        assert bool((used > 0.93).all())
        assert 0.4 < each.archived_bits < 0.7
    assert found[1].error.mean() < 0.9 * found[0].error.mean()
    wider = words.encode(weights, None, 0.8, 1)
    assert wider.error.mean() < found[1].error.mean()


def test_plans_expect_what_plain_rounding_costs():
    weights = gaussian(256)
    inputs = study(torch.eye(256).expand(2, -1, -1), ["a", "b"], Settings(damping=0.0))
    schemes = [Scheme.parse(name) for name in ("d0_7", "d0_8", "d1", "ternary")]
    expected = expected_error(weights, inputs, torch.ones(2, 96), schemes, Settings())
    assert bool((expected.diff(dim=1) < 0).all())
    found = encode(weights, None, schemes[1], Settings(refine=1)).error * weights.square().sum((1, 2))
    assert torch.allclose(expected[:, 1], found.double(), rtol=0.1)
