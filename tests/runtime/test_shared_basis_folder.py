"""Folders with shared bases: bytes as priced, what loads, what it measures, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from packed import Made, assert_measured, log_probs, make, plain, recipe_of
from safetensors.torch import load_file, save_file

from moecompress import pipeline, plans
from moecompress.errors import UserError
from moecompress.recipe import recipe_from

BASED = [{"code": "shared-basis", "bits": 4, "rank": 0.5}, {"code": "shared-basis", "bits": 8, "rank": 0.9}]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, text_file) -> Made:
    """Every matrix has a shared basis, of one of two ranks."""
    return make(tiny_model, tmp_path_factory.mktemp("bases") / "out", recipe_of(text_file, BASED, "target.bits=7.5"))


def test_what_was_written_measures_the_same_in_transformers(made, tiny_model):
    assert_measured(made, tiny_model)


def test_bytes_are_those_that_were_priced(made):
    out, result, job = made.folder, made.result, made.job
    names = {choice.candidate for choice in result.plan.choices}
    assert names == {"sb500b4g64s", "sb900b8g64s"} and result.manifest["bits_per_weight"] <= 7.5
    tensors = {name: tensor for shard in out.glob("model-layer-*") for name, tensor in load_file(shard).items() if "_banks." in name}
    bases = sum(tensor.nbytes for name, tensor in tensors.items() if ".basis_" in name)
    assert bases == plans.shared_bytes_of(job.opened.anatomy, result.plan) > 0
    assert sum(t.nbytes for t in tensors.values()) == result.plan.bytes + 4 * len(result.plan.choices) + bases
    assert result.manifest["expert_bytes"] == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("target", ["target.bits=6.5", "target.bits=8", "target.size=420000", "target.size=500000"])
def test_no_plan_is_larger_than_its_target(made, tiny_model, target):
    """Bases are a third of what all matrices of this model weigh."""
    recipe = recipe_from([target, f"allocate.candidates={json.dumps(BASED)}", "calibration.heldout=2", "allocate.drop=false"])
    job = pipeline.make_job(str(tiny_model), recipe, tokens=made.job.tokens)
    for plan in plans.plan(job, made.result.statistics):
        if recipe.target.size is not None:
            assert plans.written_bytes(job, plan) <= recipe.target.size
        else:
            anatomy = job.opened.anatomy
            whole = plan.bytes + plans.shared_bytes_of(anatomy, plan) + plans.index_bytes(anatomy)
            assert whole <= recipe.target.bits * anatomy.expert_weights / 8


def test_predictions_hold(made):
    """Made with bases of all experts; what was written has bases of those that use them."""
    manifest = json.loads((made.folder / "moecompress" / "manifest.json").read_text())
    ratio = manifest["prediction"]["ratio"]
    assert set(ratio) == {"sb500b4g64s", "sb900b8g64s"} and all(0.6 < value < 1.5 for value in ratio.values())


def test_saved_again_and_exported_it_says_the_same(made, tmp_path, moecompress):
    loaded = plain(made.folder)
    loaded.save_pretrained(tmp_path / "again")
    assert moecompress("export", made.folder, "-o", tmp_path / "dense", "--dtype", "float32").code == 0
    for folder in (tmp_path / "again", tmp_path / "dense"):
        assert torch.allclose(log_probs(plain(folder)), log_probs(loaded), atol=1e-3)


def test_a_basis_that_is_no_number_is_refused(made, tmp_path, moecompress):
    folder = Path(shutil.copytree(made.folder, tmp_path / "packed"))
    (folder / "moecompress" / "manifest.json").unlink()  # as in a folder saved again: only the content can tell
    shard = sorted(folder.glob("model-layer-*"))[0]
    tensors = load_file(shard)
    name = next(name for name in sorted(tensors) if name.endswith(".basis_row_scales"))
    tensors[name][1] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match="'basis_row_scales'"):
        plain(folder)
    ran = moecompress("run", folder, "--prompt", "The", "-n", 1)
    assert ran.code == 2 and "basis_row_scales" in ran.err and "Traceback" not in ran.err
