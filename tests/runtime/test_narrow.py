"""Experts with fewer neurons than the family's module has places for: against the products of their own matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moecompress.errors import UserError
from moecompress.model.experts import DOWN, GATE, UP, ExpertsLayout
from moecompress.pack.scheme import Scheme
from moecompress.quantize.encode import Settings, encode
from moecompress.runtime.packed import PackedExperts

#: Expert -> neurons that it is left with.
WIDTHS = {0: 64, 1: 48, 2: 16, 3: 48, 4: 64}
EXPERTS, HIDDEN, WIDTH = 5, 32, 64


class Family(nn.Module):
    """What a family's experts module brings: activation and biases, here such that no place is left at zero."""

    has_bias = True

    def __init__(self, layout: ExpertsLayout) -> None:
        super().__init__()
        self.layout = layout
        self.gate_up_proj_bias = torch.randn(EXPERTS, 2 * WIDTH)
        self.up_proj_bias = torch.randn(EXPERTS, WIDTH)
        self.down_proj_bias = torch.randn(EXPERTS, HIDDEN)

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1) if self.layout.concatenated else (both[..., ::2], both[..., 1::2])
        return nn.functional.silu(gate) * (up + 1)

    def act_fn(self, up: torch.Tensor) -> torch.Tensor:
        return (up + 0.5).square()

    def one(self, matrices: dict[str, torch.Tensor], expert: int, x: torch.Tensor) -> torch.Tensor:
        """x [d] through an expert of its own matrices [m', d] and [d, m']."""
        width = matrices[UP].shape[0]
        if not self.layout.gated:
            return matrices[DOWN] @ self.act_fn(matrices[UP] @ x + self.up_proj_bias[expert, :width]) + self.down_proj_bias[expert]
        bias = self.gate_up_proj_bias[expert]
        gate, up = bias.chunk(2) if self.layout.concatenated else (bias[::2], bias[1::2])
        inner = nn.functional.silu(matrices[GATE] @ x + gate[:width]) * (matrices[UP] @ x + up[:width] + 1)
        return matrices[DOWN] @ inner + self.down_proj_bias[expert]


def packed_of(layout: ExpertsLayout, codes: tuple[str, str]) -> tuple[PackedExperts, dict[int, dict[str, torch.Tensor]]]:
    """Experts in banks of two codes, by turns, and the matrices of each as its bank alone gives them."""
    torch.manual_seed(0)
    members: dict[str, dict[str, list[int]]] = {p: {} for p in layout.projections}
    for place, projection in enumerate(layout.projections):
        for expert, width in WIDTHS.items():
            name = codes[(expert // 2 + place) % 2] + (f"w{width}" if width < WIDTH else "")
            members[projection].setdefault(name, []).append(expert)
    contents = {p: {name: len(found) for name, found in banks.items()} for p, banks in members.items()}
    packed = PackedExperts(layout, contents, torch.float32, seed=3)
    matrices: dict[int, dict[str, torch.Tensor]] = {expert: {} for expert in WIDTHS}
    for projection, banks in members.items():
        for name, experts in banks.items():
            scheme, bank = Scheme.parse(name), packed.banks(projection)[name]
            shape = layout.shape(projection, scheme.width)
            weights = torch.randn(len(experts), *shape) * 0.3
            if scheme.bits == 16:
                bank.weight.copy_(weights)
            else:
                for key, value in encode(weights, None, scheme.fitted(shape[1]), Settings(method="rtn", seed=3)).bank.tensors().items():
                    getattr(bank, key).copy_(value)
            bank.experts.copy_(torch.tensor(experts))
            for expert, matrix in zip(experts, bank.dequantized(torch.float32), strict=True):
                matrices[expert][projection] = matrix
    packed.check("experts")
    return packed, matrices


@pytest.mark.parametrize("gated,concatenated", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("codes", [("b16", "b16"), ("t2", "b4g0s"), ("t1_5", "t3"), ("ternary", "b16")])
@pytest.mark.parametrize("tokens", [7, 200])  # few pairs at once, many expert by expert
def test_each_by_its_own_matrices(codes: tuple[str, str], gated: bool, concatenated: bool, tokens: int) -> None:
    layout = ExpertsLayout(EXPERTS, HIDDEN, WIDTH, False, concatenated, gated)
    packed, matrices = packed_of(layout, codes)
    family, x = Family(layout), torch.randn(tokens, HIDDEN)
    chosen, weights = torch.rand(tokens, EXPERTS).topk(2).indices, torch.rand(tokens, 2)
    chosen[0, 0] = EXPERTS  # a routing sentinel
    expected = torch.stack([
        sum((w * family.one(matrices[e], e, x[t]) for e, w in zip(chosen[t].tolist(), weights[t], strict=True) if e < EXPERTS),
            torch.zeros(HIDDEN))
        for t in range(tokens)
    ])  # fmt: skip
    found = packed.forward_for(family, x, chosen, torch.where(chosen == EXPERTS, 0, weights))
    error = (found - expected).norm() / expected.norm()
    assert error < (2e-2 if tokens == 7 and "b16" not in codes else 1e-2), float(error)  # kernels round inputs to 8 bits
    if codes == ("b16", "b16"):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dense_matrices_end_in_zeros() -> None:
    layout = ExpertsLayout(EXPERTS, HIDDEN, WIDTH, False, True, True)
    packed, matrices = packed_of(layout, ("t2", "b4g0s"))
    for projection in layout.projections:
        whole = packed.dequantized(projection, torch.float32)
        for expert, width in WIDTHS.items():
            own = whole[expert][:, :width] if projection == DOWN else whole[expert][:width]
            rest = whole[expert][:, width:] if projection == DOWN else whole[expert][width:]
            assert torch.equal(own, matrices[expert][projection]) and not rest.any()


def test_gradients_reach_the_inputs() -> None:
    layout = ExpertsLayout(EXPERTS, HIDDEN, WIDTH, False, True, True)
    packed, matrices = packed_of(layout, ("t2", "b16"))
    family = Family(layout)
    x = torch.randn(1, HIDDEN, requires_grad=True)
    packed.forward_for(family, x, torch.tensor([[2]]), torch.ones(1, 1)).sum().backward()
    other = x.detach()[0].requires_grad_()
    family.one(matrices[2], 2, other).sum().backward()
    assert (x.grad[0] - other.grad).norm() < 2e-2 * other.grad.norm()


@pytest.mark.parametrize("contents", [{"b16": 4, "b16w64": 1}, {"b16": 4, "b16w80": 1}, {"b16": 4, "b16w0": 1}, {"b16": 4, "w16": 1}])
def test_widths_that_cannot_be(contents: dict[str, int]) -> None:
    layout = ExpertsLayout(EXPERTS, HIDDEN, WIDTH, False, True, True)
    with pytest.raises(UserError, match=r"neurons left|no storage scheme"):
        PackedExperts(layout, {p: contents for p in layout.projections}, torch.float32)


def test_matrices_of_an_expert_that_differ_in_width() -> None:
    layout = ExpertsLayout(EXPERTS, HIDDEN, WIDTH, False, True, True)
    packed, _ = packed_of(layout, ("b16", "b16"))
    packed.banks(UP)["b16w16"].experts[0], packed.banks(UP)["b16"].experts[0] = 0, 2
    with pytest.raises(UserError, match="how many neurons"):
        packed.check("experts")
