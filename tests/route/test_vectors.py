"""Compressed experts: few experts of a token compute, vectors stand for the others."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from roundtrip import SMALL, assert_close, load, plain, tokens
from safetensors.torch import load_file, save_file
from tiny import head_class, tiny_checkpoint
from transformers import AutoModelForCausalLM

import moecompress.route as route
from moecompress import pipeline
from moecompress.calibrate.data import TokenBatches
from moecompress.errors import UserError
from moecompress.model.experts import find_experts, layout_of, projections
from moecompress.recipe import recipe_from
from moecompress.route import folder as route_folder
from moecompress.route.vectors import Training, main_experts
from moecompress.runtime import loading, pruner, seam
from moecompress.runtime.packed import PackedExperts
from moecompress.runtime.skipping import KEY, Rule, Skipper, compressed_experts, read_policy
from moecompress.runtime.vectors import Vectors

pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    """``make(family)`` or ``make(family, True)`` for packed: the folder."""
    made: dict[tuple[str, bool], Path] = {}

    def get(family: str, packed: bool = False) -> Path:
        if (family, packed) not in made:
            out = tmp_path_factory.mktemp(family) / "model"
            if packed:
                pipeline.quantize(pipeline.make_job(str(get(family)), SMALL, tokens=tokens(96)), out)
            else:
                tiny_checkpoint(family, out)
            made[family, packed] = out
        return made[family, packed]

    return get


def batches(count: int = 8) -> TokenBatches:
    ids = torch.randint(5, 96, (count, 24), generator=torch.Generator().manual_seed(1))
    return TokenBatches.of(ids, torch.ones_like(ids, dtype=torch.bool))


def shaken(layout: Any) -> Vectors:
    vectors = Vectors.of(layout).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for value in vectors.parameters():
        value += 0.3 * torch.randn(value.shape, generator=generator)
    return vectors


def inputs(experts: int, top_k: int = 3, count: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 64, generator=generator)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(count)])
    return x, chosen, torch.rand(count, top_k, generator=generator)


def by_hand(family: str, module: Any, weights: dict[str, torch.Tensor], vectors: Vectors, x, chosen, alpha, main: int, renormalise: bool):
    """The paper's equations in float64, token after token, with the family's activation written out."""
    theta = {name: value.double() for name, value in vectors.named_parameters()}
    total = torch.zeros_like(x, dtype=torch.float64)
    for t in range(len(x)):
        ranked = sorted(range(chosen.shape[1]), key=lambda r: -float(alpha[t, r]))
        few, others = ranked[:main], ranked[main:]
        mass = sum(float(alpha[t, r]) for r in others)
        mean = {name: sum(float(alpha[t, r]) / mass * value[chosen[t, r]] for r in others) for name, value in theta.items()}
        grow = sum(float(alpha[t, r]) for r in ranked) / sum(float(alpha[t, r]) for r in few) if renormalise else 1.0
        for r in few:
            e = int(chosen[t, r])
            own = {name: value[e].double() for name, value in weights.items()}
            up = own["up"] @ (x[t].double() * mean["up"])
            if family == "nemotron_h":  # no gate; squared relu
                inner = F.relu(up).square()
            else:
                gate = own["gate"] @ (x[t].double() * mean["gate"])
                if family == "gpt_oss":  # biases, clamps and a sigmoid of its own
                    bias = module.gate_up_proj_bias[e].double()
                    gate, up = (gate + bias[0::2]).clamp(max=7), (up + bias[1::2]).clamp(-7, 7)
                    inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                else:
                    inner = F.silu(gate) * up
            y = own["down"] @ (inner * mean["down"])
            if family == "gpt_oss":
                y = y + module.down_proj_bias[e].double()
            total[t] += grow * float(alpha[t, r]) * y
    return total


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("family", "packed"), [("mixtral", False), ("gpt_oss", False), ("nemotron_h", False), ("mixtral", True), ("gpt_oss", True)])
def test_module_is_the_paper_s_equations(make, family: str, packed: bool, renormalise: bool) -> None:
    loaded = load(head_class(family), make(family, packed))
    module: Any = next(m for m in loaded.modules() if hasattr(m, "is_transposed") and hasattr(m, "num_experts"))
    bank = getattr(module, "packed", None)
    layout = bank.layout if packed else layout_of(module)
    weights = {p: bank.dequantized(p, torch.float32) for p in layout.projections} if packed else projections(module, layout)
    vectors = shaken(layout)
    module.skipping = Skipper("compressed-experts", Rule(threshold=2, experts=4), renormalise, vectors=vectors)
    module.config._experts_implementation = seam.NAME
    x, chosen, alpha = inputs(4)
    with torch.no_grad():
        expected = by_hand(family, module, weights, vectors, x, chosen, alpha, 2, renormalise).float()
        assert_close(module(x, chosen, alpha), expected, "few tokens")
        many = [part.repeat(5, 1) for part in (x, chosen, alpha)]  # expert after expert
        assert_close(module(*many), expected.repeat(5, 1), "many tokens")
        assert_close(module(x[:1], chosen[:1], alpha[:1]), expected[:1], "one token")


@pytest.mark.parametrize(("family", "packed"), [("qwen3_moe", False), ("mixtral", True), ("deepseek_v3", False)])
def test_vectors_of_one_are_plain_skipping(make, family: str, packed: bool) -> None:
    """Against transformers' own loop on the weights that are left, or for packed experts all pairs; only those compute."""
    loaded, ids = load(head_class(family), make(family, packed)), batches(2).ids
    modules = [m for m in loaded.modules() if hasattr(m, "is_transposed") and hasattr(m, "num_experts")]
    calls: list[tuple[Any, ...]] = []
    for module in modules:
        layout = module.packed.layout if packed else layout_of(module)
        module.skipping = Skipper("compressed-experts", Rule(threshold=1, experts=4), False, vectors=Vectors.of(layout))
        module.config._experts_implementation = seam.NAME
        module.watcher = lambda x, chosen, alpha, module=module: calls.append((module, x, chosen, alpha))
    plain(loaded, ids)
    assert calls
    with torch.no_grad():
        for module in modules:
            del module.watcher
        found = [module(x, chosen, alpha) for module, x, chosen, alpha in calls]
        for module in modules:
            del module.skipping
            if not packed:
                module.config._experts_implementation = "eager"
        for (module, x, chosen, alpha), got in zip(calls, found, strict=True):
            left = alpha * (torch.arange(alpha.shape[1]) == alpha.argmax(-1, keepdim=True))
            assert_close(got, module(x, chosen, left), "one expert")


