"""Experts trained as what quantizing makes of them: the grids, the straight-through gradient, and what quantizing finds again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import roundtrip
import torch
from test_distill import FEW, changed, heldout, kl, options, recipe
from torch.func import functional_call

from moecompress.distill import folder as distilling
from moecompress.distill.balance import Balance
from moecompress.distill.folder import distill, trained
from moecompress.distill.loss import divergence, targets
from moecompress.distill.qat import moved, rounded, rounding_of, scheme_of
from moecompress.distill.state import Run, Weights, load, save
from moecompress.distill.train import Settings
from moecompress.errors import UserError
from moecompress.kernels import ops
from moecompress.model.walk import OpenModel
from moecompress.pack import ternary as ternary_format
from moecompress.pack.scheme import INT
from moecompress.quantize import encode as encoding

pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")

EXPERTS = {f"model.layers.{layer}.mlp.experts.{name}" for layer in range(3) for name in ("gate_up_proj", "down_proj")}


def by_hand(weights: torch.Tensor) -> torch.Tensor:
    """MoTE's ternary experts [E, o, i], the scale in bfloat16, halves rounded up."""
    scale = weights.detach().abs().mean((1, 2), keepdim=True).bfloat16().float()
    return scale * (weights.detach() / scale + 0.5).floor().clamp(-1, 1)


def all_by_hand(name: str, parameter: torch.Tensor) -> torch.Tensor:
    halves = parameter.chunk(2, dim=1) if "gate_up" in name else [parameter]
    return torch.cat([by_hand(half) for half in halves], dim=1)


# --- grids ----------------------------------------------------------------------------------------------------------


def test_grids() -> None:
    weights = torch.randn(3, 40, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(weights, scheme_of("ternary")), by_hand(weights))
    signs = rounded(weights, scheme_of("sign"))
    assert torch.equal(signs.sign(), weights.sign())
    torch.testing.assert_close(signs.abs()[..., 0], weights.abs().mean(-1), rtol=2**-8, atol=0)
    lost = []
    for word, values in (("2", 4), ("3", 8), ("4", 16)):
        got = rounded(weights, scheme_of(word))
        groups = got.unflatten(-1, (2, 64)).flatten(0, 2)
        assert max(len(group.unique()) for group in groups) == values
        lost.append(float((got - weights).square().mean()))
    # The best even grids of a Gaussian lose 0.1188, 0.0374 and 0.0115 (Max, 1960); these have a scale for each 64 values.
    assert all(0.7 * one < found < one for found, one in zip(lost, (0.1188, 0.0374, 0.0115), strict=True))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize(("word", "kind"), [("ternary", "absmean"), ("ternary", "lloyd"), ("sign", "lloyd"), ("2", ""), ("3", ""), ("b4g128s", "")])
