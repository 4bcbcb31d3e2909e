"""Distilling a pruned tiny model: what changes, what does not, and that a killed run ends like a whole one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import roundtrip
import torch
from safetensors.torch import load_file, save_file
from tiny import head_class, tiny_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from moecompress import pipeline
from moecompress.calibrate.data import split_heldout, token_batches
from moecompress.distill import folder as distilling
from moecompress.distill import train as training
from moecompress.distill.folder import distill, needed, trained
from moecompress.distill.loss import divergence, targets
from moecompress.distill.state import Run, Weights, best
from moecompress.distill.train import Settings, train
from moecompress.errors import UserError
from moecompress.model import families
from moecompress.model.skeleton import load_tokenizer
from moecompress.model.walk import OpenModel
from moecompress.pack.manifest import read_manifest
from moecompress.prune import prune
from moecompress.recipe import Recipe, recipe_from, step_from

pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")

ALWAYS = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
OTHERS = [f for f in families.INTERFACE if f not in (*ALWAYS, *families.FAILS)]
CALIBRATION = {"sequences": 256, "length": 32, "heldout": 8}
FEW = {"sequences": 20, "length": 32, "heldout": 2}
START = "import sys; from moecompress.cli import main; sys.argv = ['moecompress', *sys.argv[1:]]; main()"


def recipe(text: Path, amount: dict = CALIBRATION) -> Recipe:
    return recipe_from([f"calibration.text={json.dumps(str(text))}", *(f"calibration.{k}={v}" for k, v in amount.items())])


def options(text: Path, amount: dict = FEW) -> list[str]:
    return ["--text", str(text), *(part for k, v in amount.items() for part in ("--set", f"calibration.{k}={v}"))]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Path:
    """The tiny model with half of its experts. Do not change it."""
    out = tmp_path_factory.mktemp("student") / "half"
    step = step_from({"method": "reap", "keep": 0.5, "max_kl": None})
    prune(pipeline.make_job(str(tiny_model), recipe(text_file, FEW).model_copy(update={"transform": (step,)})), out)
    return out


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, student: Path, tiny_model: Path, text_file: Path) -> tuple[Path, dict]:
    """A few steps on everything."""
    out = tmp_path_factory.mktemp("distilled") / "out"
    settings = Settings(steps=14, rate=1e-3, check_every=7, batch=16, accumulate=1)
    return out, distill(str(student), str(tiny_model), out, recipe(text_file), settings)


def heldout(folder: Path, text: Path) -> torch.Tensor:
    tokens = token_batches(load_tokenizer(folder), text, CALIBRATION["sequences"], CALIBRATION["length"])
    return split_heldout(tokens, CALIBRATION["heldout"])[1].ids


@torch.no_grad()
def kl(student: Path, teacher: Path, ids: torch.Tensor) -> float:
    """By plain transformers, in float64."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (teacher, student)]
    p, q = (model(input_ids=ids).logits.double().log_softmax(-1) for model in models)
    return float((p.exp() * (p - q)).sum(-1).mean())


def changed(before: Path, after: Path) -> set[str]:
    one, other = roundtrip.stored(before), roundtrip.stored(after)
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and one[name].shape == other[name].shape for name in one)
    return {name for name in one if not torch.equal(one[name], other[name])}


# --- the result -----------------------------------------------------------------------------------------------------


def test_kl_falls_as_plain_transformers_measures_it(done, student: Path, tiny_model: Path, text_file: Path) -> None:
    out, record = done
    ids = heldout(student, text_file)
    before, after = (kl(folder, tiny_model, ids) for folder in (student, out))
    assert after < 0.95 * before
    assert record["before"]["kl_mean"] == pytest.approx(before, rel=1e-4)
    assert record["heldout"]["kl_mean"] == pytest.approx(after, rel=1e-4)
    assert record["heldout"]["kl_mean"] == pytest.approx(min(h["kl_mean"] for h in record["history"]), rel=1e-4)


def test_files_are_like_the_students(done, student: Path) -> None:
    out, _ = done
    files = [{p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for f in (student, out)]
    assert files[0] - {"moecompress/recipe.yaml"} == files[1]  # the recipe was of the steps
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (student / name).read_bytes()
    now = changed(student, out)
    fates = read_manifest(out)["tensors"]
    assert set(fates) == set(roundtrip.stored(student))
    assert {name for name, fate in fates.items() if fate["fate"] == "trained"} == now
    assert {fates[name]["role"] for name in now} >= {"expert", "router", "attention", "norm"}
    assert not {"embedding", "head"} & {fates[name]["role"] for name in now}
    assert read_manifest(out)["student"]["steps"][0]["step"]["method"] == "reap"
    assert not pipeline.work_folder(out).exists()


def test_router_repair_touches_nothing_else(tiny_model: Path, text_file: Path, tmp_path: Path, moecompress: Callable) -> None:
    """Routers that noise has spoilt find back; every other tensor keeps its bits."""
    spoilt = tmp_path / "spoilt"
    shutil.copytree(tiny_model, spoilt)
    generator = torch.Generator().manual_seed(0)
    for file in spoilt.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if "mlp.gate.weight" in name]:
            tensors[name] = (tensors[name].float() + 0.1 * torch.randn(tensors[name].shape, generator=generator)).bfloat16()
        save_file(tensors, file, metadata={"format": "pt"})
    ran = moecompress("distill", spoilt, "--teacher", tiny_model, "-o", tmp_path / "out", "--train", "router", "--steps", 12, "--rate", 1e-2,
                      "--check-every", 6, "--batch", 16, "--accumulate", 1, "--json", *options(text_file, CALIBRATION))  # fmt: skip
    assert ran.code == 0, ran.err
    record = ran.json()
    assert record["heldout"]["kl_mean"] < 0.8 * record["before"]["kl_mean"]
    assert changed(spoilt, tmp_path / "out") == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)}