def test_others_do_not_compute(make) -> None:
    loaded, ids = load(head_class("mixtral"), make("mixtral", True)), batches(1).ids
    rows: list[int] = []
    for module in [m for m in loaded.modules() if isinstance(getattr(m, "packed", None), PackedExperts)]:
        module.skipping = Skipper("compressed-experts", Rule(threshold=1, experts=4), True, vectors=shaken(module.packed.layout))
        for bank in module.packed.banks("down").values():
            own = bank.matmul
            bank.matmul = lambda x, slots, own=own: rows.append(int((slots >= 0).sum())) or own(x, slots)
    plain(loaded, ids)
    assert sum(rows) == 2 * ids.numel()  # two layers, one expert a token


def test_choice_sentinels_and_protected_tokens() -> None:
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    assert compressed_experts(weights, 2).tolist() == [[True, False, False], [False, True, False]]
    vectors = Vectors({"up": (4, 5), "down": (4, 6)})
    with torch.no_grad():
        vectors.up.copy_(torch.arange(4.0)[:, None].expand(4, 5))
    chosen = torch.tensor([[1, 3, 0], [2, 0, 4]])  # 4: no expert
    means = vectors(chosen, weights, torch.tensor([[-1, 3, -1], [2, -1, -1]]))
    assert torch.allclose(means["up"][:, 0], torch.tensor([0.2 / 0.5 * 1.0, 0.0]))
    means = vectors(chosen, weights, chosen)  # nothing is skipped
    assert torch.equal(means["up"], torch.ones(2, 5)) and torch.equal(means["down"], torch.ones(2, 6))


