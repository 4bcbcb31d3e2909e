"""The main job end to end on the tiny model: targets, recipes, controls, loading elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from moecompress import pipeline, plans
from moecompress.recipe import Recipe, load_recipe, recipe_from

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
SMALL = ["calibration.sequences=6", "calibration.length=48", "calibration.heldout=2", "compute.micro_batch=2"]
INTEGERS = "allocate.candidates=[{bits: 2}, {bits: 3}, {bits: 4}, {bits: 8, group: 128}, {bits: 16}]"


def job_of(model: Path, text: Path, *changes: str) -> pipeline.Job:
    """With integers as candidates, if no others are among the changes."""
    return pipeline.make_job(str(model), recipe_from([*SMALL, INTEGERS, f"calibration.text={json.dumps(str(text))}", *changes]))


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tokenizer_folder) -> Path:
    """Matrices large enough that file headers are a small share of the bytes: 4 layers, 16 experts, hidden 128."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=2, norm_topk_prob=True, eos_token_id=0,
        bos_token_id=None, dtype=torch.bfloat16, initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide") / "model"
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for path in tokenizer_folder.iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.mark.parametrize("size", [1_450_000, 1_900_000, 2_600_000])
def test_byte_target_is_met_and_never_exceeded(wide, text_file, tmp_path, size):
    job = job_of(wide, text_file, f"target.size={size}", "allocate.compare=none")
    pipeline.quantize(job, tmp_path / "out")
    assert 0.995 * size <= weight_bytes(tmp_path / "out") <= size


@pytest.mark.parametrize("granularity", ["expert", "projection", "layer"])
def test_bit_target_and_granularity(tiny_model, text_file, tmp_path, granularity):
    job = job_of(tiny_model, text_file, "target.bits=3.8", f"allocate.granularity={granularity}")
    result = pipeline.quantize(job, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "moecompress" / "manifest.json").read_text())
    assert record["bits_per_weight"] <= 3.8
    # Counted again from the files: every byte of every bank, over the weights of the original.
    from moecompress.model.checkpoint import Checkpoint

    stored = sum(e.nbytes for n, e in Checkpoint(tmp_path / "out").entries.items() if "_banks." in n)
    assert record["bits_per_weight"] == pytest.approx(8 * stored / (3 * 8 * 3 * 64 * 64))
    if result.chosen == "plan" and granularity != "expert":
        for layer in range(3):
            for projection in ("gate", "up", "down"):
                kinds = {c.candidate for c in result.plan.choices if c.unit.startswith(f"L{layer:02d}") and c.unit.endswith(projection)}
                assert len(kinds) == 1
    measured = {k: v["kl_mean"] for k, v in result.measured.items() if k != "plan_minus_uniform"}
    assert result.chosen == min(measured, key=lambda label: measured[label])


TRELLIS, PLAIN, WIDE = ["t0_5", "t1", "t1_5", "t2", "t2_5", "t3", "t4"], ["b2g64s", "b3g64s", "b4g64s"], ["b8g128s", "b16"]


@pytest.mark.parametrize(("changes", "expected"), [
    ([], TRELLIS), (["allocate.allocator=pmq"], PLAIN), (["quantize.method=rtn"], PLAIN), (["allocate.allocator=uniform"], TRELLIS),
])  # fmt: skip
def test_candidates_where_none_are_named(tiny_model, text_file, changes, expected):
    job = job_of(tiny_model, text_file, "target.bits=3", "allocate.candidates=null", *changes)
    assert [scheme.name for scheme in job.schemes] == [*expected, *WIDE] and not job.without_trellis


def test_integers_where_the_trellis_cannot_be_encoded(tiny_model, quick, tmp_path, moecompress, monkeypatch):
    monkeypatch.setattr("moecompress.kernels.trellis.available", lambda: False)
    ran = moecompress("quantize", tiny_model, "-o", tmp_path / "out", "--target-bits", 3.5, *quick, "--set", "allocate.candidates=null")
    assert ran.code == 0 and "the candidates are integers" in ran.err
    record = json.loads((tmp_path / "out" / "moecompress" / "manifest.json").read_text())
    assert record["candidates"] == [*PLAIN, *WIDE] and record["without_trellis"]


def test_everything_by_default(tiny_model, text_file, tmp_path):
    """Where nothing is chosen but a target: rates of the trellis, and experts that are thinner or left out where that is better."""
    recipe = recipe_from([*SMALL, f"calibration.text={json.dumps(str(text_file))}", "target.bits=1.9"])
    result = pipeline.quantize(pipeline.make_job(str(tiny_model), recipe), tmp_path / "out")
    assert result.manifest["bits_per_weight"] <= 1.9 and not result.manifest["without_trellis"]
    assert {choice.candidate[0] for choice in result.plan.choices} >= {"t"} and result.statistics.narrowed and result.statistics.thinned
    measured = {label: row["kl_mean"] for label, row in result.measured.items() if not label.startswith("plan_minus")}
    assert "uniform" in measured and result.chosen == min(measured, key=lambda label: measured[label])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_files_run(path, tiny_model, text_file, tmp_path):
    recipe = load_recipe(path, [*SMALL, f"calibration.text={json.dumps(str(text_file))}"])
    if recipe.target.bits is not None and recipe.target.bits < 2.6:  # rows of 64 weights carry more overhead than real ones
        recipe = load_recipe(path, [*SMALL, f"calibration.text={json.dumps(str(text_file))}", "target.bits=2.8"])
    recipe = with_little_training(recipe)
    result = pipeline.quantize(pipeline.make_job(str(tiny_model), recipe), tmp_path / "out")
    stored = load_recipe(tmp_path / "out" / "moecompress" / "recipe.yaml")
    assert stored.fingerprint() == recipe.fingerprint()
    assert result.measured[result.chosen]["kl_mean"] < 1.0


