"""Vector codes: the book against plain k-means, assignment against brute force, and what feedback and sharing are worth."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from moecompress.pack import vector as form
from moecompress.pack.scheme import Scheme
from moecompress.quantize import vector
from moecompress.quantize.encode import Settings, encode, expected_error, study


def some(experts: int = 3, rows: int = 32, cols: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [E, o, i] with rows of several sizes, and correlated inputs' second moments [E, i, i]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(experts, 300, cols, generator=generator) @ (torch.eye(cols) + 0.15 * torch.randn(cols, cols, generator=generator))
    weights = torch.randn(experts, rows, cols, generator=generator) * torch.rand(experts, rows, 1, generator=generator).add(0.2)
    return weights, x.transpose(1, 2) @ x / 300


def studied(hessian: torch.Tensor, name: str = "v2"):
    return study(hessian, [str(i) for i in range(len(hessian))], Settings(), [Scheme.parse(name)])


def test_a_sample_is_of_normalised_rows_with_their_costs():
    weights, hessian = some()
    importance = hessian.diagonal(dim1=-2, dim2=-1)
    values, cost = vector.sample(weights, importance, 2, 10**6)  # all there are
    assert values.shape == cost.shape == (3 * 32 * 16, 4)
    scale = vector.row_scales(weights).float()[..., None]
    whole = torch.cat([(weights / scale).unflatten(-1, (16, 4)), (importance[:, None] * scale.square()).unflatten(-1, (16, 4))], -1).view(-1, 8)
    assert sorted(map(tuple, torch.cat([values, cost], 1).tolist())) == sorted(map(tuple, whole.tolist()))
    few, _ = vector.sample(weights, importance, 2, 50)
    assert len(few) == 50 and all((values == one).all(1).any() for one in few)


def test_assignment_is_the_cheapest_entry():
    values, cost, book = torch.randn(200, 4), torch.rand(200, 4), torch.randn(16, 4)
    code, spent = vector.assign(values, cost, book)
    every = (cost[:, None].double() * (values[:, None].double() - book[None].double()).square()).sum(-1)
    assert torch.allclose(spent.double(), every.min(1).values, atol=1e-5)
    assert torch.allclose(every.gather(1, code[:, None])[:, 0], every.min(1).values, atol=1e-5)


def test_training_finds_clusters_and_uses_every_entry():
    centres = torch.tensor(list(product((-3.0, -1.0, 1.0, 3.0), repeat=4)))  # 256 of them
    values = (centres + 0.01 * torch.randn(40, 256, 4)).flatten(0, 1)[torch.randperm(40 * 256)]
    book = vector.train(values, torch.ones_like(values), 2, 30).float()
    _, spent = vector.assign(values, torch.ones_like(values), book)
    first = vector.assign(values, torch.ones_like(values), values[:256])[1].mean()
    assert spent.mean() < 0.35 * first
    code, _ = vector.assign(values, torch.ones_like(values), book)
    assert len(code.unique()) > 250


@pytest.mark.parametrize("feedback", [True, False])
def test_one_vector_takes_the_entry_of_least_error(feedback):
    """With a single vector there is nothing to spread: the search is exact."""
    weights, hessian = some(cols=4)
    book = torch.randn(256, 4).bfloat16()
    lower = torch.linalg.cholesky(hessian) if feedback else None
    bank = vector.encode(weights, hessian, lower, book, 2)
    index = form.unpack(bank)[..., 0]
    units = weights / vector.row_scales(weights).float()[..., None]
    off = units[:, :, None].double() - book.double()  # (n, o, K, d)
    every = torch.einsum("nokd,nde,noke->nok", off, hessian.double(), off)
    assert torch.allclose(every.gather(2, index[..., None])[..., 0], every.min(2).values, rtol=1e-4)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_feedback_and_sweeps_lower_the_error_and_the_error_is_the_true_one(name):
    weights, hessian = some(cols=67)
    inputs, scheme = studied(hessian, name), Scheme.parse(name)
    errors = [encode(weights, inputs, scheme, Settings(refine=refine)).error.mean() for refine in (0, 2)]
    plain = encode(weights, None, scheme, Settings())
    whole = torch.einsum("noi,nij,noj->n", weights, hessian, weights).double()

    def true(bank) -> torch.Tensor:
        off = weights.double() - form.dequantize(bank).double()
        return (off @ hessian.double() * off).sum((1, 2)) / whole

    refined = encode(weights, inputs, scheme, Settings())
    assert torch.allclose(refined.error.double(), true(refined.bank), rtol=1e-3)
    assert errors[1] < 0.97 * errors[0] and errors[0] < 0.95 * true(plain.bank).mean()


def test_sweeps_never_lose_under_the_hessian_they_are_given():
    weights, hessian = some()
    book = vector.train(*vector.sample(weights, hessian.diagonal(dim1=-2, dim2=-1), 2, 10**4), 2)
    lower = torch.linalg.cholesky(hessian)

    def lost(refine: int) -> torch.Tensor:
        off = weights.double() - form.dequantize(vector.encode(weights, hessian, lower, book, 2, refine)).double()
        return (off @ hessian.double() * off).sum(-1)

    one, two, four = lost(0), lost(1), lost(4)
    assert (two <= 1.01 * one).all() and (four <= 1.01 * two).all() and four.sum() < one.sum()  # scales are rounded to bfloat16


def test_a_book_of_all_experts_serves_each():
    weights, hessian = some(experts=4, rows=64)
    own = torch.cat([encode(w[None], studied(h[None]), Scheme.parse("v2"), Settings()).error for w, h in zip(weights, hessian, strict=True)])
    book = vector.train(*vector.sample(weights, hessian.diagonal(dim1=-2, dim2=-1), 2, 10**5), 2)
    shared = encode(weights, studied(hessian), Scheme.parse("v2"), Settings(), book)
    assert torch.equal(shared.bank.tensors()["book"], book)
    assert (shared.error < 1.6 * own).all()  # a book of its own fits a quarter of the vectors better


def test_prediction_is_near_what_comes_out():
    weights, hessian = some(experts=2, rows=128)
    schemes = [Scheme.parse(name) for name in ("v1", "v2", "t2", "b2g64a")]
    inputs = study(hessian, ["a", "b"], Settings(), schemes)
    predicted = expected_error(weights, inputs, torch.ones(2, 128), schemes, Settings())
    whole = torch.einsum("noi,nij,noj->n", weights, hessian, weights).double()
    found = torch.stack([encode(weights, inputs, scheme, Settings()).error.double() for scheme in schemes], 1) * whole[:, None]
    assert (predicted / found > 0.5).all() and (predicted / found < 2).all(), predicted / found


def test_rows_of_zeros_and_experts_without_a_factor():
    weights, hessian = some(experts=2)
    weights[0, 3] = 0
    hessian[1] = 100 * torch.ones(64, 64) - 99 * torch.eye(64)  # indefinite by far
    settings = Settings(allow_fallback=True)
    inputs = study(hessian, ["a", "b"], settings, [Scheme.parse("v2")])
    assert inputs.fallen.tolist() == [False, True]
    encoded = encode(weights, inputs, Scheme.parse("v2"), settings)
    stored = form.dequantize(encoded.bank)
    assert torch.isfinite(stored).all() and stored[0, 3].abs().max() < 1e-6 and (encoded.error < 0.5).all()