def test_a_useless_training_gives_the_student_back(student: Path, tiny_model: Path, text_file: Path, tmp_path: Path,
                                                   moecompress: Callable) -> None:  # fmt: skip
    ran = moecompress("distill", student, "--teacher", tiny_model, "-o", tmp_path / "out", "--steps", 2, "--rate", 1,
                      "--check-every", 1, *options(text_file))  # fmt: skip
    assert ran.code == 0, ran.err
    assert "the student, unchanged" in " ".join(ran.err.split())
    assert changed(student, tmp_path / "out") == set()
    assert read_manifest(tmp_path / "out")["best_step"] == 0


# --- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_of_experts_and_routers_are_the_slope_of_the_loss(student: Path, tiny_model: Path, text_file: Path) -> None:
    """Moving a parameter along its gradient changes the loss by what the gradient says."""
    model, teacher = (distilling.load(folder, torch.float32) for folder in (student, tiny_model))
    ids = heldout(student, text_file)
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = 4  # all experts: no step changes who is chosen, so the loss is smooth
    with torch.no_grad():
        known = targets(teacher(input_ids=ids, use_cache=False).logits, 64)

    def loss() -> torch.Tensor:
        return divergence(model(input_ids=ids, use_cache=False).logits, *known).double().mean()

    loss().backward()
    for name in ("0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj", "0.mlp.gate.weight", "2.mlp.gate.weight"):
        parameter = model.get_parameter(f"model.layers.{name}")
        slope = parameter.grad / parameter.grad.norm()
        step = 3e-3
        with torch.no_grad():
            parameter += step * slope
            up = loss()
            parameter -= 2 * step * slope
            down = loss()
            parameter += step * slope
        assert float((up - down) / (2 * step)) == pytest.approx(float(parameter.grad.norm()), rel=0.02), name


def both_ways(family: str, folder: Path) -> None:
    """Train all of a family for a step and write it: what loads again is what was trained, and gradients reached it."""
    tiny_checkpoint(family, folder / "original")
    opened = OpenModel(folder / "original", torch.float32)
    student, teacher = (roundtrip.load(head_class(family), folder / "original") for _ in range(2))
    another(teacher)
    dtypes = trained(opened, "all")
    ids = roundtrip.tokens(96).ids
    (folder / "work").mkdir()
    settings = Settings(steps=2, rate=1e-2, batch=1, check_every=2)
    train(student, teacher, dtypes, needed(opened.anatomy, dtypes), ids, ids[:1], settings, folder / "work")
    made = {name: student.get_parameter(name).detach().to(dtype) for name, dtype in dtypes.items()}
    distilling.write(opened, made, folder / "out")
    again = roundtrip.load(head_class(family), folder / "out")
    for name, parameter in student.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    before = roundtrip.load(head_class(family), folder / "original")
    for name in needed(opened.anatomy, dtypes):
        assert not torch.equal(before.get_parameter(name), again.get_parameter(name)), name
    experts = {f"{moe.module}.{name}" for moe in opened.anatomy.moe.values() for name in moe.layout.parameters}
    assert experts <= set(needed(opened.anatomy, dtypes))


