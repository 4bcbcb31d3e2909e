"""Folders of factors and kept columns: what loads, what it measures, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from packed import Made, assert_measured, log_probs, make, plain, recipe_of
from safetensors.torch import load_file, save_file

from moecompress import pipeline
from moecompress.errors import UserError
from moecompress.pack.scheme import Scheme

THIN = [{"code": "low-rank", "rank": 0.125}, {"code": "low-rank", "rank": 0.25, "sparse": 0.1}, {"code": "low-rank", "rank": 0.4, "sparse": 0.1}]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, text_file) -> Made:
    recipe = recipe_of(text_file, [*THIN, {"bits": 16}], "target.bits=7")
    return make(tiny_model, tmp_path_factory.mktemp("thin") / "out", recipe)


def test_what_was_written_measures_the_same_in_transformers(made, tiny_model):
    result = made.result
    names = {choice.candidate for choice in result.plan.choices}
    assert result.manifest["bits_per_weight"] <= 7 and len(names & {"lr125s0", "lr250s100", "lr400s100"}) >= 2
    for choice in result.plan.choices:
        assert choice.bytes == Scheme.parse(choice.candidate).price(choice.rows, choice.cols)
    assert_measured(made, tiny_model)


def test_saved_again_and_exported_it_says_the_same(made, tmp_path, moecompress):
    loaded = plain(made.folder)
    loaded.save_pretrained(tmp_path / "again")
    assert moecompress("export", made.folder, "-o", tmp_path / "dense", "--dtype", "float32").code == 0
    for folder in (tmp_path / "again", tmp_path / "dense"):
        assert torch.allclose(log_probs(plain(folder)), log_probs(loaded), atol=5e-4)


def test_the_planner_takes_integers_where_it_may(tiny_model, text_file, tmp_path):
    """Factors of random matrices lose far more than four bits do at half the bytes, and the plan knows."""
    recipe = recipe_of(text_file, [*THIN, {"bits": 4}, {"bits": 16}], "target.bits=5")
    result = pipeline.quantize(pipeline.make_job(str(tiny_model), recipe), tmp_path / "out", dry_run=True)
    chosen = [choice.candidate for choice in result.plan.choices]
    assert sum(name.startswith("lr") for name in chosen) < len(chosen) / 4


@pytest.mark.parametrize(("row", "columns"), [(0, "equal"), (-1, "outside"), (0, "falling")])
def test_columns_that_the_format_does_not_know_are_refused(made, tmp_path, moecompress, row, columns):
    folder = Path(shutil.copytree(made.folder, tmp_path / "packed"))
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
        plain(folder)
    ran = moecompress("run", folder, "--prompt", "The", "-n", 1)
    assert ran.code == 2 and "kept" in ran.err and "Traceback" not in ran.err