def test_quantizing_finds_the_trained_values_again(word: str, kind: str, method: str) -> None:
    """Whatever inputs calibration saw: three values and signs bit by bit, integers but for bfloat16's rounding of them."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 48, 128, generator=generator)
    weights[0, 3] = 0
    weights[0, 4, 9:] = 0.01
    scheme = scheme_of(word)
    trained = rounded(weights, scheme).bfloat16().float()
    x = torch.randn(2, 300, 128, generator=generator) * torch.logspace(0, 1.5, 128)
    settings = encoding.Settings(method=method, ternary=kind or "lloyd")
    inputs = encoding.study(x.transpose(1, 2) @ x / 300, ["a", "b"], settings)
    bank = encoding.encode(trained, inputs, scheme.fitted(128), settings).bank
    found = ops.dequantize(bank) if scheme.code == INT else ternary_format.dequantize(bank)  # type: ignore[arg-type]
    if scheme.code == INT:
        assert float((found - trained).norm() / trained.norm()) < 0.006 < 0.1 * float((weights - trained).norm() / trained.norm())
    elif word == "sign":
        assert torch.equal(found, trained)
    else:
        assert torch.equal(found, trained)
        assert torch.equal(rounded(trained, scheme), trained), "rounding again changes nothing"


def test_only_the_furthest_trits_move() -> None:
    """Against a loop over sorted distances; enough steps end where the scale and the trits agree."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(2, 6, 50, generator=generator)
    current = rounded(weights + 0.5 * torch.randn(2, 6, 50, generator=generator), scheme_of("ternary"))
    found = moved(weights, current, 0.02)
    for now, old, w in zip(found, current, weights, strict=True):
        scale, trits = float(old.abs().max()), old.sign().flatten()
        wanted = (w.flatten() / scale).round().clamp(-1, 1)
        ranked = sorted((i for i in range(300) if wanted[i] != trits[i]), key=lambda i: -abs(float(w.flatten()[i] - scale * trits[i])))
        for i in ranked[:6]:
            trits[i] = wanted[i]
        assert torch.equal(now.sign().flatten(), trits)
        least = float((w.flatten() * trits).sum() / trits.square().sum())
        assert float(now.max()) == pytest.approx(least, rel=2**-8) and float(now.min()) == -float(now.max())
    for _ in range(60):
        found = moved(weights, found, 0.02)
    assert torch.equal(moved(weights, found, 1.0), found)
    assert float((found - weights).square().mean()) < float((rounded(weights, scheme_of("ternary")) - weights).square().mean())


@pytest.mark.parametrize("word", ["8", "b16", "t2", "n4g64s", "b3g64a", "three"])
def test_what_experts_cannot_be_trained_as(word: str) -> None:
    with pytest.raises(UserError, match=r"cannot be trained as|no storage scheme"):
        scheme_of(word)


# --- gradients ------------------------------------------------------------------------------------------------------


def test_the_gradient_is_straight_through(tiny_model: Path, text_file: Path) -> None:
    """As autograd finds it for round(w) + (w − w), the first two held fixed."""
    opened = OpenModel(tiny_model, torch.float32)
    model, twin = (distilling.load(tiny_model, torch.float32) for _ in range(2))
    ids = heldout(tiny_model, text_file)[:2]
    with torch.no_grad():
        known = targets(twin(input_ids=ids, use_cache=False).logits, 64)
    weights = Weights(model, trained(opened, "experts"), rounding_of(opened.anatomy, "ternary", None))
    weights.put()
    loss = divergence(model(input_ids=ids, use_cache=False).logits, *known).mean()
    loss.backward()
    weights.take_gradients()

    masters = {name: p.detach().clone().requires_grad_() for name, p in twin.named_parameters() if name in EXPERTS}
    through = {name: p - p.detach() + all_by_hand(name, p) for name, p in masters.items()}
    expected = divergence(functional_call(twin, through, kwargs={"input_ids": ids, "use_cache": False}).logits, *known).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and loss.item() > 0.01
    assert weights.masters.keys() == EXPERTS
    for name, master in weights.masters.items():
        assert torch.equal(master, masters[name])
        torch.testing.assert_close(master.grad, masters[name].grad, rtol=1e-3, atol=1e-8)


def test_balance_is_the_loss_of_switch_transformers(tiny_model: Path, text_file: Path) -> None:
    opened = OpenModel(tiny_model, torch.float32)
    model = distilling.load(tiny_model, torch.float32)
    logits: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: logits.append((args[0].flatten(0, -2) @ module.weight.T).double()))
    balance = Balance(model, opened.anatomy)
    ids = heldout(tiny_model, text_file)[:2]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    logits.clear()
    model(input_ids=ids, use_cache=False)
    loss = balance.take()
    brute = []
    for z in logits:
        p = z.softmax(-1)
        f = torch.stack([(p.topk(2).indices == expert).any(-1).double().mean() / 2 for expert in range(8)])
        brute.append(8 * (f * p.mean(0)).sum())
    assert len(brute) == 3 and float(loss) == pytest.approx(float(sum(brute) / 3), rel=1e-5)
    loss.backward()
    assert all(float(layer.mlp.gate.weight.grad.norm()) > 0 for layer in model.model.layers)


# --- from end to end ------------------------------------------------------------------------------------------------


