"""Shared bases against brute force in float64: no other basis serves all experts better, and what is predicted comes."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import eigh

from moecompress.pack import int_format
from moecompress.pack import shared_basis as fmt
from moecompress.pack.scheme import SHARED_BASIS, Scheme
from moecompress.quantize import shared_basis
from moecompress.quantize.encode import Settings, encode, expected_error, study
from moecompress.quantize.hessian import damped
from moecompress.transform.low_rank import shared_residuals

DAMPING = 0.01


def problem(experts: int = 5, rows: int = 9, cols: int = 14, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [n, o, i], one second moment of inputs [i, i] and row weights [n, o]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, cols, generator=g) @ torch.randn(cols, cols, generator=g)
    return torch.randn(experts, rows, cols, generator=g), x.T @ x / 300, torch.rand(experts, rows, generator=g) + 0.1


def lost(weights: torch.Tensor, basis: torch.Tensor, hessian: torch.Tensor, row_weight: torch.Tensor) -> float:
    """Σ_e tr(R (W − A B) H (W − A B)ᵀ) with the best A for each expert, from lstsq in float64."""
    lower, basis = torch.linalg.cholesky(hessian.double()), basis.double()
    total = 0.0
    for matrix, rows in zip(weights.double(), row_weight.double(), strict=True):
        found = torch.linalg.lstsq((basis @ lower).T, (matrix @ lower).T).solution.T
        total += float((((matrix - found @ basis) @ lower).square().sum(1) * rows).sum())
    return total


def best(weights: torch.Tensor, hessian: torch.Tensor, row_weight: torch.Tensor, rank: int) -> torch.Tensor:
    found = shared_basis.directions(shared_basis.energy(weights, row_weight), hessian, 0.0, rank)
    return shared_basis.basis(found, rank)


@pytest.mark.parametrize("rank", [1, 4, 9, 13])
def test_the_error_is_that_of_the_generalised_eigenproblem(rank: int) -> None:
    """What is lost is the sum of the eigenvalues of M v = λ H⁻¹ v that the basis leaves out, by scipy in float64."""
    weights, hessian, row_weight = problem()
    w = weights.double()
    energy = torch.einsum("noi,no,noj->ij", w, row_weight.double(), w)
    values = eigh(energy.numpy(), torch.linalg.inv(hessian.double()).numpy(), eigvals_only=True)
    basis = best(weights, hessian, row_weight, rank)
    assert torch.allclose(basis @ basis.T, torch.eye(rank), atol=1e-5)
    assert lost(weights, basis, hessian, row_weight) == pytest.approx(values[:-rank].sum(), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_no_basis_is_better(seed: int) -> None:
    """Not that of the plain decomposition, not one that leaves rows or inputs out of account, not one found by descent."""
    weights, hessian, row_weight = problem(seed=seed)
    alike, plain = torch.ones_like(row_weight), torch.eye(14)
    least = lost(weights, best(weights, hessian, row_weight, 5), hessian, row_weight)
    for moment, rows in ((plain, alike), (plain, row_weight), (hessian, alike)):
        assert least < lost(weights, best(weights, moment, rows, 5), hessian, row_weight)
    other = torch.randn(5, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    lower, stacked = torch.linalg.cholesky(hessian.double()), (weights * row_weight.sqrt()[..., None]).double().flatten(0, 1)
    for _ in range(300):  # alternating least squares from anywhere ends at the same error
        own = torch.linalg.lstsq((other @ lower).T, (stacked @ lower).T).solution.T
        other = torch.linalg.lstsq(own, stacked).solution
    assert lost(weights, other, hessian, row_weight) == pytest.approx(least, rel=1e-3)


def test_alike_the_error_is_that_of_the_analysis() -> None:
    weights, hessian, _ = problem()
    alike = torch.ones(weights.shape[:2])
    whole = float(torch.einsum("noi,ij,noj->", weights.double(), hessian.double(), weights.double()))
    for rank in (2, 8):
        share = lost(weights, best(weights, hessian, alike, rank), hessian, alike) / whole
        assert share == pytest.approx(float(shared_residuals(weights, hessian)[rank]), rel=1e-4)


def test_experts_made_of_a_basis_are_found_again() -> None:
    g = torch.Generator().manual_seed(3)
    weights = torch.randn(5, 9, 6, generator=g) @ torch.randn(6, 14, generator=g)
    _, hessian, row_weight = problem()
    basis = best(weights, hessian, row_weight, 6)
    for moments in (hessian.expand(5, -1, -1), torch.stack([hessian + n * torch.eye(14) for n in range(5)])):
        own, left = shared_basis.coefficients(weights, moments, basis)
        assert torch.allclose(own @ basis, weights, atol=1e-3)
        assert float(left.sum()) < 1e-5 * float(((weights @ moments) * weights).sum())
    stored = shared_basis.stored(basis)
    own, _ = shared_basis.coefficients(weights, hessian.expand(5, -1, -1), seen := int_format.dequantize(stored)[0])
    assert float((own @ seen - weights).norm() / weights.norm()) < 0.02  # what 8 bits of the basis cost


def test_all_of_the_rank_is_the_matrix() -> None:
    weights, hessian, row_weight = problem()
    basis = best(weights, hessian, row_weight, 14)
    own, left = shared_basis.coefficients(weights, hessian.expand(5, -1, -1), basis)
    assert torch.allclose(own @ basis, weights, atol=1e-3)
    assert float(left.sum()) < 1e-5 * float(((weights @ hessian) * weights).sum())
    whole = Scheme(8, 0, True, SHARED_BASIS, shares=(1000, 0))
    found = encode(weights, study(hessian.repeat(5, 1, 1), list("abcde"), Settings()), whole, Settings())
    assert found.bank.tensors()["basis_codes"].shape[0] == 14 and float(found.error.max()) < 2e-4


def test_coefficients_are_least_squares_for_the_moments_of_their_expert() -> None:
    weights, hessian, row_weight = problem()
    moments = torch.stack([hessian + n * torch.diag(torch.arange(14.0)) for n in range(5)])
    basis = best(weights, hessian, row_weight, 5)
    found, left = shared_basis.coefficients(weights, moments, basis)
    for one, near, moment, rows in zip(weights.double(), found.double(), moments.double(), left, strict=True):
        lower = torch.linalg.cholesky(moment)
        wanted = torch.linalg.lstsq((basis.double() @ lower).T, (one @ lower).T).solution.T
        assert torch.allclose(near, wanted, atol=1e-3)
        assert torch.allclose(((one - wanted @ basis.double()) @ lower).square().sum(1), rows, rtol=1e-3)


@pytest.mark.parametrize("name", ["sb250b4g32a", "sb500b3g32s", "sb750b2g0a", "sb500b8g0s"])
def test_what_is_expected_is_about_what_comes(name: str) -> None:
    """The prediction is exact in what the basis leaves, and of rounding as good as that of plain integers."""
    weights, hessian, row_weight = problem(6, 40, 128, seed=2)
    scheme, settings = Scheme.parse(name), Settings(refine=0)
    inputs = study(hessian.repeat(6, 1, 1), list("abcdef"), settings, [scheme])
    directions = shared_basis.directions(shared_basis.energy(weights, row_weight), hessian, DAMPING, 128)
    encoded = encode(weights, inputs, scheme, settings, directions)
    predicted = expected_error(weights, inputs, row_weight, [Scheme(4, 32), scheme, Scheme(16)], settings, directions)
    off = (weights - fmt.dequantize(encoded.bank)).double()
    found = torch.einsum("noi,nij,noj,no->n", off, damped(hessian[None], DAMPING)[0].double().expand(6, -1, -1), off, row_weight.double())
    assert torch.allclose(predicted[:, 1], found, rtol=0.2) and not predicted[:, 2].any()
    assert float(predicted[:, 1].sum() / found.sum()) == pytest.approx(1, rel=0.1)
    moment, whole = damped(hessian[None], 0.0)[0].double(), weights.double()
    plain = torch.einsum("noi,ij,noj->n", off, moment, off) / torch.einsum("noi,ij,noj->n", whole, moment, whole)
    assert torch.allclose(encoded.error.double(), plain, rtol=1e-3)
    alone = expected_error(weights, inputs, row_weight, [scheme], settings)  # a basis of these matrices alone
    assert torch.allclose(alone[:, 0], predicted[:, 1], rtol=0.2)


def test_feedback_knows_the_inputs_of_the_coefficients() -> None:
    """Rounding to nearest loses more, and refining loses less."""
    weights, hessian, _ = problem(4, 40, 96, seed=4)
    scheme, error = Scheme.parse("sb750b2g32a"), []
    directions = shared_basis.directions(shared_basis.energy(weights, torch.ones(4, 40)), hessian, DAMPING, 96)
    inputs = study(hessian.repeat(4, 1, 1), list("abcd"), Settings(), [scheme])
    for settings in (Settings(refine=2), Settings(refine=0), Settings(method="rtn")):
        error.append(float(encode(weights, inputs, scheme, settings, directions).error.sum()))
        again = encode(weights[1:3], inputs.take([1, 2]), scheme, settings, directions).bank.tensors()
        whole = encode(weights, inputs, scheme, settings, directions).bank.tensors()
        for name, tensor in whole.items():  # a chunk of the experts gets the same basis and the same codes
            assert torch.equal(again[name], tensor if name.startswith("basis") else tensor[1:3])
    assert error[0] < error[1] < 0.7 * error[2]
