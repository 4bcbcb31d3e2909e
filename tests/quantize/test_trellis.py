"""The trellis code: distortion on normal data, an independent Viterbi search, decoding, feedback, rotation, sizes."""

from __future__ import annotations

import pytest
import torch

from moecompress.errors import UserError
from moecompress.kernels import trellis as native
from moecompress.pack import rotation
from moecompress.pack.scheme import TRELLIS, Scheme
from moecompress.pack.trellis import RATES, TABLE_STEP, WINDOW, TrellisBank, dequantize, table, windows
from moecompress.quantize.trellis import DISTORTION as EXPECTED
from moecompress.quantize.trellis import Coded, alike, block_feedback, expected_error, study
from moecompress.quantize.trellis import encode as encode_with

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled encoder is not there")

#: Mean squared error on normal data of unit variance that trellises of this size reach, tail-biting included, by rate.
DISTORTION = {0.5: 0.51, 0.75: 0.366, 1: 0.265, 1.25: 0.193, 1.5: 0.141, 2: 0.0745, 2.5: 0.039, 3: 0.0194, 4: 0.0054}

FROZEN_TABLE = [-39, -15, -17, -18, 12, -38]
FROZEN_SIGNS = [-1, -1, -1, -1, 1, -1, 1, -1, -1, -1, 1, -1]


def encode(weights: torch.Tensor, hessian: torch.Tensor | None, rate: float, seed: int = 0) -> Coded:
    names = [str(index) for index in range(len(weights))]
    inputs = alike(len(weights), weights.shape[2]) if hessian is None else study(hessian, names, 0.01, seed)[0]
    return encode_with(weights, inputs, rate, seed)


def straight(coded: Coded, seed: int = 0) -> torch.Tensor:
    """The decoded matrices with the rotation undone."""
    rows, cols = coded.values.shape[1:]
    back = rotation.unrotate(coded.values.transpose(1, 2), rotation.signs(rows, seed)).transpose(1, 2)
    return rotation.unrotate(back, rotation.signs(cols, seed))


@pytest.mark.parametrize("rate", RATES)
def test_distortion_on_normal_data(rate: float) -> None:
    weights = torch.randn(1, 192, 256, generator=torch.Generator().manual_seed(0)) * 0.03
    assert float(encode(weights, None, rate).error) <= 1.055 * DISTORTION[rate]
    assert float(encode(weights, None, rate).error) > 2 ** (-2 * rate)  # Shannon


def costs(values: torch.Tensor, codebook: torch.Tensor, bits: int, overlap: int | None) -> torch.Tensor:
    """Least squared error [4096] of a tile [256] by the window of its last step: Viterbi's recursion, in double precision."""
    states, step = torch.arange(2**WINDOW), codebook.shape[1]
    overlaps = 2 ** (WINDOW - bits)
    cost = torch.zeros(overlaps, dtype=torch.float64)
    if overlap is not None:
        cost = torch.where(torch.arange(overlaps) == overlap, cost, torch.inf)
    for part in values.double().split(step):
        whole = cost[states >> bits] + (codebook.double() - part).square().sum(1)
        cost = whole.view(2**bits, overlaps).amin(0)  # a window's low bits are the overlap that it hands on
    return whole


@pytest.mark.parametrize("rate", [0.5, 0.75, 1.5, 2, 2.5, 3, 4])
def test_search_is_optimal_for_its_seam(rate: float) -> None:
    bits, _ = RATES[rate]
    by_window = table(rate).values().float() * TABLE_STEP
    values = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    stream, decoded = native.encode(values, rate)
    found = windows(stream, bits)
    assert torch.equal(by_window[found].flatten(1), decoded)
    newest_lowest = [int(f"{window:012b}"[::-1], 2) for window in range(2**WINDOW)]
    codebook, found = by_window[newest_lowest], torch.tensor(newest_lowest)[found]
    for tile in range(3):
        overlap = int(found[tile, -1]) % 2 ** (WINDOW - bits)
        best = costs(values[tile], codebook, bits, overlap)[torch.arange(2**WINDOW) % 2 ** (WINDOW - bits) == overlap].min()
        reached = float((values[tile] - decoded[tile]).double().square().sum())
        assert reached == pytest.approx(float(best), rel=2e-3)
        free = costs(values[tile], codebook, bits, None).min()
        assert float(free) * (1 - 1e-6) <= reached <= float(free) * 1.12 + 0.05  # what tail-biting costs


