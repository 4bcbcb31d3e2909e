"""Adaptive granularity (FineQuant, arXiv:2308.09723): listed as candidates, group sizes are chosen matrix by matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moecompress.allocate.candidates import Candidate, Unit, prices, unit_id
from moecompress.allocate.plan import make_plan
from moecompress.quantize.encode import Settings, encode, expected_error, study
from moecompress.recipe import AllocateRecipe

GROUPS = [Candidate(3, group, False) for group in (0, 128, 64, 32)]
ROWS, COLS, EXPERTS = 48, 256, 8


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Weights and Hessians of eight matrices, and their predicted harm under every group size. In the last four the columns
    differ in size, by blocks of 32, so one scale for many columns fits few of them."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(EXPERTS, ROWS, COLS, generator=generator)
    blocks = torch.rand(EXPERTS // 2, 1, COLS // 32, generator=generator).mul(8).sub(4).exp().repeat_interleave(32, -1)
    weights[EXPERTS // 2 :] *= blocks / blocks.square().mean(-1, keepdim=True).sqrt()
    x = torch.randn(EXPERTS, 400, COLS, generator=generator)
    hessian = x.transpose(1, 2) @ x / 400
    inputs = study(hessian, list("abcdefgh"), Settings(), GROUPS)
    return weights, hessian, expected_error(weights, inputs, torch.ones(EXPERTS, ROWS), GROUPS, Settings()).numpy()


def planned(harm: np.ndarray, columns: list[int], budget: int) -> list[str]:
    units = [Unit(unit_id(0, e, "up"), 0, e, "up", ROWS, COLS) for e in range(EXPERTS)]
    plan = make_plan(units, [GROUPS[c] for c in columns], harm[:, columns], budget, AllocateRecipe())
    assert plan.bytes <= budget
    return [choice.candidate for choice in plan.choices]


def harm_of(harm: np.ndarray, names: list[str]) -> float:
    column = {candidate.name: index for index, candidate in enumerate(GROUPS)}
    return sum(harm[e, column[name]] for e, name in enumerate(names))


def test_small_groups_go_where_they_help(layer):
    weights, hessian, harm = layer
    price = prices([Unit("L00.E000.up", 0, 0, "up", ROWS, COLS)], GROUPS)[0]
    assert list(price) == sorted(price)  # smaller groups, more scales
    budget = EXPERTS * int(price[2])  # what groups of 64 for everything weigh
    mixed = planned(harm, [0, 1, 2, 3], budget)
    assert len(set(mixed)) > 1
    groups = [COLS // (Candidate.parse(name).group or COLS) for name in mixed]
    assert min(groups[EXPERTS // 2 :]) >= max(groups[: EXPERTS // 2]) and sum(groups[EXPERTS // 2 :]) >= 2 * sum(groups[: EXPERTS // 2])
    one = planned(harm, [2], budget)
    assert harm_of(harm, mixed) < 0.95 * harm_of(harm, one)
    settings = Settings()
    inputs = study(hessian, list("abcdefgh"), settings, GROUPS)

    def lost(names: list[str]) -> float:
        """What really comes out."""
        errors = [encode(weights[e : e + 1], inputs.take([e]), Candidate.parse(name), settings).error for e, name in enumerate(names)]
        whole = torch.einsum("noi,nij,noj->n", weights, hessian, weights)
        return float((torch.cat(errors) * whole).sum())

    assert lost(mixed) < 0.97 * lost(one)


def test_equal_matrices_gain_nothing_by_mixing(layer):
    """Where all matrices are alike, all sizes of groups a budget allows are worth the same to each of them."""
    _, _, harm = layer
    alike = np.repeat(harm[:1], EXPERTS, axis=0)
    budget = EXPERTS * int(prices([Unit("L00.E000.up", 0, 0, "up", ROWS, COLS)], GROUPS)[0, 2])
    assert harm_of(alike, planned(alike, [0, 1, 2, 3], budget)) > 0.97 * harm_of(alike, planned(alike, [2], budget))
