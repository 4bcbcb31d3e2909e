"""Folders of factors and kept columns: what loads, what it measures, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moecompress import pipeline
from moecompress.errors import UserError
from moecompress.pack.scheme import Scheme
from moecompress.recipe import recipe_from

SMALL = ["calibration.sequences=6", "calibration.length=48", "calibration.heldout=2", "compute.micro_batch=2", "compute.dtype=float32"]
CANDIDATES = "[{code: low-rank, rank: 0.125}, {code: low-rank, rank: 0.25, sparse: 0.1}, {code: low-rank, rank: 0.4, sparse: 0.1}, {bits: 4}, {bits: 16}]"
IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, text_file) -> tuple[Path, pipeline.Result, pipeline.Job]:
    out = tmp_path_factory.mktemp("thin") / "out"
    recipe = recipe_from([*SMALL, f"calibration.text={json.dumps(str(text_file))}", "allocate.compare=none", "target.bits=7",
                          f"allocate.candidates={CANDIDATES.replace(', {bits: 4}', '')}"])  # fmt: skip
    job = pipeline.make_job(str(tiny_model), recipe)
    return out, pipeline.quantize(job, out), job


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return torch.log_softmax(model(ids).logits, -1)


def test_what_was_written_measures_the_same_in_transformers(made, tiny_model):
    out, result, job = made
    names = {choice.candidate for choice in result.plan.choices}
    assert result.manifest["bits_per_weight"] <= 7 and len(names & {"lr125s0", "lr250s100", "lr400s100"}) >= 2
    for choice in result.plan.choices:
        assert choice.bytes == Scheme.parse(choice.candidate).price(choice.rows, choice.cols)
    original, loaded = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tiny_model, out))
    kl = [float((p.exp() * (p - logits(loaded, ids))).sum(-1).mean()) for ids in job.heldout for p in [logits(original, ids)]]
    assert sum(kl) / len(kl) == pytest.approx(result.measured["plan"]["kl_mean"], rel=0.02)


def test_saved_again_and_exported_it_says_the_same(made, tmp_path, moecompress):
    out, _, _ = made
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "again")
    assert moecompress("export", out, "-o", tmp_path / "dense", "--dtype", "float32").code == 0
    for folder in (tmp_path / "again", tmp_path / "dense"):
        assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)), logits(loaded), atol=5e-4)


def test_the_planner_takes_integers_where_it_may(tiny_model, text_file, tmp_path):
    """Factors of random matrices lose far more than four bits do at half the bytes, and the plan knows."""
    recipe = recipe_from([*SMALL, f"calibration.text={json.dumps(str(text_file))}", "allocate.compare=none", "target.bits=5",
                          f"allocate.candidates={CANDIDATES}"])  # fmt: skip
    result = pipeline.quantize(pipeline.make_job(str(tiny_model), recipe), tmp_path / "out", dry_run=True)
    chosen = [choice.candidate for choice in result.plan.choices]
    assert sum(name.startswith("lr") for name in chosen) < len(chosen) / 4


@pytest.mark.parametrize(("row", "columns"), [(0, "equal"), (-1, "outside"), (0, "falling")])
def test_columns_that_the_format_does_not_know_are_refused(made, tmp_path, moecompress, row, columns):
    folder = Path(shutil.copytree(made[0], tmp_path / "packed"))
    (folder / "moecompress" / "manifest.json").unlink()  # as in a folder saved again: only the content can tell
    shard = next(path for path in sorted(folder.glob("*.safetensors")) if any(name.endswith(".kept") for name in load_file(path)))
    tensors = load_file(shard)
    name = next(name for name in sorted(tensors) if name.endswith(".kept"))
    kept = tensors[name].clone()
    changed = kept.view(torch.int16)[row]
    changed[-1] = {"equal": changed[0], "outside": torch.tensor(64), "falling": torch.tensor(0)}[columns]
    changed[0] = changed[0] if columns != "falling" else torch.tensor(5)
    save_file(tensors | {name: kept}, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match="'kept'"):
        AutoModelForCausalLM.from_pretrained(folder)
    ran = moecompress("run", folder, "--prompt", "The", "-n", 1)
    assert ran.code == 2 and "kept" in ran.err and "Traceback" not in ran.err
