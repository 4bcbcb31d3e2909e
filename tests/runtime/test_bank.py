"""Banks of every code: what was encoded is what they multiply with, and a layer may mix them."""

from __future__ import annotations

import pytest
import torch

from moecompress.errors import UserError
from moecompress.kernels import trellis as native
from moecompress.model.experts import ExpertsLayout
from moecompress.pack.scheme import Scheme
from moecompress.quantize.encode import Settings, encode, study
from moecompress.runtime.bank import PackedBank, make_bank, turn, turn_back
from moecompress.runtime.packed import PackedExperts

NAMES = ["b3g32s", "b2g64a", "b2g64a_o1", "b4g32s_o0_5", "n3g64s", "n4g32s", "lr250s50", "lr125s0", "sb500b4g32a", "sb250b3g0s", "t0_5", "t1_25", "t2", "t3",
         "v1", "v1_5", "v2", "v3", "ternary", "sign", "d0_8", "b16"]  # fmt: skip
SEED = 5


def filled(name: str, weights: torch.Tensor) -> tuple[PackedBank, torch.Tensor]:
    """A bank of these matrices, and each one's relative squared error as the encoder reported it."""
    scheme, (count, rows, cols) = Scheme.parse(name).fitted(weights.shape[2]), weights.shape
    bank = make_bank(scheme, count, rows, cols, torch.float32, SEED)
    if scheme.bits == 16:
        bank.weight.copy_(weights)
        return bank, torch.zeros(count)
    settings = Settings(seed=SEED)
    inputs = study(torch.eye(cols).repeat(count, 1, 1), [str(i) for i in range(count)], settings, [scheme])
    encoded = encode(weights, inputs, scheme, settings)
    tensors = encoded.bank.tensors()
    expected = scheme.tensors(count, rows, cols, torch.float32)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()} == expected
    assert sum(t.nbytes for t in tensors.values()) == count * scheme.price(rows, cols) + scheme.shared_bytes(cols)
    for key, value in tensors.items():
        getattr(bank, key).copy_(value)
    return bank, encoded.error


@pytest.fixture(autouse=True)
def _needs_the_encoder(request: pytest.FixtureRequest) -> None:
    if not native.available():
        pytest.skip("the compiled encoder is not there")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (33, 70)])
def test_bank_multiplies_with_what_was_encoded(name: str, rows: int, cols: int) -> None:
    torch.manual_seed(0)
    weights = torch.randn(3, rows, cols)
    bank, error = filled(name, weights)
    dense = bank.dequantized(torch.float32)
    lost = (dense - weights).square().sum((1, 2)) / weights.square().sum((1, 2))
    assert torch.allclose(lost, error, rtol=1e-2, atol=1e-6)
    x, slots = torch.randn(5, cols), torch.tensor([2, -1, 0, 2, 1], dtype=torch.int32)
    y = turn_back(bank.matmul(turn(x, SEED), slots), SEED) if bank.turns else bank.matmul(x, slots)
    wanted = torch.stack([dense[s].double() @ v.double() if s >= 0 else torch.zeros(rows).double() for s, v in zip(slots, x, strict=True)])
    assert torch.allclose(y.double(), wanted, atol=2e-3 * float(wanted.abs().max()))