def test_ternary_experts_learn(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = Settings(steps=8, rate=1e-2, check_every=4, batch=16, accumulate=1, qat="ternary", balance=0.01)
    record = distill(str(tiny_model), str(tiny_model), out, recipe(text_file), settings, "experts+router")
    plain = tmp_path / "plain"
    model = distilling.load(tiny_model, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in EXPERTS:
                parameter.copy_(all_by_hand(name, parameter))
    model.save_pretrained(plain)
    ids = heldout(tiny_model, text_file)
    assert record["before"]["kl_mean"] == pytest.approx(kl(plain, tiny_model, ids), rel=1e-3)
    assert record["heldout"]["kl_mean"] == pytest.approx(kl(out, tiny_model, ids), rel=1e-3)
    assert record["heldout"]["kl_mean"] < 0.9 * record["before"]["kl_mean"]
    new = changed(tiny_model, out)
    assert {name for name in new if "experts" not in name} == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)}
    for name, tensor in roundtrip.stored(out).items():
        if "mlp.experts." in name:
            assert name in new and len(tensor.abs().unique()) == 2, name
    assert not torch.equal(*(roundtrip.stored(f)["model.layers.0.mlp.experts.0.up_proj.weight"].sign() for f in (plain, out)))


def test_a_useless_training_gives_rounded_experts(tiny_model: Path, text_file: Path, tmp_path: Path, moecompress: Callable) -> None:
    ran = moecompress("distill", tiny_model, "--teacher", tiny_model, "-o", tmp_path / "out", "--train", "experts", "--qat", "2", "--steps", 1,
                      "--rate", 1, *options(text_file, FEW))  # fmt: skip
    assert ran.code == 0 and "the student, rounded" in " ".join(ran.err.split()), ran.err
    before, after = roundtrip.stored(tiny_model), roundtrip.stored(tmp_path / "out")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert torch.equal(after[name], rounded(before[name].float()[None], scheme_of("2"))[0].bfloat16())
    assert not torch.equal(after[name], before[name])


def test_a_run_of_few_changes_goes_on_where_it_was_saved(tiny_model: Path, tmp_path: Path) -> None:
    """The codes of a step depend on those before, which masters alone do not tell."""
    opened = OpenModel(tiny_model, torch.float32)
    dtypes = trained(opened, "experts")

    def weights() -> tuple[Weights, torch.optim.Optimizer]:
        made = Weights(distilling.load(tiny_model, torch.float32), dtypes, rounding_of(opened.anatomy, "ternary", 0.01))
        made.put()
        return made, torch.optim.AdamW(made.masters.values())

    first, optimizer = weights()
    before = first.stored()
    with torch.no_grad():
        for master in first.masters.values():
            master += 0.1 * torch.randn(master.shape, generator=torch.Generator().manual_seed(0))
    first.put()
    flips = torch.cat([(first.stored()[name].sign() != before[name].sign()).flatten().float() for name in EXPERTS])
    assert 0.005 < float(flips.mean()) <= 0.01
    save(tmp_path, Run(step=1), first, optimizer)
    second, optimizer = weights()
    assert load(tmp_path, second, optimizer) == Run(step=1)
    for _ in range(2):
        assert all(torch.equal(second.stored()[name], first.stored()[name]) for name in EXPERTS)
        first.put()
        second.put()


@pytest.mark.parametrize(("changes", "complaint"), [
    (["--train", "router", "--qat", "2"], "cannot be rounded without being trained"),
    (["--train", "experts+attention"], "Unknown part of the model"),
    (["--qat", "5"], "no storage scheme"),
    (["--qat", "2", "--qat-share", 0.01], "Only ternary experts can change a share"),
])  # fmt: skip
def test_refusals(changes: list, complaint: str, tiny_model: Path, tmp_path: Path, moecompress: Callable) -> None:
    ran = moecompress("distill", tiny_model, "--teacher", tiny_model, "-o", tmp_path / "out", "--steps", 1, *changes)
    assert ran.code == 2 and complaint in ran.err, ran.err
