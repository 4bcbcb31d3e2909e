"""Nested rounding against its definition in float64, native against torch, and what sharing one code costs and gains."""

from __future__ import annotations

import itertools

import pytest
import torch

from moecompress.kernels import rounding
from moecompress.pack import int_format
from moecompress.pack import nested as nested_format
from moecompress.pack.scheme import Scheme
from moecompress.quantize import gptq, nested
from moecompress.quantize.encode import Settings, encode, study


def problem(experts: int = 2, rows: int = 12, cols: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) * torch.logspace(0, -1, cols)
    x = torch.randn(experts, 300, cols, generator=generator) @ mix
    return torch.randn(experts, rows, cols, generator=generator), x.transpose(1, 2) @ x / 300


def prepared(weights: torch.Tensor, hessian: torch.Tensor, bits: int, group: int = 32):
    inputs = study(hessian, [str(i) for i in range(len(hessian))], Settings())
    return inputs, nested.fit(weights, hessian.diagonal(dim1=-2, dim2=-1), bits, group)


def value(code: int, k: int, bits: int) -> float:
    """In steps of the finest grid, from the codes that share the k highest bits."""
    alike = [c for c in range(2**bits) if c >> (bits - k) == code >> (bits - k)]
    return sum(alike) / len(alike) - (2**bits - 1) / 2


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_feeds_every_width_its_own_error(monkeypatch, native, bits):
    if native and not rounding.available():
        pytest.skip("the compiled library is not there")
    weights, hessian = problem(experts=2, rows=5, cols=35)
    inputs, grid = prepared(weights, hessian, bits)
    monkeypatch.setattr(rounding, "available", lambda: native)
    found = nested.gptq(weights, inputs.upper, inputs.order, grid)
    known, scale = range(2, bits + 1), grid.by_column()[0].double()
    expected = torch.zeros_like(found)
    for e, r in itertools.product(range(2), range(5)):
        row = {k: weights[e, r].double().clone() for k in known}
        h = hessian[e].double() + torch.eye(35, dtype=torch.float64) * 0.01 * hessian[e].double().diagonal().mean()
        left = inputs.order[e].tolist()
        while left:
            j, s = left[0], float(scale[e, r, left[0]])
            costs = [sum(2 ** (nested.BALANCE * (k - 2)) * (s * value(c, k, bits) - float(row[k][j])) ** 2 for k in known) for c in range(2**bits)]
            code = costs.index(min(costs))
            expected[e, r, j] = code
            inverse = torch.linalg.inv(h[left][:, left])
            for k in known:
                row[k][left[1:]] -= (row[k][j] - s * value(code, k, bits)) / inverse[0, 0] * inverse[0, 1:]
            left = left[1:]
    assert (found == expected).all(-1).double().mean() >= 0.8  # a tie in float32 changes what follows it


@pytest.mark.parametrize(("shape", "group"), [((1, 1, 1), 0), ((2, 3, 32), 32), ((3, 7, 70), 64), ((1, 9, 257), 128)])
@pytest.mark.parametrize("bits", [3, 4])
def test_native_and_torch_agree(monkeypatch, shape, group, bits):
    if not rounding.available():
        pytest.skip("the compiled library is not there")
    weights, hessian = problem(*shape)
    inputs, grid = prepared(weights, hessian, bits, group)
    rounded = nested.gptq(weights, inputs.upper, inputs.order, grid)
    descended = nested.descend(weights, hessian, rounded, grid)
    monkeypatch.setattr(rounding, "available", lambda: False)
    assert (rounded == nested.gptq(weights, inputs.upper, inputs.order, grid)).double().mean() > 0.97
    assert (descended == nested.descend(weights, hessian, rounded, grid)).double().mean() > 0.97


def balanced(weights: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, grid) -> torch.Tensor:
    """What descent and refit lower: [E, o]."""
    return sum(2 ** (nested.BALANCE * (k - 2)) * gptq.row_errors(weights, hessian, nested.values(codes, grid, k)) for k in range(2, grid.bits + 1))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_descent_and_refit_lower_the_balanced_error_of_every_row(monkeypatch, native, bits):
    if native and not rounding.available():
        pytest.skip("the compiled library is not there")
    monkeypatch.setattr(rounding, "available", lambda: native)
    weights, hessian = problem()
    _, grid = prepared(weights, hessian, bits)
    codes = nested.rtn(weights, grid)
    start = balanced(weights, hessian, codes, grid)
    moved = nested.descend(weights, hessian, codes, grid)
    lower = balanced(weights, hessian, moved, grid)
    assert (lower <= start * (1 + 1e-5)).all() and lower.sum() < 0.9 * start.sum()
    refitted = nested.refit(weights @ hessian, hessian, moved, grid)
    last = balanced(weights, hessian, moved, refitted)
    assert (last <= lower * (1 + 1e-5)).all() and last.sum() < lower.sum()


def test_one_code_serves_all_widths():
    """Every width is far better than the next fewer bits alone, and better than the dedicated codes cut off."""
    weights, hessian = problem(experts=3, rows=24, cols=128)
    inputs = study(hessian, ["a", "b", "c"], Settings())
    whole = gptq.row_errors(weights, hessian, torch.zeros(())).sum()

    def error(bank) -> float:
        return float(gptq.row_errors(weights, hessian, int_format.dequantize(bank)).sum() / whole)

    def cut(bank, k: int):
        planes = dict(list(bank.planes.items())[: k - 2])
        return nested_format.as_integers(nested_format.NestedBank(bank.codes, planes, bank.row_scales, bank.scales, 4, 64, 128))

    alone = {k: encode(weights, inputs, Scheme(k, 64), Settings()).bank for k in (2, 3, 4)}
    bank = encode(weights, inputs, Scheme(4, 64, code="nested"), Settings()).bank
    sharing = nested_format.from_integers(alone[4])
    for k in (2, 3, 4):
        assert error(alone[k]) < error(cut(bank, k)) < 2.5 * error(alone[k])
    assert error(cut(bank, 3)) < error(alone[2]) and error(cut(bank, 4)) < error(alone[3])
    assert error(cut(bank, 2)) < 0.6 * error(cut(sharing, 2))


@pytest.mark.parametrize("group", [0, 32])
def test_rows_are_rounded_alike_in_slabs(monkeypatch, group):
    weights, hessian = problem(experts=2, rows=11, cols=40)
    inputs = study(hessian, ["a", "b"], Settings())
    whole = encode(weights, inputs, Scheme(4, group, code="nested"), Settings())
    monkeypatch.setattr("moecompress.quantize.encode.NESTED_SLAB", 3 * 2 * 40)
    slabs = encode(weights, inputs, Scheme(4, group, code="nested"), Settings())
    assert torch.allclose(whole.error, slabs.error, rtol=0.02)
    before, after = whole.bank.tensors(), slabs.bank.tensors()
    assert all((before[name] == after[name]).double().mean() > 0.97 for name in before)


@pytest.mark.parametrize("settings", [Settings(method="rtn"), Settings(refine=0), Settings(order="natural")])
def test_the_reported_error_is_that_of_all_bits(settings):
    weights, hessian = problem()
    inputs = study(hessian, ["a", "b"], settings)
    encoded = encode(weights, inputs, Scheme(3, 32, code="nested"), settings)
    lost = gptq.row_errors(weights, hessian, int_format.dequantize(nested_format.as_integers(encoded.bank))).sum(-1)
    assert torch.allclose(encoded.error, lost / gptq.row_errors(weights, hessian, torch.zeros(())).sum(-1), rtol=1e-4)
