"""Folders that are made of the tiny model with chosen candidates, and whether they compute what was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moecompress import pipeline
from moecompress.recipe import Recipe, recipe_from

SMALL = ["calibration.sequences=6", "calibration.length=48", "calibration.heldout=2", "compute.micro_batch=2", "compute.dtype=float32"]
IDS = torch.arange(40)[None]


def recipe_of(text: Path, candidates: object, *changes: str) -> Recipe:
    """``candidates``: as the recipe has them."""
    return recipe_from([*SMALL, f"calibration.text={json.dumps(str(text))}", "allocate.compare=none",
                        f"allocate.candidates={json.dumps(candidates)}", *changes])  # fmt: skip


@dataclass(frozen=True)
class Made:
    folder: Path
    result: pipeline.Result
    job: pipeline.Job


def make(model: Path, out: Path, recipe: Recipe) -> Made:
    job = pipeline.make_job(str(model), recipe)
    return Made(out, pipeline.quantize(job, out), job)


def plain(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def log_probs(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return torch.log_softmax(model(ids).logits, -1)


def assert_measured(made: Made, original: Path) -> None:
    """Plain transformers finds the KL that was written down."""
    known, loaded = plain(original), plain(made.folder)
    kl = [float((p.exp() * (p - log_probs(loaded, ids))).sum(-1).mean()) for ids in made.job.heldout for p in [log_probs(known, ids)]]
    assert sum(kl) / len(kl) == pytest.approx(made.result.measured["plan"]["kl_mean"], rel=0.02)
