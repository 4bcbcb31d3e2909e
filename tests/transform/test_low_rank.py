"""Errors of low-rank factors against the factors themselves, and against gradient descent where no theorem is taken for granted."""

from __future__ import annotations

import pytest
import torch

from moecompress.transform.low_rank import (
    low_rank_error,
    needed_rank,
    residuals,
    shared_rank,
    shared_residuals,
    stable_rank,
)


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    return torch.randn(3, 10, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(50, 7, generator=g, dtype=torch.float64) @ torch.randn(7, 7, generator=g, dtype=torch.float64)


def test_error_is_that_of_the_truncated_matrix(weights: torch.Tensor) -> None:
    for rank in range(8):
        for one, error in zip(weights.double(), low_rank_error(weights, rank), strict=True):
            u, s, v = torch.linalg.svd(one, full_matrices=False)
            near = (u[:, :rank] * s[:rank]) @ v[:rank]
            assert float(error) == pytest.approx(float((one - near).square().sum() / one.square().sum()), abs=1e-12)
    assert torch.equal(low_rank_error(weights, 99), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("each", [False, True])
def test_no_factors_serve_the_inputs_better(weights: torch.Tensor, inputs: torch.Tensor, each: bool) -> None:
    """Alternating least squares for min ‖X (W − AB)ᵀ‖ ends where the formula says."""
    moment = inputs.T @ inputs
    error = low_rank_error(weights, 2, moment.expand(3, 7, 7) if each else moment)
    for one, wanted in zip(weights.double(), error, strict=True):
        target = inputs @ one.T  # (50, 10)
        b = torch.randn(2, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        for _ in range(2000):
            a = torch.linalg.lstsq(inputs @ b.T, target).solution.T  # (10, 2)
            b = torch.linalg.lstsq(a, one).solution  # the best b for any inputs of full rank
        loss = (target - inputs @ (a @ b).T).square().sum() / target.square().sum()
        assert float(loss) >= float(wanted) - 1e-12
        s = torch.linalg.svdvals(target)
        assert float(wanted) == pytest.approx(float(s[2:].square().sum() / s.square().sum()), rel=1e-9)


def test_ranks_of_matrices_whose_rank_is_known() -> None:
    g = torch.Generator().manual_seed(3)
    low = torch.randn(2, 12, 3, generator=g) @ torch.randn(2, 3, 9, generator=g)
    found = residuals(low)
    assert needed_rank(found, 1e-9).tolist() == [3, 3]
    assert torch.allclose(found[:, 0], torch.ones(2, dtype=torch.float64)) and float(found[:, 9].max()) == 0
    assert torch.allclose(stable_rank(torch.eye(5)[None]), torch.tensor([5.0], dtype=torch.float64))
    assert stable_rank(torch.ones(1, 4, 6)).item() == pytest.approx(1)
    assert torch.equal(residuals(torch.zeros(1, 4, 4)), torch.zeros(1, 5, dtype=torch.float64))


def test_no_shared_basis_serves_the_inputs_better(weights: torch.Tensor, inputs: torch.Tensor) -> None:
    """Alternating least squares for min Σ_e ‖X (W_e − A_e B)ᵀ‖ ends where the formula says."""
    lower = torch.linalg.cholesky(inputs.T @ inputs)
    seen = weights.double() @ lower  # (3, 10, 7)
    for rank in (1, 3):
        b = torch.randn(rank, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        for _ in range(2000):
            a = torch.stack([torch.linalg.lstsq((b @ lower).T, one.T).solution.T for one in seen])
            b = torch.linalg.lstsq(a.flatten(0, 1), weights.double().flatten(0, 1)).solution
        loss = (seen - a @ b @ lower).square().sum() / seen.square().sum()
        assert float(shared_residuals(weights, inputs.T @ inputs)[rank]) == pytest.approx(float(loss), rel=1e-6)


def test_what_sharing_costs_and_saves(weights: torch.Tensor) -> None:
    """At the same rank never better than own bases, and as good where experts are alike; then there is rank to spare."""
    own = residuals(weights) * weights.double().square().sum((1, 2))[:, None] / weights.double().square().sum()
    assert (shared_residuals(weights) >= own.sum(0) - 1e-12).all() and shared_residuals(weights)[3] > 1.05 * own.sum(0)[3]
    alike = weights[:1].expand(3, -1, -1)
    assert torch.allclose(shared_residuals(alike), residuals(weights[:1])[0])
    for rank, experts, rows, cols in [(4, 3, 10, 7), (64, 16, 256, 256), (1, 1, 5, 9)]:
        q = shared_rank(rank, experts, rows, cols)
        assert q * (experts * rows + cols) <= rank * experts * (rows + cols) < (q + 1) * (experts * rows + cols)
