"""Steps before quantizing and skipping behind it, as stages of one run: the same result as one after the other by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moecompress import pipeline
from moecompress.calibrate.data import split_heldout
from moecompress.errors import UserError
from moecompress.job import work_folder
from moecompress.model.checkpoint import Checkpoint
from moecompress.prune import prune
from moecompress.recipe import recipe_from
from moecompress.transform import stage

START = "import sys; from moecompress.cli import main; sys.argv = ['moecompress', *sys.argv[1:]]; main()"
STEPS = "transform=[{method: reap, keep: 0.75, protect: [L01.E006]}, {method: ream, keep: 5}]"
WEIGHTS = 3 * 8 * 3 * 64 * 64  # of the original's experts


def job_of(model: Path, text: Path, *changes: str) -> pipeline.Job:
    settings = ["calibration.sequences=6", "calibration.length=48", "calibration.heldout=2", "compute.micro_batch=2",
                "compute.dtype=float32", "allocate.compare=none", f"calibration.text={json.dumps(str(text))}"]  # fmt: skip
    return pipeline.make_job(str(model), recipe_from([*settings, *changes]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors") and "/" not in name}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> tuple[Path, pipeline.Job]:
    """The tiny model with two steps, quantized, with a policy."""
    out = tmp_path_factory.mktemp("steps") / "out"
    job = job_of(tiny_model, text_file, STEPS, "target.bits=2.6", "route={policy: odp, skip: 0.2}")
    pipeline.quantize(job, out)
    assert not work_folder(out).exists()
    return out, job


def manifest_of(out: Path) -> dict:
    return json.loads((out / "moecompress" / "manifest.json").read_text())


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1)


def test_size_is_of_the_result_and_bits_are_by_the_original(made) -> None:
    out, _ = made
    record = manifest_of(out)
    stored = sum(e.nbytes for name, e in Checkpoint(out).entries.items() if "_banks." in name)
    assert record["expert_weights"] == WEIGHTS and [s["expert_weights_left"] for s in record["steps"]] == [WEIGHTS * 6 // 8, WEIGHTS * 5 // 8]
    assert record["bits_per_weight"] == pytest.approx(8 * stored / WEIGHTS)
    assert 2.4 < record["bits_per_weight"] <= 2.6
    assert AutoConfig.from_pretrained(out).num_experts == 5


def test_everything_is_measured_against_the_original(made, tiny_model: Path) -> None:
    """By plain transformers on the held-out tokens: the model as loaded skips, the plan was measured before that."""
    out, job = made
    record = manifest_of(out)
    ids = split_heldout(job.tokens, 2)[1].ids
    p = logits(tiny_model, ids)
    for folder, expected in ((out, record["routing"]["after"]), (without_policy(out), record["heldout"]["plan"])):
        q = logits(folder, ids)
        assert expected["kl_mean"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.01)
        assert expected["router_agreement"] is None and expected["router_agreement_by_layer"] == {}
    assert record["routing"]["after"]["kl_mean"] != record["heldout"]["plan"]["kl_mean"]
    assert record["routing"]["skipped"] == pytest.approx(0.2, abs=0.1)
    costs = [step["heldout"]["kl_mean"] for step in record["steps"]]
    assert 0 < costs[0] < costs[1]


def without_policy(out: Path) -> Path:
    """The same folder, waking all experts."""
    folder = out.with_name("all")
    folder.mkdir(exist_ok=True)
    for path in out.iterdir():
        if path.is_file() and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    config = json.loads((out / "config.json").read_text())
    del config["moecompress_routing"]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_tensor_of_the_original_has_a_fate(made, tiny_model: Path) -> None:
    out, _ = made
    record = manifest_of(out)
    original = Checkpoint(tiny_model)
    assert set(record["tensors"]) == set(original.entries)
    words = {"mlp.experts.": "regrouped, quantized", "mlp.gate.": "regrouped", "self_attn.q_proj": "quantized", "layernorm": "kept"}
    for part, fate in words.items():
        assert {one["fate"] for name, one in record["tensors"].items() if part in name} == {fate}
    first, second = record["steps"]
    assert [first["step"]["method"], second["step"]["method"]] == ["reap", "ream"]
    for layer in ("0", "1", "2"):
        kept = first["experts"][layer]["kept"]
        assert len(kept) == 6 and len(first["experts"][layer]["target"]) == 8
        assert len(second["experts"][layer]["target"]) == 6 and sorted(set(second["experts"][layer]["target"])) == list(range(5))
    assert 6 in first["experts"]["1"]["kept"]


def test_one_run_is_the_commands_one_after_the_other(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    size = "target.size=300kB"
    pipeline.quantize(job_of(tiny_model, text_file, size, STEPS), tmp_path / "at once")
    prune(job_of(tiny_model, text_file, STEPS), tmp_path / "pruned")
    pipeline.quantize(job_of(tmp_path / "pruned", text_file, size), tmp_path / "later")
    assert shards(tmp_path / "at once") == shards(tmp_path / "later")
    total = sum(map(len, shards(tmp_path / "at once").values()))
    assert 260_000 < total <= 300_000
    first, then = (manifest_of(tmp_path / name) for name in ("at once", "pruned"))
    assert first["steps"] == then["steps"] and then["heldout"] == then["steps"][-1]["heldout"]
    assert {one["fate"] for one in then["tensors"].values()} == {"kept", "regrouped"}


def test_evaluate_and_report_know_such_results(made, tiny_model: Path, text_file: Path, tmp_path: Path, moecompress: Callable) -> None:
    out, _ = made
    ran = moecompress("evaluate", out, "--reference", tiny_model, "--text", text_file, "--sequences", 2, "--length", 32, "--no-speed", "--json")
    assert ran.code == 0, ran.err
    record = ran.json()
    assert record["router_agreement"] is None and record["bits_per_weight"] == manifest_of(out)["bits_per_weight"]
    assert moecompress("evaluate", out, "--reference", tiny_model, "--text", text_file, "--sequences", 2, "--length", 32, "--no-speed").code == 0
    ran = moecompress("report", out, "-o", tmp_path / "report.html")
    assert ran.code == 0, ran.err
    assert "Before quantizing" in (tmp_path / "report.html").read_text()


def test_output_error_is_what_the_block_computes(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    """Both first layers are given the same; the block has nothing but experts."""
    job = job_of(tiny_model, text_file, "transform=[{method: reap, keep: 0.5}]")
    prune(job, tmp_path / "out")
    given = []
    for folder in (tiny_model, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, output: given.append(output))
        with torch.no_grad():
            model(job.calibration.ids)
    old, new = (output.reshape(-1, 64)[job.calibration.mask.reshape(-1)] for output in given)
    (step,) = manifest_of(tmp_path / "out")["steps"]
    assert step["experts"]["0"]["output_error"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)


# --- going on -------------------------------------------------------------------------------------------------------


def test_a_jump_stops_the_run_and_a_higher_limit_goes_on(tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch) -> None:
    def job(limit: str) -> pipeline.Job:
        return job_of(tiny_model, text_file, f"transform=[{{method: reap, keep: 0.5, max_kl: {limit}}}]", "target.bits=2.5")

    with pytest.raises(UserError, match=r"(?s)Step 1 of transform \(reap\).*at most 0.0001 nats.*nats; most changed is layer \d, .*%") as caught:
        pipeline.quantize(job("0.0001"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(stage.METHODS, "reap", None)  # the step is not done again
    pipeline.quantize(job("null"), tmp_path / "out")
    step = manifest_of(tmp_path / "out")["steps"][0]
    assert f"{step['heldout']['kl_mean']:.4g} nats" in str(caught.value)
    errors = {layer: one["output_error"] for layer, one in step["experts"].items()}
    assert f"layer {max(errors, key=errors.__getitem__)}," in str(caught.value)


def test_killed_runs_end_with_the_same_bytes(tiny_model: Path, text_file: Path, tmp_path: Path, moecompress: Callable, monkeypatch
                                             ) -> None:  # fmt: skip
    """Killed in the second step; stopped again behind it, while layers are quantized."""
    settings = ["calibration.sequences=8", "calibration.length=96", "calibration.heldout=2", "compute.micro_batch=2", STEPS,
                "allocate.compare=none", "route={policy: odp, skip: 0.2}"]  # fmt: skip
    options = ["--target-bits", "2.8", "--text", str(text_file), *(part for setting in settings for part in ("--set", setting))]
    whole, out = tmp_path / "1" / "out", tmp_path / "2" / "out"
    assert moecompress("quantize", tiny_model, "-o", whole, *options).code == 0
    work = work_folder(out)
    process = subprocess.Popen([sys.executable, "-c", START, "quantize", str(tiny_model), "-o", str(out), *options],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while process.poll() is None and not list(work.glob("step-1/state/record-*")):
        time.sleep(0.002)
    assert process.poll() is None, "it was over before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (work / "step-1" / "record.json").exists() and not (work / "step-0" / "state").exists()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "skipping", stopped)
    ran = moecompress("quantize", tiny_model, "-o", out, *options)
    assert ran.code == 130 and "resuming" in ran.err and not out.exists()
    assert not (work / "step-0" / "out").exists()
    monkeypatch.undo()
    monkeypatch.setitem(stage.METHODS, "reap", None)  # finished steps are not done again
    monkeypatch.setitem(stage.METHODS, "ream", None)
    ran = moecompress("quantize", tiny_model, "-o", out, *options)
    assert ran.code == 0 and "resuming" in ran.err, ran.err
    assert contents(out) == contents(whole)
    assert not work.exists()


# --- the commands ---------------------------------------------------------------------------------------------------


def test_prune_runs_the_steps_of_a_recipe(tiny_model: Path, tmp_path: Path, moecompress: Callable, quick: list[str]) -> None:
    ran = moecompress("prune", tiny_model, "-o", tmp_path / "out", *quick, "--set", STEPS, "--set", "route={policy: odp, skip: 0.1}")
    assert ran.code == 0, ran.err
    assert "reap: 6 experts a layer, of 8" in ran.out and "ream: 5 experts a layer, of 6" in ran.out
    assert "tune-routing" in ran.err
    ran = moecompress("prune", tiny_model, "-o", tmp_path / "x", *quick, "--set", STEPS, "--keep", 0.5)
    assert ran.code == 2 and "Steps from two sides" in ran.err
    ran = moecompress("prune", tiny_model, "-o", tmp_path / "x", *quick, "--max-kl", 1e-6)
    assert ran.code == 2 and "changed the model too much" in ran.err


def test_quantize_shows_steps_and_needs_a_target(tiny_model: Path, tmp_path: Path, moecompress: Callable, quick: list[str]) -> None:
    ran = moecompress("quantize", tiny_model, "-o", tmp_path / "out", *quick, "--set", STEPS)
    assert ran.code == 2 and "No target" in ran.err and "`moecompress prune`" in ran.err
    assert not work_folder(tmp_path / "out").exists()
    ran = moecompress("quantize", tiny_model, "-o", tmp_path / "out", *quick, "--set", STEPS, "--set", "route={policy: naee, max_kl: 0.05}",
                      "--target-bits", 2.8)  # fmt: skip
    assert ran.code == 0, ran.err
    assert "reap: 6 experts a layer, of 8" in ran.out and "policy naee skips" in ran.out
    record = manifest_of(tmp_path / "out")["routing"]
    assert max(row["skipped"] for row in record["curve"] if row["kl_mean"] <= 0.05) == record["skipped"]


@pytest.mark.parametrize("command", ["plan", "calibrate"])
def test_commands_for_one_model_refuse_steps(command: str, tiny_model: Path, tmp_path: Path, moecompress: Callable, quick: list[str]) -> None:
    ran = moecompress(command, tiny_model, "-o", tmp_path / "out", *quick, "--set", STEPS)
    assert ran.code == 2 and f"{command} does not run the recipe's transform steps" in ran.err
    assert not (tmp_path / "out").exists()
