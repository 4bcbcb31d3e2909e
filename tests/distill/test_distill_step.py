"""Distilling inside a recipe: the command `distill` between other steps, checked against it and against plain transformers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import roundtrip
import torch
from transformers import AutoModelForCausalLM

from moecompress import pipeline
from moecompress.calibrate.data import split_heldout
from moecompress.distill import step as stepping
from moecompress.distill import train as training
from moecompress.distill.folder import distill
from moecompress.distill.train import Settings
from moecompress.errors import UserError
from moecompress.job import Job, work_folder
from moecompress.model.anatomy import ROUTER
from moecompress.pack.manifest import read_manifest
from moecompress.prune import prune
from moecompress.recipe import load_recipe, recipe_from, step_from

pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")

START = "import sys; from moecompress.cli import main; sys.argv = ['moecompress', *sys.argv[1:]]; main()"
SETTINGS = ["calibration.sequences=264", "calibration.length=32", "calibration.heldout=8", "compute.micro_batch=8",
            "compute.dtype=float32"]  # fmt: skip
SLIM = "{method: slim, width: 0.5, score: random, repair: false}"  # leaves much to regain
DISTIL = "{method: distill, steps: 16, rate: 1.0e-3, batch: 16, accumulate: 1, check_every: 4}"
RECIPE = Path(__file__).parents[2] / "recipes" / "slimmoe.yaml"


def settings(text: Path, *steps: str, more: tuple[str, ...] = ()) -> list[str]:
    return [*SETTINGS, f"calibration.text={json.dumps(str(text))}", f"transform=[{', '.join(steps)}]", *more]


def job_of(model: Path, text: Path, *steps: str, more: tuple[str, ...] = ()) -> Job:
    return pipeline.make_job(str(model), recipe_from(settings(text, *steps, more=more)))


def options(text: Path, *steps: str, more: tuple[str, ...] = ()) -> list[str]:
    return [part for setting in settings(text, *steps, more=more) for part in ("--set", setting)]


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Path:
    """The tiny model at half of its width. Do not change it."""
    out = tmp_path_factory.mktemp("slim") / "out"
    prune(job_of(tiny_model, text_file, SLIM), out)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Path:
    """The same, distilled."""
    out = tmp_path_factory.mktemp("distilled") / "out"
    prune(job_of(tiny_model, text_file, SLIM, DISTIL), out)
    assert not work_folder(out).exists()
    return out


def same_tensors(one: Path, other: Path) -> bool:
    first, second = roundtrip.stored(one), roundtrip.stored(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_seconds(folder: Path) -> list[dict]:
    """Records of the steps, but for how long they took."""
    steps = read_manifest(folder)["steps"]
    for step in steps:
        step.get("training", {}).pop("seconds", None)
    return steps


@torch.no_grad()
def kl(folder: Path, original: Path, ids: torch.Tensor) -> float:
    """By plain transformers, in float64."""
    p, q = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits.double().log_softmax(-1) for f in (original, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


# --- the result -----------------------------------------------------------------------------------------------------


def test_kl_falls_as_plain_transformers_measures_it(made: Path, slim: Path, tiny_model: Path, text_file: Path) -> None:
    ids = split_heldout(job_of(tiny_model, text_file).tokens, 8)[1].ids
    before, after = kl(slim, tiny_model, ids), kl(made, tiny_model, ids)
    assert after < 0.95 * before
    manifest = read_manifest(made)
    record = manifest["steps"][1]["training"]
    assert (record["before"]["kl_mean"], record["after"]["kl_mean"]) == (pytest.approx(before, rel=1e-4), pytest.approx(after, rel=1e-4))
    assert record["before"] == manifest["steps"][0]["heldout"] and record["after"] == manifest["steps"][1]["heldout"] == manifest["heldout"]
    assert min(row["kl_mean"] for row in record["history"]) == pytest.approx(after, rel=1e-4)


def test_what_the_manifest_says(made: Path, slim: Path) -> None:
    manifest = read_manifest(made)
    first, second = manifest["steps"]
    record = second["training"]
    assert (record["steps"], record["tokens"], record["kept"], record["repeatable"]) == (16, 16 * 16 * 32, True, True)
    assert record["best_step"] in (4, 8, 12, 16) and record["seconds"] > 0
    assert second["expert_weights_left"] == first["expert_weights_left"] == manifest["expert_weights"] // 2
    one, other = roundtrip.stored(slim), roundtrip.stored(made)
    moved = {name for name in one if not torch.equal(one[name], other[name])}
    fates = {name: fate["fate"] for name, fate in manifest["tensors"].items()}
    assert {fates[name] for name in moved} == {"trained", "thinned, trained"}
    assert {name for name, fate in fates.items() if fate == "kept"} == {name for name in one if name not in moved}
    assert record["weights"] == sum(one[name].numel() for name in one if "embed_tokens" not in name and "lm_head" not in name)


def test_the_step_is_the_command(made: Path, slim: Path, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """Bit for bit."""
    same = Settings(steps=16, rate=1e-3, batch=16, accumulate=1, check_every=4)
    record = distill(str(slim), str(tiny_model), tmp_path / "out", recipe_from(settings(text_file)), same)
    assert same_tensors(tmp_path / "out", made)
    mine = read_manifest(made)["steps"][1]["training"]
    assert mine["history"] == record["history"] and mine["best_step"] == record["best_step"]
    assert mine["after"]["kl_mean"] == pytest.approx(record["heldout"]["kl_mean"], rel=1e-4)


def test_options_have_the_names_and_defaults_of_the_command() -> None:
    step = step_from({"method": "distill", "steps": 3})
    given = recipe_from(["compute.micro_batch=5", "compute.seed=7"])
    assert stepping.settings_of(step, given) == Settings(steps=3, batch=5, seed=7)
    assert stepping.settings_of(step.model_copy(update={"batch": 2}), given).batch == 2


def test_text_for_measuring_is_not_trained_on(tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch) -> None:
    seen: list[torch.Tensor] = []
    real = training.Teacher.targets
    monkeypatch.setattr(training.Teacher, "targets", lambda self, rows: (seen.append(self.ids[list(rows)]), real(self, rows))[1])
    job = job_of(tiny_model, text_file, SLIM, DISTIL)
    prune(job, tmp_path / "out")
    unseen = {tuple(row.tolist()) for row in split_heldout(job.tokens, 8)[1].ids}
    trained = {tuple(row.tolist()) for ids in seen for row in ids}
    assert len(trained) == 256 and not trained & unseen


# --- what does not help, and what is too far ------------------------------------------------------------------------


def test_what_does_not_help_is_undone(slim: Path, tiny_model: Path, text_file: Path, tmp_path: Path, moecompress: Callable) -> None:
    bad = "{method: distill, steps: 2, rate: 1, check_every: 1}"
    ran = moecompress("prune", tiny_model, "-o", tmp_path / "out", *options(text_file, SLIM, bad))
    assert ran.code == 0, ran.err
    assert "its weights stay as they were" in " ".join(ran.err.split()) and "undone: nothing was better" in " ".join(ran.out.split())
    assert same_tensors(tmp_path / "out", slim)
    first, second = read_manifest(tmp_path / "out")["steps"]
    record = second["training"]
    assert not record["kept"] and record["steps"] == 2 and len(record["history"]) == 2
    assert record["before"] == record["after"] == first["heldout"] == second["heldout"]
    assert {fate["fate"] for fate in read_manifest(tmp_path / "out")["tensors"].values()} == {"kept", "thinned"}


def test_a_step_that_ends_too_far_away_stops_the_run(tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch) -> None:
    def job(limit: str) -> Job:
        return job_of(tiny_model, text_file, SLIM, DISTIL.replace("}", f", max_kl: {limit}}}"))

    with pytest.raises(UserError, match=r"(?s)Step 2 of transform \(distill\) left the model too far.*at most 1e-06 nats.*train longer"):
        prune(job("1.0e-6"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(stepping, "load", None)  # with a higher limit nothing is trained again
    prune(job("null"), tmp_path / "out")
    assert read_manifest(tmp_path / "out")["steps"][1]["training"]["kept"]


def test_minutes_are_said_to_be_what_they_are(tiny_model: Path, text_file: Path, tmp_path: Path, moecompress: Callable) -> None:
    step = "{method: distill, train: router, minutes: 0.01, batch: 4, accumulate: 1, check_every: 1000}"
    ran = moecompress("prune", tiny_model, "-o", tmp_path / "out", *options(text_file, SLIM, step), "--json")
    assert ran.code == 0, ran.err
    record = ran.json()["steps"][1]["training"]
    assert not record["repeatable"] and record["steps"] >= 1 and record["seconds"] >= 0.6
    assert record["weights"] == 3 * 8 * 64


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_killed_runs_end_with_the_same_weights(tiny_model: Path, text_file: Path, tmp_path: Path, moecompress: Callable) -> None:
    step = "{method: distill, steps: 40, rate: 1.0e-3, batch: 8, accumulate: 1, check_every: 4, cross_entropy: 0.1, kd_share: 0.7}"
    command = [*options(text_file, SLIM, step, "{method: reap, keep: 6}")]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert moecompress("prune", tiny_model, "-o", whole, *command).code == 0
    record = work_folder(out) / "step-1" / "state" / "state.json"
    process = subprocess.Popen([sys.executable, "-c", START, "prune", str(tiny_model), "-o", str(out), *command],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    while process.poll() is None and not (record.exists() and json.loads(record.read_text())["step"] >= 8):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 8 <= json.loads(record.read_text())["step"] < 40, "killed too late"
    ran = moecompress("prune", tiny_model, "-o", out, *command)
    assert ran.code == 0 and "resuming" in ran.err, ran.err
    assert same_tensors(out, whole) and without_seconds(out) == without_seconds(whole)
    assert not work_folder(out).exists()


# --- with other steps -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_any_order_then_quantized(tiny_model: Path, text_file: Path, tmp_path: Path, moecompress: Callable) -> None:
    """Two stages of two kinds; what one stage trained is what the next one starts from; the result runs and can be reported."""
    steps = ("{method: reap, keep: 0.75}", DISTIL, "{method: slim, width: 48}", DISTIL.replace("steps: 16", "train: experts+router, steps: 8"))
    out = tmp_path / "out"
    ran = moecompress("quantize", tiny_model, "-o", out, "--target-bits", 3, "--set", "allocate.compare=none",
                      *options(text_file, *steps, more=("quantize.attention_bits=8",)))  # fmt: skip
    assert ran.code == 0, ran.err
    assert "distill, all: 16 steps" in ran.out and "distill, experts+router: 8 steps" in ran.out
    manifest = read_manifest(out)
    costs = [step["heldout"]["kl_mean"] for step in manifest["steps"]]
    assert costs[1] < costs[0] and costs[3] < costs[2]
    assert [step["expert_weights_left"] for step in manifest["steps"]] == [221184, 221184, 165888, 165888]
    fates = {name: one["fate"] for name, one in manifest["tensors"].items()}
    assert {fate for name, fate in fates.items() if ".self_attn.q_proj." in name} == {"trained, quantized"}
    # Of eight experts two were dropped: no later step knows their numbers.
    assert {fate for name, fate in fates.items() if ".mlp.experts." in name} == {"regrouped, trained, thinned, quantized", "regrouped, quantized"}
    # A stage after another, by hand.
    previous = tiny_model
    job = job_of(tiny_model, text_file)
    for number, step in enumerate(steps):
        made = replace(job_of(previous, text_file, step), original=job if number else None)
        prune(made, tmp_path / str(number))
        previous = tmp_path / str(number)
    assert kl(previous, tiny_model, split_heldout(job.tokens, 8)[1].ids) == pytest.approx(costs[3], rel=1e-3)
    ran = moecompress("report", out, "-o", tmp_path / "report.html")
    assert ran.code == 0, ran.err
    page = (tmp_path / "report.html").read_text()
    assert "Distilling, step 2: 16 training steps" in page and "Distilling, step 4: 8 training steps" in page
    ran = moecompress("run", out, "--prompt", "The", "-n", 4, "--json")
    assert ran.code == 0 and ran.json()["tokens"] == 4


def test_the_original_has_nothing_to_learn(tiny_model: Path, text_file: Path, tmp_path: Path, moecompress: Callable, monkeypatch) -> None:
    monkeypatch.setattr(stepping, "load", None)  # no model is brought into memory for it
    ran = moecompress("prune", tiny_model, "-o", tmp_path / "out", *options(text_file, DISTIL))
    assert ran.code == 0, ran.err
    assert "still the original: there is nothing to learn" in " ".join(ran.err.split())
    record = read_manifest(tmp_path / "out")["steps"][0]["training"]
    assert (record["steps"], record["kept"], record["before"]["kl_mean"]) == (0, False, 0)
    assert same_tensors(tmp_path / "out", tiny_model)


def test_experts_trained_as_what_they_will_be_stored_as(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """The original's experts, rounded, learn to follow it: every one of them is ternary in the result."""
    step = "{method: distill, train: experts, qat: ternary, steps: 8, rate: 1.0e-3, batch: 16, accumulate: 1, check_every: 4, max_kl: null}"
    prune(job_of(tiny_model, text_file, step), tmp_path / "out")
    record = read_manifest(tmp_path / "out")["steps"][0]["training"]
    assert record["kept"] and record["after"]["kl_mean"] < record["rounded"]["kl_mean"] and record["before"]["kl_mean"] == 0
    for name, tensor in roundtrip.stored(tmp_path / "out").items():
        if ".experts." in name:
            assert len(tensor.unique()) == 3, name


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "complaint"), [
    ("{method: distill}", "needs a budget: steps"),
    ("{method: distill, steps: 3, train: attention}", "should be experts, router, all, or several joined by +"),
    ("{method: distill, steps: 3, kd_share: 0.5}", "set cross_entropy"),
    ("{method: distill, steps: 3, train: router, qat: 2}", "qat rounds experts"),
    ("{method: distill, steps: 3, qat_share: 0.1}", "qat_share needs qat"),
    ("{method: distill, steps: 0}", "greater than or equal to 1"),
    ("{method: distill, minutes: 0}", "greater than 0"),
    ("{method: distill, steps: 3, top_k: 8}", "unknown key 'transform.1.top_k'"),
    ("{method: distill, steps: 3, qat: 5}", "no storage scheme is called '5'"),
    ("{method: distill, steps: 3, qat: 2, qat_share: 0.1}", "Only ternary experts can change a share"),
])  # fmt: skip
def test_bad_options(step: str, complaint: str, tiny_model: Path, text_file: Path, tmp_path: Path, moecompress: Callable) -> None:
    ran = moecompress("prune", tiny_model, "-o", tmp_path / "out", *options(text_file, SLIM, step))
    assert ran.code == 2 and complaint in " ".join(ran.err.split()), ran.err
    assert not (work_folder(tmp_path / "out") / "step-0").exists()  # before anything is done