def another(model: PreTrainedModel) -> None:
    """A teacher that is not the student."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.3


@pytest.mark.parametrize("family", ALWAYS)
def test_families_train_and_come_back(family: str, tmp_path: Path) -> None:
    both_ways(family, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", OTHERS)
def test_other_families_train_and_come_back(family: str, tmp_path: Path) -> None:
    both_ways(family, tmp_path)


# --- the loop -------------------------------------------------------------------------------------------------------


def test_the_best_weights_are_kept(student: Path, tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch) -> None:
    """Scripted measurements: the third of five is the best."""
    script = iter([1.0, 0.9, 0.8, 0.3, 0.5, 0.4])
    taken: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(training, "summary", lambda found: {"kl_mean": next(script)})
    save = training.save

    def spy(folder: Path, run: Run, weights: Weights, optimizer) -> None:
        taken.append(weights.stored())
        save(folder, run, weights, optimizer)

    monkeypatch.setattr(training, "save", spy)
    opened = OpenModel(student, torch.float32)
    models = [distilling.load(folder, torch.float32) for folder in (student, tiny_model)]
    ids = heldout(student, text_file)
    run = train(*models, trained(opened, "experts"), [], ids, ids, Settings(steps=5, check_every=1), tmp_path)
    assert (run.best_step, [h["kl_mean"] for h in run.history]) == (3, [0.9, 0.8, 0.3, 0.5, 0.4])
    kept = best(tmp_path, run)
    assert kept.keys() == taken[3].keys()
    assert all(torch.equal(kept[name], taken[3][name]) for name in kept)
    assert any(not torch.equal(kept[name], taken[5][name]) for name in kept)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}  # nothing to unpickle


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_killed_run_ends_like_a_whole_one(student: Path, tiny_model: Path, text_file: Path, tmp_path: Path, moecompress: Callable) -> None:
    """SIGKILL at some moment behind the first saved step, then the same command again."""
    def command(out: Path) -> list[str]:
        return ["distill", str(student), "--teacher", str(tiny_model), "-o", str(out), "--steps", "24", "--rate", "2e-3", "--check-every", "4",
                "--cross-entropy", "0.1", "--kd-share", "0.7", *options(text_file)]  # fmt: skip

    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert moecompress(*command(whole)).code == 0
    record = pipeline.work_folder(out) / "state.json"
    process = subprocess.Popen([sys.executable, "-c", START, *command(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    while process.poll() is None and not (record.exists() and json.loads(record.read_text())["step"] >= 8):
        time.sleep(0.002)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists() and 8 <= json.loads(record.read_text())["step"] < 24, "killed too late"
    ran = moecompress(*command(out))
    assert ran.code == 0 and "resuming" in ran.err
    assert contents(out) == contents(whole)
    assert not pipeline.work_folder(out).exists()


def test_a_dense_teacher_in_bfloat16(student: Path, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """What `convert` made can follow the dense model that it was made from."""
    config = Qwen3Config(vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, head_dim=16, eos_token_id=0, bos_token_id=None)  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "teacher")
    for path in tiny_model.glob("*token*"):
        shutil.copyfile(path, tmp_path / "teacher" / path.name)
    made = recipe(text_file, FEW | {"seed": 1})
    made = made.model_copy(update={"compute": made.compute.model_copy(update={"dtype": "bfloat16"})})
    record = distill(str(student), str(tmp_path / "teacher"), tmp_path / "out", made, Settings(steps=4, rate=1e-3, check_every=2))
    assert record["compute_dtype"] == "bfloat16"
    assert record["heldout"]["kl_mean"] < record["before"]["kl_mean"]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_packed_students_are_refused(packed_tiny: Path, tiny_model: Path, tmp_path: Path, moecompress: Callable) -> None:
    ran = moecompress("distill", packed_tiny, "--teacher", tiny_model, "-o", tmp_path / "out", "--steps", 1)
    assert ran.code == 2 and "distil first, then quantize" in ran.err
    assert not (tmp_path / "out").exists()


def test_other_vocabularies_are_refused(student: Path, copy_of_tiny: Path, tmp_path: Path, text_file: Path, moecompress: Callable) -> None:
    path = copy_of_tiny / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    numbers = tokenizer["model"]["vocab"]
    one, other = list(numbers)[100:102]
    numbers[one], numbers[other] = numbers[other], numbers[one]
    path.write_text(json.dumps(tokenizer))
    ran = moecompress("distill", student, "--teacher", copy_of_tiny, "-o", tmp_path / "out", "--steps", 1, *options(text_file))
    assert ran.code == 2 and "different vocabularies" in ran.err


def test_a_head_of_another_size_is_refused(student: Path, tiny_model: Path, tmp_path: Path, text_file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model.resize_token_embeddings(520, mean_resizing=False)
    model.save_pretrained(tmp_path / "teacher")
    for path in tiny_model.glob("*token*"):
        shutil.copyfile(path, tmp_path / "teacher" / path.name)
    with pytest.raises(UserError, match="heads of different sizes"):
        distill(str(student), str(tmp_path / "teacher"), tmp_path / "out", recipe(text_file), Settings(steps=1))


@pytest.mark.parametrize(("changes", "complaint"), [
    (["--teacher", "./nowhere"], "No model folder at ./nowhere"),
    (["--train", "attention"], "Unknown part of the model"),
    (["--kd-share", 0.5], "Nothing would be trained on"),
    (["-o", "."], "is not empty"),
])  # fmt: skip
def test_other_refusals(changes: list, complaint: str, student: Path, tiny_model: Path, tmp_path: Path, moecompress: Callable) -> None:
    ran = moecompress("distill", student, "--teacher", tiny_model, "-o", tmp_path / "out", "--steps", 1, *changes)
    assert ran.code == 2 and complaint in ran.err
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_ends_the_run(student: Path, tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(training, "divergence", lambda logits, *_: logits.mean(-1) * torch.nan)
    with pytest.raises(UserError, match="The loss of step 1 is not finite"):
        distill(str(student), str(tiny_model), tmp_path / "out", recipe(text_file), Settings(steps=1))
