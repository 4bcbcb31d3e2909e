"""What every transformed checkpoint must be, whatever was done to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import roundtrip
import torch

from moecompress import pipeline
from moecompress.prune import prune
from moecompress.recipe import ComputeRecipe, recipe_from, step_from

RECIPE = recipe_from(["calibration.sequences=3", "calibration.heldout=1", "calibration.length=24", "compute.micro_batch=1"])


def job_of(folder: Path) -> pipeline.Job:
    vocabulary = json.loads((folder / "config.json").read_text())
    vocabulary = vocabulary.get("text_config", vocabulary)["vocab_size"]
    return pipeline.make_job(str(folder), RECIPE, tokens=roundtrip.tokens(vocabulary))


def after_step(folder: Path, out: Path, seed: int = 0, **options) -> dict:
    """The manifest of one step on a model, with what the step recorded."""
    job = job_of(folder)
    step = step_from(options | {"max_kl": None})
    recipe = job.recipe.model_copy(update={"transform": (step,), "compute": ComputeRecipe(seed=seed, micro_batch=1)})
    manifest = prune(replace(job, recipe=recipe), out)
    (record,) = manifest["steps"]
    return manifest | {"experts": record["experts"], "config_keys": record["config_keys"]}


def accounts_for_everything(source: Path, out: Path, manifest: dict) -> None:
    """Every input tensor has a fate; what was kept is the same bytes; only numbers of experts changed in the config."""
    before, after = roundtrip.stored(source), roundtrip.stored(out)
    fates = {name: fate["fate"] for name, fate in manifest["tensors"].items()}
    assert set(fates) == set(before) and set(after) <= set(before)
    for name, fate in fates.items():
        if fate == "kept":
            assert torch.equal(after[name], before[name]), name
    assert all(after[name].dtype == before[name].dtype for name in after)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    changed = {key for key in {**old, **new} if old.get(key) != new.get(key)}
    assert changed == {key.partition(".")[0] for key in manifest["config_keys"]}
    assert "quantization_config" not in new