@pytest.fixture(scope="module")
def alike(make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts are alike, so that something is to be known about those that do not compute."""
    source = Path(shutil.copytree(make("qwen3_moe"), tmp_path_factory.mktemp("alike") / "model"))
    tensors = load_file(source / "model.safetensors")
    others = [name for name in tensors if re.search(r"experts\.[1-9]", name)]
    assert len(others) == 2 * 3 * 3  # three of four, in two layers
    mixed = {name: torch.lerp(tensors[name], tensors[re.sub(r"experts\.\d", "experts.0", name)], 0.8) for name in others}
    save_file(tensors | mixed, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.fixture(scope="module")
def tuned(alike: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("tuned") / "out"
    text = batches(40)
    return out, route_folder.route(str(alike), out, "compressed-experts", tokens=text, heldout=6, steps=60)


def test_training_lowers_the_divergence(tuned, alike: Path) -> None:
    out, record = tuned
    without, with_ = record["curve"][1:]
    assert with_["kl_mean"] < without["kl_mean"] and record["after"]["kl_mean"] == with_["kl_mean"]
    assert record["training"]["main"] == 1 and record["training"]["kl"] < record["training"]["kl_first"]
    assert record["skipped"] == record["calibration_skipped"] == 0.5
    experts = list(find_experts(load(head_class("qwen3_moe"), alike)))
    assert record["vectors_bytes"] == len(experts) * 4 * (64 + 64 + 32) * 2
    file = (out / pruner.FILE).stat().st_size
    assert record["vectors_bytes"] < file < record["vectors_bytes"] + 2000


def test_stored_folder_computes_what_was_measured(tuned, alike: Path) -> None:
    out, _ = tuned
    policy = read_policy(out)
    assert policy is not None and all(any((v != 1).any() for v in one.parameters()) for one in policy.pruners.values())
    ids = batches(2).ids
    whole = load(head_class("qwen3_moe"), alike)
    before = plain(whole, ids)
    route.apply(whole, policy)
    expected = plain(whole, ids)
    assert not torch.equal(expected, before)
    assert torch.equal(plain(loading.load(out, torch.float32), ids), expected)
    again = load(head_class("qwen3_moe"), out)  # an ordinary checkpoint: the policy is applied when asked
    route.apply(again, getattr(again.config, KEY))
    assert torch.equal(plain(again, ids), expected)
    route.remove(whole)
    assert torch.equal(plain(whole, ids), before)


def test_damaged_and_foreign_vectors_are_refused(tuned, make, tmp_path: Path) -> None:
    out, _ = tuned
    broken = Path(shutil.copytree(out, tmp_path / "broken"))
    policy = read_policy(out)
    assert policy is not None
    with pytest.raises(UserError, match="another model"):
        route.apply(load(head_class("mixtral"), make("mixtral")), policy)
    name = next(iter(policy.pruners))
    for change, words in (
        (Vectors({"gate": (4, 64), "up": (4, 64), "down": (4, 31)}), r"do not fit[^\n]*\n.*32.*\n.*31"),
        (Vectors({"up": (4, 64), "down": (4, 32)}), "do not fit"),
        (Vectors({"gate": (4, 64), "up": (4, 64), "down": (4, 32)}), "finite"),
    ):
        if words == "finite":
            change.up.data[1, 2] = float("nan")
        digest = pruner.write(broken, {**policy.pruners, name: change})
        config = json.loads((broken / "config.json").read_text())
        config[KEY]["learned"] = digest
        (broken / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=words):
            loading.load(broken)
    pruner.write(broken, policy.pruners)
    with pytest.raises(UserError, match="does not belong to the policy"):
        loading.load(broken)


@pytest.mark.parametrize(("wish", "words"), [
    ({"main": 2}, "1 to 1, of 2 experts"), ({"share": 0.5}, "--main"), ({"max_kl": 0.5}, "--main"),
    ({"policy": "odp", "share": 0.1, "main": 1}, "no main experts"),
])  # fmt: skip
def test_impossible_wishes_are_refused(make, tmp_path: Path, wish: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        route_folder.route(str(make("mixtral")), tmp_path / "out", **{"policy": "compressed-experts", "tokens": batches(), "heldout": 2, "steps": 1} | wish)
    assert not (tmp_path / "out").exists()


def test_one_expert_per_token_is_refused(make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choice of experts"):
        route_folder.route(str(make("zaya")), tmp_path / "out", "compressed-experts", tokens=batches(), heldout=2, steps=1)
    assert [main_experts(k, None) for k in (2, 3, 8)] == [1, 2, 4] and main_experts(8, 7) == 7


def test_vectors_that_do_not_help_are_refused(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Training, "rate_at", lambda self, step: 100.0)
    with pytest.raises(UserError, match="do not help"):
        route_folder.route(str(make("qwen3_moe")), tmp_path / "out", "compressed-experts", tokens=batches(), heldout=2, steps=2)
    assert not (tmp_path / "out").exists()
    small = ["calibration.sequences=8", "calibration.heldout=2", "route.policy=compressed-experts", "route.steps=2", *RECIPE]
    made = pipeline.quantize(pipeline.make_job(str(make("qwen3_moe")), recipe_from(small), tokens=batches()), tmp_path / "packed").manifest
    assert made["routing"]["kept"] is False and read_policy(tmp_path / "packed") is None
    assert made["routing"]["after"]["kl_mean"] == pytest.approx(made["heldout"]["plan"]["kl_mean"])


RECIPE = ["calibration.length=24", "allocate.compare=none", "compute.micro_batch=8", "allocate.allocator=uniform", "target.bits=5",
          "compute.dtype=float32", "allocate.candidates=[{bits: 4, group: 32}]"]  # fmt: skip


def test_recipe(alike: Path, tmp_path: Path) -> None:
    """Trained on the quantized model; what transformers loads computes what the record says."""
    small = ["calibration.sequences=30", "calibration.heldout=4", "route.policy=compressed-experts", "route.steps=40", "route.main=1", *RECIPE]
    out = tmp_path / "packed"
    made = pipeline.quantize(pipeline.make_job(str(alike), recipe_from(small), tokens=batches(30)), out).manifest
    record, ids = made["routing"], batches(2).ids
    assert record["kept"] and record["skipped"] == 0.5 and record["curve"][1]["kl_mean"] < record["curve"][0]["kl_mean"]
    loaded = load(head_class("qwen3_moe"), out)
    spies = [module for module in loaded.modules() if isinstance(module.__dict__.get("skipping"), Skipper)]
    assert len(spies) == 2 and all(module.skipping.vectors is not None for module in spies)
    assert torch.equal(plain(loading.load(out, torch.float32), ids), plain(loaded, ids))
    assert torch.equal(plain(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), ids), plain(loaded, ids))


def test_command(moecompress, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    options = ["--text", text_file, "--sequences", 12, "--heldout", 4, "--length", 32, "--no-speed", "--dtype", "float32"]
    ran = moecompress("tune-routing", tiny_model, "-o", tmp_path / "routed", "--policy", "compressed-experts", "--steps", 20, "--renormalise", *options)
    assert ran.code == 0 and "vectors, trained in 20 steps" in ran.out, ran.err
    ran = moecompress("tune-routing", tiny_model, "-o", tmp_path / "no", "--policy", "compressed-experts", "--skip", 0.3, *options)
    assert ran.code != 0 and "--main" in ran.err


def test_quantize_says_it(moecompress, tiny_model: Path, quick: list[str], tmp_path: Path) -> None:
    wish = [part for change in ("policy=compressed-experts", "steps=2") for part in ("--set", f"route.{change}")]
    ran = moecompress("quantize", tiny_model, "-o", tmp_path / "packed", "--target-bits", 5, *quick, *wish)
    assert ran.code == 0 and "vectors of compressed experts: " in ran.out, ran.err
    record = json.loads((tmp_path / "packed" / "moecompress" / "manifest.json").read_text())
    shards = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert record["total_bytes"] == shards and (record["routing"]["kept"] == (tmp_path / "packed" / pruner.FILE).exists())