def test_what_does_not_fit_is_refused_before_anything_is_done(tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch) -> None:
    job = job_of(tiny_model, text_file, SLIM, DISTIL)
    step = job.recipe.transform[1]
    names = {i.target for i in job.opened.anatomy.tensors if i.role not in ("embedding", "head")}
    least = stepping.bytes_needed(job, stepping.settings_of(step, job.recipe), names, 0.5)
    assert least < stepping.bytes_needed(job, stepping.settings_of(step, job.recipe), names)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=least - 1))
    with pytest.raises(UserError, match="too large for a distill step"):
        prune(job, tmp_path / "out")
    assert not (work_folder(tmp_path / "out") / "step-0").exists()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=least))
    prune(job, tmp_path / "out")


def test_models_without_a_router_to_train_are_refused(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """As where a hash of the token chooses: layer 1 of this one has no matrix that the scores come from."""
    job = job_of(tiny_model, text_file, SLIM, DISTIL.replace("}", ", train: experts+router}"))
    anatomy = job.opened.anatomy
    left = tuple(info for info in anatomy.tensors if not (info.role == ROUTER and info.layer == 1))
    job.opened.anatomy = replace(anatomy, tensors=left)
    with pytest.raises(UserError, match="Layer 1 has no router that can be trained"):
        prune(job, tmp_path / "out")


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_slimmoe_in_two_stages(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, ["calibration={sequences: 40, length: 32, heldout: 4}", f"calibration.text={json.dumps(str(text_file))}",
                                  "compute.dtype=float32"])  # fmt: skip
    assert [step.method for step in recipe.transform] == ["slim", "distill", "slim", "distill"]
    short = tuple(step.model_copy(update={"steps": 12, "rate": 1e-4, "check_every": 2} if step.method == "distill" else {}) for step in recipe.transform)
    pipeline.quantize(pipeline.make_job(str(tiny_model), recipe.model_copy(update={"transform": short})), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    kl = [step["heldout"]["kl_mean"] for step in manifest["steps"]]
    assert kl[1] < kl[0] and kl[3] < kl[2]
    assert manifest["steps"][3]["expert_weights_left"] == 0.75 * manifest["expert_weights"]
    assert 2.5 < manifest["bits_per_weight"] <= 3
