"""What is rounded instead of the weights: against numpy's least squares in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moecompress.pack.scheme import Scheme
from moecompress.quantize import cross
from moecompress.quantize.cross import mending
from moecompress.quantize.encode import Settings, encode, study

TOKENS, COLS, ROWS = 600, 64, 48


@pytest.fixture(scope="module")
def problem():
    """Weights W [o, i], original inputs X, changed inputs X̂ [T, i] and token weights ω, all float64; inputs are correlated, and
    the change is partly a linear map of them, partly noise."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(TOKENS, COLS) @ (torch.eye(COLS) + 0.3 * normal(COLS, COLS))
    now = x + x @ (0.05 * normal(COLS, COLS)) + 0.1 * normal(TOKENS, COLS)
    return normal(ROWS, COLS), x, now, torch.rand(TOKENS, generator=generator, dtype=torch.float64)


def moments_of(x, now, omega):
    """Hessian and drift, [1, i, i] each."""
    weighted = now * omega[:, None]
    return (weighted.T @ now)[None], (weighted.T @ (x - now))[None]


def target(weights, mend, alpha):
    """[1, o, i] for weights [o, i] whose inputs drifted."""
    return cross.target(weights[None], weights @ mend, alpha)


def test_same_inputs_same_weights(problem):
    weights, x, _, omega = problem
    hessian, drift = moments_of(x, x, omega)
    found = target(weights, mending(hessian, drift, 0.01), 1.0)
    assert torch.equal(found[0], weights)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_target_is_the_least_squares_solution(problem, damping):
    """min over V of Σ ω ‖W x − V x̂‖² + λ ‖V − W‖²."""
    weights, x, now, omega = problem
    hessian, drift = moments_of(x, now, omega)
    found = target(weights, mending(hessian, drift, damping), 1.0)[0]
    pull = (damping * hessian[0].diagonal().mean()).sqrt() * torch.eye(COLS, dtype=torch.float64)
    inputs = torch.cat([now * omega.sqrt()[:, None], pull])
    outputs = torch.cat([x @ weights.T * omega.sqrt()[:, None], pull @ weights.T])
    expected = np.linalg.lstsq(inputs.numpy(), outputs.numpy(), rcond=None)[0].T
    assert np.abs(found.numpy() - expected).max() < 1e-9


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_what_outputs_lack_says_the_same(problem, damping):
    """Also where the weights are others than those that made the outputs: V is pulled towards them."""
    weights, x, now, omega = problem
    hessian, drift = moments_of(x, now, omega)
    lacking = (now * omega[:, None]).T @ (x @ weights.T - now @ weights.T)
    found = cross.target(weights[None], mending(hessian, lacking[None], damping), 1.0)
    assert torch.allclose(found, target(weights, mending(hessian, drift, damping), 1.0), atol=1e-9)
    few, kept = now[:, :40], 1.1 * weights[:, :40]  # fewer inputs, as of a thinner expert
    lacking = (few * omega[:, None]).T @ (x @ weights.T - few @ kept.T)
    found = cross.target(kept[None], mending(hessian[:, :40, :40], lacking[None], damping), 1.0)[0]
    pull = (damping * hessian[0, :40, :40].diagonal().mean()).sqrt() * torch.eye(40, dtype=torch.float64)
    inputs = torch.cat([few * omega.sqrt()[:, None], pull])
    expected = np.linalg.lstsq(inputs.numpy(), torch.cat([x @ weights.T * omega.sqrt()[:, None], pull @ kept.T]).numpy(), rcond=None)[0].T
    assert np.abs(found.numpy() - expected).max() < 1e-9


def test_blends_are_on_the_line(problem):
    weights, x, now, omega = problem
    mend = mending(*moments_of(x, now, omega), 0.01)
    whole = target(weights, mend, 1.0)
    for alpha in (0.0, 0.25, 0.5):
        assert torch.allclose(target(weights, mend, alpha), weights + alpha * (whole - weights), atol=1e-12)


def test_no_factor_no_change(problem):
    weights, x, now, omega = problem
    hessian, drift = moments_of(x, now, omega)
    hessian[0, 3, 3] = torch.nan
    assert torch.equal(target(weights, mending(hessian, drift, 0.01), 1.0)[0], weights)


@pytest.mark.parametrize("name", ["b2g64a", "b3g64a", "t2", "ternary"])
def test_rounding_the_target_mends_outputs(problem, name):
    """‖X Wᵀ − X̂ Ŵᵀ‖ on the tokens that the moments are of, and on others."""
    from moecompress.calibrate.prediction import decoded

    weights, x, now, omega = (tensor.float() for tensor in problem)
    hessian, drift = moments_of(x[:400], now[:400], omega[:400])
    scheme = Scheme.parse(name)
    inputs = study(hessian, ["one"], Settings(), [scheme])
    off = {}
    for alpha in (0.0, 1.0):
        wanted = target(weights, mending(hessian, drift, 0.01), alpha)
        rounded = decoded(scheme, encode(wanted, inputs, scheme, Settings()).bank.tensors(), (ROWS, COLS), 0)
        lost = ((x @ weights.T - now @ rounded.T).square().sum(1) * omega).double()
        off[alpha] = float(lost[:400].sum()), float(lost[400:].sum())
    assert off[1.0][0] < 0.9 * off[0.0][0] and off[1.0][1] < 0.95 * off[0.0][1]
