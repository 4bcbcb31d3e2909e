"""Rounding towards the original's outputs in the whole pipeline: two streams beside each other, killed and resumed, and kept only
where it helps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moecompress import pipeline
from moecompress.calibrate.original import Original
from moecompress.compress import Work
from moecompress.model.walk import Walk
from moecompress.recipe import recipe_from

SMALL = ["calibration.sequences=6", "calibration.length=48", "calibration.heldout=2", "compute.micro_batch=2"]
UNIFORM = ["target.bits=8", "allocate.allocator=uniform", "allocate.candidates=[{bits: 2, group: 64, symmetric: false}]"]


def job_of(model: Path, text: Path, *changes: str) -> pipeline.Job:
    return pipeline.make_job(str(model), recipe_from([*SMALL, *UNIFORM, f"calibration.text={json.dumps(str(text))}", *changes]))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def job(tiny_model, text_file) -> pipeline.Job:
    return job_of(tiny_model, text_file, "quantize.target=cross")


@pytest.fixture(scope="module")
def prepared(job, tmp_path_factory):
    """Statistics and the plan."""
    statistics = pipeline.calibrate(job, tmp_path_factory.mktemp("calibrate") / "work")
    return statistics, pipeline.plan_and_others(job, statistics)[0]


@pytest.fixture(scope="module")
def built(job, prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cross")
    pipeline.build(job, *prepared, folder, "cross")
    return folder / "out"


def test_the_second_stream_is_the_original(tiny_model, text_file, tmp_path):
    """What the experts of every layer are given, against the model of transformers itself; in float32, where no token sits
    between two experts."""
    from transformers import AutoModelForCausalLM

    job = job_of(tiny_model, text_file, "compute.dtype=float32")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _m, given: seen.append(given[0].detach()))
    calibration = job.calibration
    with torch.no_grad():
        for ids in calibration.batches:
            model(ids, use_cache=False)
    expected = [torch.cat(seen[layer::3]) for layer in range(3)]
    with Original(job.open(), calibration, tmp_path) as beside:
        for layer in range(3):
            beside.look(layer)
            assert beside.hidden is not None
            assert torch.allclose(beside.hidden, expected[layer], atol=1e-3)
            assert all(weight.is_meta for weight in beside.opened.layers[layer].parameters())  # gone again
            if layer == 0:
                beside.keep()
    with Original(job.open(), calibration, tmp_path) as again:  # a layer behind what the other walk needs
        again.restore(2)
        again.look(2)
        assert torch.equal(again.hidden, beside.hidden)


class Killed(BaseException):
    """Stands for kill -9 at an exact place: nothing in the package catches it."""


@pytest.mark.parametrize(("where", "name", "calls"), [
    (Walk, "save", 1), (Original, "keep", 1), (Original, "keep", 2), (Original, "look", 2), (Work, "keep_record", 3),
])  # fmt: skip
def test_killed_and_resumed_ends_with_the_same_bytes(job, prepared, built, tmp_path, monkeypatch, where, name, calls):
    """Before the streams are saved, between the one and the other, after both, and at the end."""
    count, real = 0, getattr(where, name)

    def killed(self, *args):
        nonlocal count
        count += 1
        if count == calls:
            raise Killed
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(where, name, killed)
        pipeline.build(job, *prepared, tmp_path, "cross")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("model-layer-*")}
    pipeline.build(job, *prepared, tmp_path, "cross")
    assert shards(tmp_path / "out") == shards(built)
    finished = [path for path, mtime in before.items() if path.stat().st_mtime_ns == mtime]
    assert len(finished) >= calls - 1  # layers done before were not done again


@pytest.mark.parametrize(("change", "equal"), [({"workspace_bytes": 1}, 0.99), ({"micro_batch": 1}, 0.75)], ids=str)
def test_chunks_and_batches_change_nothing_but_noise(tiny_model, text_file, prepared, tmp_path, monkeypatch, change, equal):
    """One expert at a time instead of all, one sequence at a time instead of two; in float32, where no token changes its experts.

    Other batches sum in another order, and feedback carries that on: with the experts' own weights as target 0.88 of the bytes
    are the same."""
    job = job_of(tiny_model, text_file, "quantize.target=cross", "compute.dtype=float32")
    pipeline.build(job, *prepared, tmp_path / "one", "cross")
    other = replace(job.calibration, **change)
    monkeypatch.setattr(pipeline.Job, "calibration", property(lambda self: other))
    pipeline.build(job, *prepared, tmp_path / "other", "cross")
    assert same_codes(tmp_path / "one" / "out", tmp_path / "other" / "out") > equal


def same_codes(one: Path, other: Path) -> float:
    """Share of equal bytes."""
    pairs = list(zip(shards(one).values(), shards(other).values(), strict=True))
    return sum(a == b for x, y in pairs for a, b in zip(x, y, strict=True)) / sum(len(x) for x, _ in pairs)


def test_kept_only_where_it_helps(tiny_model, text_file, tmp_path, monkeypatch, capsys):
    """Both ways are built and measured; the one to the own weights has the bytes of a run that never heard of the other."""
    plain = job_of(tiny_model, text_file)
    pipeline.quantize(plain, tmp_path / "own")
    result = pipeline.quantize(job_of(tiny_model, text_file, "quantize.target=cross"), tmp_path / "both")
    record = json.loads((tmp_path / "both" / "moecompress" / "manifest.json").read_text())
    kl = {label: row["kl_mean"] for label, row in record["heldout"].items() if not label.startswith("plan_minus")}
    assert set(kl) == {"plan", "cross"} and record["chosen"] == result.chosen == min(kl, key=kl.__getitem__)
    assert kl["plan"] == json.loads((tmp_path / "own" / "moecompress" / "manifest.json").read_text())["heldout"]["plan"]["kl_mean"]
    assert (shards(tmp_path / "both") == shards(tmp_path / "own")) == (record["chosen"] == "plan")
    assert record["heldout"]["plan_minus_cross"]["kl_mean"] == pytest.approx(kl["plan"] - kl["cross"], rel=1e-3)
    assert f"{kl['cross']:.5f}" in capsys.readouterr().err


def test_alone_where_nothing_is_compared(tiny_model, text_file, tmp_path, built):
    result = pipeline.quantize(job_of(tiny_model, text_file, "quantize.target=cross", "allocate.compare=none"), tmp_path / "out")
    assert result.chosen == "cross" and list(result.measured) == ["cross"]
    assert shards(tmp_path / "out") == shards(built)