def with_little_training(recipe: Recipe) -> Recipe:
    steps = tuple(step.model_copy(update={"steps": 10}) if step.method == "distill" else step for step in recipe.transform)
    route = recipe.route.model_copy(update={"steps": 20}) if recipe.route.policy in ("otp", "compressed-experts") else recipe.route
    return recipe.model_copy(update={"transform": steps, "route": route})


def test_untouched_model_is_untouched(tiny_model, text_file, tmp_path):
    """All candidates at 16 bits: the compressed model is the original."""
    job = job_of(tiny_model, text_file, "target.size=10MB", 'allocate.candidates=[{"bits": 16}]', "allocate.compare=none",
                 "quantize.attention_bits=16")  # fmt: skip
    result = pipeline.quantize(job, tmp_path / "out")
    assert result.measured["plan"]["kl_mean"] < 1e-6


def test_transformers_measures_what_evaluate_printed(packed_tiny, tiny_model, text_file, moecompress):
    """The check that anyone can make: load OUT with transformers and compute the divergence by hand."""
    from transformers import AutoModelForCausalLM

    from moecompress.calibrate.data import token_batches
    from moecompress.model.skeleton import load_tokenizer

    ran = moecompress("evaluate", packed_tiny, "--reference", tiny_model, "--text", text_file, "--sequences", 6, "--length", 48, "--json")
    assert ran.code == 0, ran.err
    printed = ran.json()
    ids = token_batches(load_tokenizer(tiny_model), str(text_file), 6, 48).ids
    with torch.no_grad():
        p, q = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits.log_softmax(-1) for f in (tiny_model, packed_tiny))
    kl = (p.exp() * (p - q)).sum(-1)
    assert printed["kl_mean"] == pytest.approx(float(kl.mean()), rel=0.01)
    assert printed["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.01)
    nll = -p[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert printed["reference_perplexity"] == pytest.approx(float(nll.exp()), rel=1e-3)
    assert printed["total_bytes"] == weight_bytes(packed_tiny)


def test_generation_dense_export_and_round_trip(packed_tiny, tmp_path, moecompress):
    from transformers import AutoModelForCausalLM

    dense, again = tmp_path / "dense", tmp_path / "again"
    assert moecompress("export", packed_tiny, "-o", dense, "--dtype", "float32").code == 0
    packed = AutoModelForCausalLM.from_pretrained(packed_tiny, dtype=torch.float32)
    packed.save_pretrained(again)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = packed(ids).logits
        for folder in (dense, again):
            assert torch.allclose(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits, expected, atol=2e-4)
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    ran = moecompress("run", packed_tiny, "--prompt", "The", "-n", 5, "--json")
    assert ran.code == 0 and ran.json()["tokens"] == 5


def test_weights_stay_packed_in_memory(packed_tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(packed_tiny)
    held = sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    assert held < 1.1 * weight_bytes(packed_tiny)


def test_dry_run_writes_nothing(tiny_model, text_file, tmp_path):
    result = pipeline.quantize(job_of(tiny_model, text_file, "target.bits=4"), tmp_path / "out", dry_run=True)
    assert result.folder is None and result.plan.bytes > 0 and not (tmp_path / "out").exists()


def test_rounding_settings_all_work(tiny_model, text_file, tmp_path):
    for number, change in enumerate(["quantize.method=rtn", "quantize.hessian=1", "quantize.order=natural", "quantize.refine=0"]):
        job = job_of(tiny_model, text_file, "target.bits=4.2", "allocate.compare=none", change)
        assert pipeline.quantize(job, tmp_path / str(number)).measured["plan"]["kl_mean"] < 0.5


def test_written_bytes_are_predicted(tiny_model, text_file, tmp_path):
    job = job_of(tiny_model, text_file, "target.bits=4", "allocate.compare=none")
    result = pipeline.quantize(job, tmp_path / "out")
    assert weight_bytes(tmp_path / "out") == pytest.approx(plans.written_bytes(job, result.plan), abs=0)


def test_every_code_in_one_plan(wide, text_file, tmp_path):
    """Trellis, ternary, signs and integers compete; what was written loads in transformers and measures the same."""
    from transformers import AutoModelForCausalLM

    candidates = ["{code: trellis, bits: 0.5}", "{code: trellis, bits: 1.5}", "{code: ternary}", "{code: sign}", "{code: trellis, bits: 3}", "{bits: 8}"]
    job = job_of(wide, text_file, "target.bits=2", "allocate.compare=none", f"allocate.candidates=[{', '.join(candidates)}]", "compute.seed=3",
                 "compute.dtype=float32")  # fmt: skip
    result = pipeline.quantize(job, tmp_path / "out")
    assert result.manifest["bits_per_weight"] <= 2
    assert len({choice.candidate for choice in result.plan.choices}) >= 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    total = 0.0
    with torch.no_grad():
        for ids in job.heldout:
            p, q = (torch.log_softmax(model(ids).logits, -1) for model in (original, loaded))
            total += float((p.exp() * (p - q)).sum(-1).mean())
    assert total / len(job.heldout) == pytest.approx(result.measured["plan"]["kl_mean"], rel=0.02)
