"""Router repair: the routers of a packed model move towards the original, nothing else does, and it is kept only if it helps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from moecompress import pipeline
from moecompress.calibrate.data import split_heldout
from moecompress.distill import repair, state
from moecompress.distill import train as training
from moecompress.errors import UserError
from moecompress.job import Job, work_folder
from moecompress.model.checkpoint import Checkpoint
from moecompress.recipe import recipe_from

pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")

SETTINGS = ["calibration.sequences=20", "calibration.length=32", "calibration.heldout=4", "compute.micro_batch=8", "target.bits=2.8",
            "allocate.compare=none", "allocate.candidates=[{bits: 2}, {bits: 3}]", "compute.dtype=float32"]  # fmt: skip
REPAIR = "repair={router: true, steps: 12, rate: 0.01, batch: 4}"


def job_of(model: Path, text: Path, *changes: str) -> Job:
    return pipeline.make_job(str(model), recipe_from([*SETTINGS, f"calibration.text={json.dumps(str(text))}", *changes]))


@pytest.fixture(scope="module")
def repaired(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> tuple[Path, Path, dict]:
    """Without and with repair, and what the latter's manifest says of it."""
    folder = tmp_path_factory.mktemp("repair")
    pipeline.quantize(job_of(tiny_model, text_file), folder / "plain")
    result = pipeline.quantize(job_of(tiny_model, text_file, REPAIR), folder / "out")
    return folder / "plain", folder / "out", result.manifest["repair"]


@torch.no_grad()
def kl(folder: Path, original: Path, ids: torch.Tensor) -> float:
    """By plain transformers, in float64."""
    p, q = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits.double().log_softmax(-1) for f in (original, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_kl_falls_as_plain_transformers_measures_it(repaired, tiny_model: Path, text_file: Path) -> None:
    plain, out, record = repaired
    ids = split_heldout(job_of(tiny_model, text_file).tokens, 4)[1].ids
    before, after = kl(plain, tiny_model, ids), kl(out, tiny_model, ids)
    assert record["kept"] and after < 0.99 * before
    assert (record["before"]["kl_mean"], record["after"]["kl_mean"]) == (pytest.approx(before, rel=1e-3), pytest.approx(after, rel=1e-3))
    assert min(row["kl_mean"] for row in record["history"]) == pytest.approx(after, rel=1e-3)


def test_only_routers_change_and_no_byte_is_added(repaired) -> None:
    plain, out, record = repaired
    one, other = Checkpoint(plain), Checkpoint(out)
    assert one.entries.keys() == other.entries.keys() and one.nbytes == other.nbytes
    changed = {name for name in one.entries if not torch.equal(one.read(name), other.read(name))}
    assert changed == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)} == set(record["trained"])
    assert all(one.entries[name].dtype == other.entries[name].dtype for name in changed)
    assert record["weights"] == 3 * 8 * 64
    assert json.loads((out / "config.json").read_text()) == json.loads((plain / "config.json").read_text())


def test_the_original_is_remembered_as_it_speaks(tiny_model: Path, text_file: Path, tmp_path: Path, repaired) -> None:
    """What trained the routers is what the original itself would have said."""
    job = job_of(tiny_model, text_file)
    ids = split_heldout(job.tokens, 4)[1].ids[:2]
    known = repair.remember(job, [ids], tmp_path)
    student = AutoModelForCausalLM.from_pretrained(repaired[0], dtype=torch.float32)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)(ids).logits
        before = student(ids).logits
        found = repair.Original(student, known)(ids).logits
        assert torch.allclose(found, wanted, atol=1e-4) and not torch.allclose(before, wanted, atol=1e-2)
        assert torch.equal(student(ids).logits, before)


def test_what_does_not_help_is_not_kept(tiny_model: Path, text_file: Path, tmp_path: Path, repaired, moecompress) -> None:
    options = [part for setting in [*SETTINGS, "repair={steps: 2, rate: 100}"] for part in ("--set", setting)]
    ran = moecompress("quantize", tiny_model, "-o", tmp_path / "out", "--text", text_file, "--repair", "router", *options)
    assert ran.code == 0, ran.err
    assert "they stay as they were" in ran.err and "routers not repaired" in " ".join(ran.out.split())
    record = json.loads((tmp_path / "out" / "moecompress" / "manifest.json").read_text())["repair"]
    assert not record["kept"] and record["before"] == record["after"]
    for shard in repaired[0].glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


def test_an_interrupted_repair_ends_with_the_same_bytes(tiny_model: Path, text_file: Path, tmp_path: Path, repaired, monkeypatch) -> None:
    _, whole, _ = repaired
    out, job = tmp_path / "out", job_of(tiny_model, text_file, REPAIR)

    def save_and_die(folder: Path, run, *rest) -> None:
        state.save(folder, run, *rest)
        if run.step >= 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save", save_and_die)
        pipeline.quantize(job, out)
    assert not out.exists() and json.loads((work_folder(out) / "repair" / "training" / state.RECORD).read_text())["step"] == 4
    pipeline.quantize(job_of(tiny_model, text_file, REPAIR), out)
    names = sorted(p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)
    assert not work_folder(out).exists()


def test_a_model_that_does_not_fit_is_refused_before_anything_is_done(tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(repair.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UserError, match="too large for --repair router"):
        pipeline.quantize(job_of(tiny_model, text_file, REPAIR), tmp_path / "out")
    assert not (work_folder(tmp_path / "out") / "plan").exists()
