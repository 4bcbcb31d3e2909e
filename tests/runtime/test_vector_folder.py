"""Folders with vector codes: books are shared, counted and never make a result larger than its target."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moecompress import pipeline, plans
from moecompress.calibrate.data import token_batches
from moecompress.calibrate.statistics import Statistics
from moecompress.model.skeleton import load_tokenizer
from moecompress.recipe import recipe_from

CANDIDATES = "[{bits: 2}, {bits: 4}, {code: vector, bits: 2}, {code: vector, bits: 1}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, moecompress, quick) -> Path:
    out = tmp_path_factory.mktemp("vectors") / "out"
    options = ["--set", f"allocate.candidates={CANDIDATES}", "--set", "quantize.refine=0", "--set", "allocate.compare=none", "--set", "allocate.drop=false"]
    ran = moecompress("quantize", tiny_model, "-o", out, "--target-bits", 3.2, *quick, *options)
    assert ran.code == 0, ran.err
    return out


def test_books_are_in_the_bits(folder):
    manifest = json.loads((folder / "moecompress" / "manifest.json").read_text())
    tensors = {name: tensor for shard in folder.glob("model-layer-*") for name, tensor in load_file(shard).items()}
    books = {name: tensor.nbytes for name, tensor in tensors.items() if name.endswith(".book")}
    plan = json.loads((folder / "moecompress" / "plan.json").read_text())
    assert books and manifest["expert_bytes"] == plan["bytes"] + 4 * len(plan["units"]) + sum(books.values())
    assert manifest["bits_per_weight"] == 8 * manifest["expert_bytes"] / manifest["expert_weights"] <= 3.2


def test_it_loads_computes_and_is_saved_again(folder, tmp_path):
    import moecompress  # noqa: F401 (registers the quantizer)

    ids = torch.arange(40)[None]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.fixture(scope="module")
def tokens(tiny_model, text_file):
    return token_batches(load_tokenizer(tiny_model), str(text_file), 6, 48)


@pytest.mark.parametrize("target", ["target.bits=2.8", "target.bits=2.9", "target.bits=3.7", "target.size=330000", "target.size=360000"])
def test_no_plan_is_larger_than_its_target(target, tiny_model, tokens, folder):
    """On a model so small that the books of all schemes are a fifth of it."""
    recipe = recipe_from([target, f"allocate.candidates={CANDIDATES}", "calibration.heldout=2"])
    job = pipeline.make_job(str(tiny_model), recipe, tokens=tokens)
    statistics = Statistics.load(folder / "moecompress")
    anatomy = job.opened.anatomy
    assert plans.shared_bytes(anatomy, statistics.schemes) == 9 * (2048 + 4096)
    for plan in plans.plan(job, statistics):
        books = plans.shared_bytes_of(anatomy, plan)
        used = {(choice.unit[:3], choice.unit.split(".")[2], choice.candidate) for choice in plan.choices if choice.candidate[0] == "v"}
        assert books == sum({"v1": 4096, "v2": 2048}[name] for _, _, name in used)
        if recipe.target.bits is not None:
            allowed = int(recipe.target.bits * anatomy.expert_weights / 8)
            assert plan.bytes + books + plans.index_bytes(anatomy) <= allowed
        else:
            assert plans.written_bytes(job, plan) <= recipe.target.size


def test_bytes_of_books_that_a_plan_does_not_need_are_spent(tiny_model, tokens, folder):
    """Vectors made worthless: not even the smallest step of a matrix, from 2 to 4 bits, would fit in what is left of the target."""
    recipe = recipe_from(["target.bits=3.5", f"allocate.candidates={CANDIDATES}", "calibration.heldout=2"])
    job = pipeline.make_job(str(tiny_model), recipe, tokens=tokens)
    statistics = Statistics.load(folder / "moecompress")
    layers = {}
    for index, layer in statistics.layers.items():
        harm = layer.harm.clone()
        harm[..., [name[0] == "v" for name in statistics.schemes]] *= 1e6
        layers[index] = replace(layer, harm=harm)
    plan, uniform = plans.plan(job, replace(statistics, layers=layers))
    allowed = int(3.5 * job.opened.anatomy.expert_weights / 8) - plans.index_bytes(job.opened.anatomy)
    assert plans.shared_bytes_of(job.opened.anatomy, plan) == 0
    assert allowed - 64 * 16 < plan.bytes <= allowed and uniform.bytes <= plan.bytes
