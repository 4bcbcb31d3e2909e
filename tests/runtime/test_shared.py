"""Experts without matrices of their own: another's serve for them, scaled, or nobody's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moecompress.errors import UserError
from moecompress.model.experts import DOWN, GATE, UP, ExpertsLayout
from moecompress.runtime.packed import PackedExperts

LAYOUT = ExpertsLayout(experts=5, hidden=32, width=16, transposed=False, concatenated=True, gated=True)
INTO, SHARE = [0, 3, 0, 3, -1], [1.0, 0.5, -0.25, 1.0, 0.0]


class Family(nn.Module):
    """What a family's experts module brings: activation and biases."""

    has_bias = True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj_bias = torch.randn(5, 32)
        self.down_proj_bias = torch.randn(5, 32)

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


@pytest.fixture
def packed() -> PackedExperts:
    torch.manual_seed(0)
    made = PackedExperts(LAYOUT, {p: {"b16": 2} for p in (GATE, UP, DOWN)}, torch.float32)
    for projection in (GATE, UP, DOWN):
        bank = made.banks(projection)["b16"]
        bank.weight.normal_(0, 0.3)
        bank.experts.copy_(torch.tensor([3, 0]))
    made.into.copy_(torch.tensor(INTO))
    made.share.copy_(torch.tensor(SHARE))
    made.check("experts")
    return made


def one(packed: PackedExperts, family: Family, x: torch.Tensor, expert: int) -> torch.Tensor:
    """What the router's expert number ``expert`` gives for x [d]."""
    if INTO[expert] < 0:
        return torch.zeros_like(x)
    own = INTO[expert]
    gate, up, down = (packed.banks(p)["b16"].weight[[3, 0].index(own)] for p in (GATE, UP, DOWN))
    inner = family._apply_gate(torch.cat([gate @ x, up @ x]) + family.gate_up_proj_bias[own])
    return SHARE[expert] * (down @ inner + family.down_proj_bias[own])


@pytest.mark.parametrize("tokens", [7, 200])  # few pairs at once, many expert by expert
def test_whose_matrices_serve(packed: PackedExperts, tokens: int) -> None:
    family, x = Family(), torch.randn(tokens, 32)
    chosen, weights = torch.rand(tokens, 5).topk(3).indices, torch.rand(tokens, 3)
    chosen[0, 0] = 5  # a routing sentinel
    expected = torch.stack([
        sum((w * one(packed, family, x[t], e) for e, w in zip(chosen[t].tolist(), weights[t], strict=True) if e < 5), torch.zeros(32))
        for t in range(tokens)
    ])  # fmt: skip
    torch.testing.assert_close(packed.forward_for(family, x, chosen, weights), expected, rtol=1e-4, atol=1e-5)


def test_dense_matrices_are_scaled_copies(packed: PackedExperts) -> None:
    up, down = packed.dequantized(UP, torch.float32), packed.dequantized(DOWN, torch.float32)
    assert torch.equal(up[1], up[3]) and torch.equal(up[2], up[0]) and not torch.equal(up[0], up[3])
    assert torch.equal(down[1], 0.5 * down[3]) and torch.equal(down[2], -0.25 * down[0]) and not down[4].any()


@pytest.mark.parametrize("into", [[0, 1, 0, 3, -1], [0, 4, 0, 3, -1], [0, 2, 0, 3, -1], [0, 3, 0, 9, -1]])
def test_damage_is_found(packed: PackedExperts, into: list[int]) -> None:
    packed.into.copy_(torch.tensor(into))
    with pytest.raises(UserError, match="damaged"):
        packed.check("experts")
