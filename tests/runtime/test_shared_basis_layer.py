"""A layer whose experts share bases: one product with the basis for each token, and what comes out is what plain products give."""

from __future__ import annotations

import pytest
import torch

from moecompress.model.experts import ExpertsLayout
from moecompress.pack.scheme import Scheme
from moecompress.quantize.encode import Settings, encode
from moecompress.runtime.bank import SharedBasis, make_bank
from moecompress.runtime.packed import PackedExperts


@pytest.mark.parametrize("tokens", [3, 200])  # pairs at once, or expert by expert
def test_a_token_meets_the_basis_once(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layout = ExpertsLayout(4, hidden=64, width=32, transposed=False, concatenated=True, gated=True)
    names = {"sb500b4g0a": [0, 2], "sb750b3g0s": [1], "b4g32s": [3]}
    experts = PackedExperts(layout, {p: {name: len(own) for name, own in names.items()} for p in ("gate", "up", "down")}, torch.float32)
    for projection in experts.contents:
        rows, cols = layout.shape(projection)
        for name, own in names.items():
            bank = make_bank(Scheme.parse(name), len(own), rows, cols, torch.float32)
            for key, tensor in encode(torch.randn(len(own), rows, cols) / 8, None, Scheme.parse(name), Settings()).bank.tensors().items():
                getattr(bank, key).copy_(tensor)
            bank.register_buffer("experts", torch.tensor(own, dtype=torch.int32))
            experts.banks(projection)[name] = bank
    experts.check("experts")
    module = torch.nn.Module()
    module._apply_gate = lambda both: torch.nn.functional.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1]
    chosen = torch.stack([torch.randperm(4)[:3] for _ in range(tokens)])
    x, weights, seen = torch.randn(tokens, 64), torch.rand(tokens, 3), []
    reduced = SharedBasis.reduced
    monkeypatch.setattr(SharedBasis, "reduced", lambda bank, x: seen.append(len(x)) or reduced(bank, x))
    y = experts.forward_for(module, x, chosen, weights)
    assert seen == 4 * [tokens]  # two banks, gate and up; not once for each of three experts
    gate, up, down = (experts.dequantized(p, torch.float32)[chosen] for p in ("gate", "up", "down"))
    inner = torch.nn.functional.silu(torch.einsum("tkoi,ti->tko", gate, x)) * torch.einsum("tkoi,ti->tko", up, x)
    wanted = torch.einsum("tkoi,tki,tk->to", down, inner, weights)
    assert torch.allclose(y, wanted, atol=5e-3 * float(wanted.abs().max()))
    x.requires_grad_()
    experts.forward_for(module, x, chosen, weights).square().sum().backward()
    given = x.grad.clone()
    x.grad = None
    inner = torch.nn.functional.silu(torch.einsum("tkoi,ti->tko", gate, x)) * torch.einsum("tkoi,ti->tko", up, x)
    torch.einsum("tkoi,tki,tk->to", down, inner, weights).square().sum().backward()
    assert torch.allclose(given, x.grad, atol=1e-2 * float(given.abs().max()))