def test_a_layer_may_mix_codes() -> None:
    torch.manual_seed(1)
    layout = ExpertsLayout(len(NAMES), hidden=64, width=32, transposed=False, concatenated=True, gated=True)
    experts = PackedExperts(layout, {p: dict.fromkeys(sorted(NAMES), 1) for p in ("gate", "up", "down")}, torch.float32, SEED)
    for projection in experts.contents:
        rows, cols = layout.shape(projection)
        for index, name in enumerate(sorted(NAMES)):
            bank, _ = filled(name, torch.randn(1, rows, cols))
            bank.register_buffer("experts", torch.tensor([index], dtype=torch.int32))
            experts.banks(projection)[name] = bank
    x, expert = torch.randn(20, 64), torch.arange(20) % len(NAMES)
    dense = experts.dequantized("up", torch.float32)
    y = experts.project("up", x, expert, experts.turned("up", x))
    assert torch.allclose(y, torch.einsum("soi,si->so", dense[expert], x), atol=2e-3 * float(y.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_input_is_that_of_the_plain_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moecompress.runtime.bank.UNPACKED", 2 * 33 * 70)  # more than one batch of matrices
    torch.manual_seed(2)
    bank, _ = filled(name, torch.randn(3, 33, 70))
    dense = bank.dequantized(torch.float32)
    slots = torch.tensor([2, -1, 0, 2, 1], dtype=torch.int32)
    x, given = torch.randn(5, 70, requires_grad=True), torch.randn(5, 33)
    y = turn_back(bank.product(turn(x, SEED), slots), SEED) if bank.turns else bank.product(x, slots)
    y.backward(given)
    wanted = torch.stack([g @ dense[s] if s >= 0 else torch.zeros(70) for s, g in zip(slots, given, strict=True)])
    assert x.grad is not None and torch.allclose(x.grad, wanted, atol=1e-4 * float(wanted.abs().max()))
    with torch.no_grad():
        assert not bank.product(turn(x, SEED) if bank.turns else x, slots).requires_grad


@pytest.mark.parametrize("tokens", [3, 200])  # pairs at once, or expert by expert
def test_gradients_reach_input_and_weights_of_a_packed_layer(tokens: int) -> None:
    torch.manual_seed(3)
    layout = ExpertsLayout(2, hidden=64, width=32, transposed=False, concatenated=True, gated=True)
    experts = PackedExperts(layout, {p: {"t2": 1, "b3g32s": 1} for p in ("gate", "up", "down")}, torch.float32, SEED)
    for projection in experts.contents:
        for index, name in enumerate(("t2", "b3g32s")):
            bank, _ = filled(name, torch.randn(1, *layout.shape(projection)) / 8)
            bank.register_buffer("experts", torch.tensor([index], dtype=torch.int32))
            experts.banks(projection)[name] = bank
    module = torch.nn.Module()
    module._apply_gate = lambda both: torch.nn.functional.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1]
    chosen = torch.tensor([[0, 1]]).expand(tokens, 2)
    given = torch.randn(tokens, 64)
    found = []
    for packed in (True, False):
        x, weights = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(4)), torch.full((tokens, 2), 0.4)
        x.requires_grad_(), weights.requires_grad_()
        if packed:
            y = experts.forward_for(module, x, chosen, weights)
        else:
            gate, up, down = (experts.dequantized(p, torch.float32) for p in ("gate", "up", "down"))
            y = sum(weights[:, e, None] * (torch.nn.functional.silu(x @ gate[e].T) * (x @ up[e].T)) @ down[e].T for e in (0, 1))
        y.backward(given)
        found.append((x.grad, weights.grad))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=3e-3 * float(other.abs().max()))


@pytest.mark.parametrize("name", ["t0_5", "t2", "t2_5", "v1_5", "v2", "ternary", "sign", "d0_8", "b3g64s", "b2g64a_o1", "b4g0s_o0_5", "n4g64s",
                                  "lr250s50", "lr5s0", "sb500b4g64a", "sb5b2g0s", "b16"])  # fmt: skip
def test_names_come_back(name: str) -> None:
    assert Scheme.parse(name).name == name


@pytest.mark.parametrize("name", ["t5", "v4", "v2_o1", "t2.5", "b1g64s", "b3g63s", "n2g64s", "n4g64a", "b8g64s_o1", "b2g64a_o3", "n4g64s_o1",
                                  "t2_o1", "lr0s5", "lr025s0", "lr500s0", "lr25", "sb500", "sb0b4g64a", "sb1000b4g64a", "sb500b16g0s", "int"])  # fmt: skip
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="no storage scheme"):
        Scheme.parse(name)
