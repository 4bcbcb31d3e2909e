"""Layers and folders with shared bases: one product with the basis for each token, bytes as priced, damage refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moecompress import pipeline, plans
from moecompress.errors import UserError
from moecompress.model.experts import ExpertsLayout
from moecompress.pack.scheme import Scheme
from moecompress.quantize.encode import Settings, encode
from moecompress.recipe import recipe_from
from moecompress.runtime.bank import SharedBasis, make_bank
from moecompress.runtime.packed import PackedExperts

SMALL = ["calibration.sequences=6", "calibration.length=48", "calibration.heldout=2", "compute.micro_batch=2", "compute.dtype=float32"]
BASED = [{"code": "shared-basis", "bits": 4, "rank": 0.5}, {"code": "shared-basis", "bits": 8, "rank": 0.9}]
IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, text_file) -> tuple[Path, pipeline.Result, pipeline.Job]:
    """Every matrix has a shared basis, of one of two ranks."""
    out = tmp_path_factory.mktemp("bases") / "out"
    recipe = recipe_from([*SMALL, f"calibration.text={json.dumps(str(text_file))}", "allocate.compare=none", "target.bits=9.5",
                          f"allocate.candidates={json.dumps(BASED)}"])  # fmt: skip
    job = pipeline.make_job(str(tiny_model), recipe)
    return out, pipeline.quantize(job, out), job


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return torch.log_softmax(model(ids).logits, -1)


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


def test_what_was_written_measures_the_same_in_transformers(made, tiny_model):
    out, result, job = made
    original, loaded = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tiny_model, out))
    kl = [float((p.exp() * (p - logits(loaded, ids))).sum(-1).mean()) for ids in job.heldout for p in [logits(original, ids)]]
    assert sum(kl) / len(kl) == pytest.approx(result.measured["plan"]["kl_mean"], rel=0.02)


def test_bytes_are_those_that_were_priced(made):
    out, result, job = made
    names = {choice.candidate for choice in result.plan.choices}
    assert names == {"sb500b4g64s", "sb900b8g64s"} and result.manifest["bits_per_weight"] <= 9.5
    tensors = {name: tensor for shard in out.glob("model-layer-*") for name, tensor in load_file(shard).items() if "_banks." in name}
    bases = sum(tensor.nbytes for name, tensor in tensors.items() if ".basis_" in name)
    assert bases == plans.shared_bytes_of(job.opened.anatomy, result.plan) > 0
    assert sum(t.nbytes for t in tensors.values()) == result.plan.bytes + 4 * len(result.plan.choices) + bases
    assert result.manifest["expert_bytes"] == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("target", ["target.bits=6.5", "target.bits=8", "target.size=420000", "target.size=500000"])
def test_no_plan_is_larger_than_its_target(made, tiny_model, target):
    """Bases are a third of what all matrices of this model weigh."""
    _, result, job = made
    recipe = recipe_from([target, f"allocate.candidates={json.dumps(BASED)}", "calibration.heldout=2", "allocate.drop=false"])
    job = pipeline.make_job(str(tiny_model), recipe, tokens=job.tokens)
    for plan in plans.plan(job, result.statistics):
        if recipe.target.size is not None:
            assert plans.written_bytes(job, plan) <= recipe.target.size
        else:
            anatomy = job.opened.anatomy
            whole = plan.bytes + plans.shared_bytes_of(anatomy, plan) + plans.index_bytes(anatomy)
            assert whole <= recipe.target.bits * anatomy.expert_weights / 8


def test_predictions_hold(made):
    """Made with bases of all experts; what was written has bases of those that use them."""
    manifest = json.loads((made[0] / "moecompress" / "manifest.json").read_text())
    ratio = manifest["prediction"]["ratio"]
    assert set(ratio) == {"sb500b4g64s", "sb900b8g64s"} and all(0.6 < value < 1.5 for value in ratio.values())


def test_saved_again_and_exported_it_says_the_same(made, tmp_path, moecompress):
    out, _, _ = made
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "again")
    assert moecompress("export", out, "-o", tmp_path / "dense", "--dtype", "float32").code == 0
    for folder in (tmp_path / "again", tmp_path / "dense"):
        assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)), logits(loaded), atol=1e-3)


def test_a_basis_that_is_no_number_is_refused(made, tmp_path, moecompress):
    folder = Path(shutil.copytree(made[0], tmp_path / "packed"))
    (folder / "moecompress" / "manifest.json").unlink()  # as in a folder saved again: only the content can tell
    shard = sorted(folder.glob("model-layer-*"))[0]
    tensors = load_file(shard)
    name = next(name for name in sorted(tensors) if name.endswith(".basis_row_scales"))
    tensors[name][1] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match="'basis_row_scales'"):
        AutoModelForCausalLM.from_pretrained(folder)
    ran = moecompress("run", folder, "--prompt", "The", "-n", 1)
    assert ran.code == 2 and "basis_row_scales" in ran.err and "Traceback" not in ran.err