@pytest.mark.parametrize(("rows", "cols"), [(16, 16), (33, 70), (1, 100), (257, 31)])
def test_file_decodes_to_what_was_measured(rows: int, cols: int) -> None:
    weights = torch.randn(2, rows, cols)
    coded = encode(weights, None, 1.5, seed=7)
    assert torch.allclose(dequantize(coded.bank), coded.values, atol=1e-5)
    lost = (straight(coded, 7) - weights).square().sum((1, 2)) / weights.square().sum((1, 2))
    assert torch.allclose(lost, coded.error, rtol=1e-3)
    assert sum(t.nbytes for t in coded.bank.tensors().values()) == 2 * Scheme(1.5, code=TRELLIS).price(rows, cols)


def test_exactly_the_rate_in_bits() -> None:
    assert 8 * (Scheme(2, code=TRELLIS).price(768, 2048) - 4) / (768 * 2048) == 2
    assert 8 * (Scheme(0.75, code=TRELLIS).price(768, 2048) - 4) / (768 * 2048) == 0.75


def test_feedback_lowers_the_output_error() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(600, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    hessian = (x.T @ x / 600)[None]
    weights = torch.randn(1, 64, 96, generator=generator)

    def error(decoded: torch.Tensor) -> float:
        off = (weights - decoded).double()
        return float(((off @ hessian.double()) * off).sum() / ((weights.double() @ hessian.double()) * weights.double()).sum())

    fed = encode(weights, hessian, 2)
    assert error(straight(fed)) == pytest.approx(float(fed.error), rel=1e-3)
    assert error(straight(fed)) < 0.8 * error(straight(encode(weights, None, 2)))


@pytest.mark.parametrize("wide", [4, 16])
def test_block_feedback_factorises_the_hessian(wide: int) -> None:
    x = torch.randn(100, 40, dtype=torch.float64)
    hessian = (x.T @ x)[None]
    lower = block_feedback(torch.linalg.cholesky(hessian), wide) + torch.eye(40)
    inner = torch.linalg.solve(lower, torch.linalg.solve(lower, hessian).transpose(1, 2))[0]
    for first in range(0, 40, wide):
        inner[first : first + wide, first : first + wide] = 0
    assert inner.abs().max() < 1e-9 * hessian.abs().max()
    assert torch.equal(lower.triu(1), torch.zeros_like(lower))


@pytest.mark.parametrize("rate", [1, 2, 3])
def test_expected_error_is_the_measured_one(rate: float) -> None:
    """Heavy-tailed weights, correlated inputs: the prediction never searches, and must still be right to a fifth."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(800, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    hessian = (x.T @ x / 800).expand(2, -1, -1)
    weights = torch.randn(2, 64, 128, generator=generator) ** 3
    inputs, _ = study(hessian, ["a", "b"], 0.01)
    predicted = expected_error(weights, inputs, torch.ones(2, 64), [rate])[:, 0]
    off = weights - straight(encode(weights, hessian, rate))
    measured = ((off @ hessian) * off).sum((1, 2)).double()
    assert torch.allclose(predicted, measured, rtol=0.2)
    assert EXPECTED[rate] < DISTORTION[rate] * 1.055


@pytest.mark.parametrize("size", [1, 31, 128, 200, 576])
def test_rotation_is_orthogonal_and_undone(size: int) -> None:
    sign = rotation.signs(size, 3)
    turned = rotation.rotate(torch.eye(size), sign)
    assert torch.allclose(turned @ turned.T, torch.eye(size), atol=1e-5)
    x = torch.randn(5, size)
    assert torch.allclose(rotation.unrotate(rotation.rotate(x, sign), sign), x, atol=1e-5)
    assert sum(rotation.blocks(size)) == size


def test_table_and_signs_are_frozen() -> None:
    """A file written today must be readable tomorrow: signs come from the seed alone."""
    assert table(2).values()[:3].flatten().tolist() == FROZEN_TABLE
    assert rotation.signs(12, 5).int().tolist() == FROZEN_SIGNS


def test_damaged_banks_are_refused() -> None:
    bank = encode(torch.randn(1, 16, 16), None, 2).bank
    with pytest.raises(UserError, match="stream"):
        dequantize(TrellisBank(bank.stream[..., :-1], bank.scales, 2, 16, 16))
    with pytest.raises(UserError, match="rate"):
        dequantize(TrellisBank(bank.stream, bank.scales, 7, 16, 16))
