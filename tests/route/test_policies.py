"""Policies that see more than weights: attention received, router logits, learned masks, kinds of tokens, bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from roundtrip import assert_close, load, plain, stored, tokens, walked
from safetensors.torch import load_file, save_file
from tiny import head_class, shake, tiny_checkpoint, tiny_config
from transformers import AutoModelForCausalLM, DynamicCache

import moecompress.route as route
from moecompress import pipeline
from moecompress.calibrate.data import TokenBatches
from moecompress.errors import UserError
from moecompress.export.dense import export
from moecompress.model.walk import OpenModel
from moecompress.pack.manifest import read_manifest
from moecompress.recipe import load_recipe, recipe_from
from moecompress.route.calibrate import observe, skipped
from moecompress.route.folder import route as route_folder
from moecompress.route.folder import write
from moecompress.route.vision import frontier, observe_inputs, tune_modes
from moecompress.runtime import attention, loading, pruner
from moecompress.runtime.bank import SplitIntegers
from moecompress.runtime.packed import PackedExperts
from moecompress.runtime.skipping import KEY, Guard, Policy, Rule, adamoe, guarded, otp, read_policy, skip

pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")


NESTED = ["calibration.sequences=3", "calibration.heldout=1", "calibration.length=24", "allocate.compare=none", "compute.micro_batch=1",
          "allocate.allocator=uniform", "target.bits=5", "compute.dtype=float32"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "model"
            tiny_checkpoint(family, made[family])
        return made[family]

    return get


def batches(count: int = 6) -> TokenBatches:
    ids = torch.randint(5, 96, (count, 24), generator=torch.Generator().manual_seed(1))
    return TokenBatches.of(ids, torch.ones_like(ids, dtype=torch.bool))


# --- attention received ---------------------------------------------------------------------------------------------


def by_loop(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """maps [B, H, Q, K] as transformers returns them -> what each token gets from itself and the later queries, and from
    itself: sums over queries, down a column."""
    mean, (count, _, queries, keys) = maps.double().mean(1), maps.shape
    together, alone = torch.zeros(count, queries), torch.zeros(count, queries)
    for one in range(count):
        for token in range(queries):
            key = keys - queries + token
            together[one, token] = sum(mean[one, later, key] for later in range(token, queries)) / (queries - token)
            alone[one, token] = mean[one, token, key] * (mean[one, token] > 0).sum()  # as many as the query sees
    return together.flatten(), alone.flatten()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "axk2"])
def test_attention_received_is_that_of_the_maps(family: str, folder) -> None:
    """Against the maps that eager attention returns; gpt_oss has sinks, axk2 latent attention, mixtral a window."""
    ids = batches(2).ids
    model = head_class(family).from_pretrained(folder(family), dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        maps = model(ids, output_attentions=True, use_cache=False).attentions
    kinds = ["eager"] if family == "gpt_oss" else ["eager", "sdpa"]  # sdpa knows no sinks
    for kind in kinds:
        model = head_class(family).from_pretrained(folder(family), dtype=torch.float32, attn_implementation=kind).eval()
        before = plain(model, ids[:1])
        names = [name for name, module in model.named_modules() if name.endswith("mlp.experts")]
        watched = attention.watch(model, names)
        with torch.no_grad():
            model(ids, use_cache=False)
        for name in names:
            shown = watched[name].take()
            assert shown is not None and shown[2]
            for got, wanted in zip(shown[:2], by_loop(maps[int(name.split(".")[2])]), strict=True):
                torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-6)
        assert torch.equal(plain(model, ids[:1]), before), "watching changes nothing"
        attention.unwatch(model)
        assert all(one.take() is not None for one in watched.values())
        plain(model, ids[:1])
        assert all(one.take() is None for one in watched.values())


def test_attention_received_while_decoding_and_with_padding(folder) -> None:
    ids = batches(2).ids
    pad = torch.ones_like(ids)
    pad[0, :5] = 0
    model = head_class("qwen3_moe").from_pretrained(folder("qwen3_moe"), dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        maps = model(ids, attention_mask=pad, output_attentions=True, use_cache=False).attentions[1]
    model.set_attn_implementation("sdpa")
    name = "model.layers.1.mlp.experts"
    watched = attention.watch(model, [name])[name]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], attention_mask=pad[:, :20], past_key_values=cache)
        watched.take()
        for step in range(20, 24):
            model(ids[:, step : step + 1], attention_mask=pad[:, : step + 1], past_key_values=cache)
            shown = watched.take()
            assert shown is not None and not shown[2]
            sees = torch.tensor([step + 1 - 5, step + 1])  # without padding
            torch.testing.assert_close(shown[1], maps[:, :, step, step].mean(1) * sees, rtol=1e-4, atol=1e-6)
        model(ids, attention_mask=pad, use_cache=False)
    shown = watched.take()
    assert shown is not None and watched.take() is None
    together = by_loop(maps * pad[:, None, :, None])[0].view(2, 24)  # padding is no query
    torch.testing.assert_close(shown[0].view(2, 24)[pad.bool()], together[pad.bool()], rtol=1e-4, atol=1e-6)


class Spy:
    """In the place of a `Skipper`: keeps what it was asked and what it answered."""

    def __init__(self, module: Any):
        self.inner, self.policy, self.calls = module.skipping, module.skipping.policy, []
        module.skipping = self

    def __call__(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor):
        left, new = self.inner(hidden, chosen, weights)
        self.calls.append((hidden, weights, left))
        return left, new


def test_protected_tokens_lose_no_expert(folder, tmp_path: Path) -> None:
    """In a whole sequence and while decoding, by importances made from the maps of eager attention."""
    source, family = folder("qwen3_moe"), head_class("qwen3_moe")
    record = route_folder(str(source), tmp_path / "out", "odp", 0.3, heldout=1, tokens=batches(), protect=0.25)
    assert record["protected_by"] == {"attention": 2}
    loaded, ids = load(family, source), batches().ids[:5]
    route.apply(loaded, read_policy(tmp_path / "out"))
    name = "model.layers.0.mlp.experts"  # its inputs do not depend on what is skipped
    spy = Spy(loaded.get_submodule(name))
    rule = spy.inner.rule
    eager = family.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    cache = DynamicCache(config=loaded.config)
    with torch.no_grad():
        maps = eager(ids, output_attentions=True, use_cache=False).attentions[0]
        loaded(ids, use_cache=False)
        loaded(ids[:, :20], past_key_values=cache)
        for step in range(20, 24):
            loaded(ids[:, step : step + 1], past_key_values=cache)
    together, alone = by_loop(maps)
    size = spy.calls[0][0].abs().sum(-1)
    protected = together * size >= rule.guard.together
    assert protected.float().mean() == pytest.approx(0.25, abs=0.02)
    decoded = torch.cat([hidden.abs().sum(-1) * alone.view(5, 24)[:, 20 + step] for step, (hidden, _, _) in enumerate(spy.calls[2:])])
    lasting = decoded >= rule.guard.alone
    assert 0 < lasting.sum() < len(lasting)
    steps = [torch.cat(parts) for parts in zip(*spy.calls[2:], strict=True)]
    for (_, weights, left), safe in ((spy.calls[0], protected), (steps, lasting)):
        small = weights < rule.threshold * weights.amax(-1, keepdim=True)
        assert torch.equal(left < 0, small & ~safe[:, None])
        assert (small & safe[:, None]).any(), "nothing was protected from being skipped"


def test_layers_without_attention_protect_by_norm(folder, tmp_path: Path) -> None:
    source = folder("qwen3_5_moe")
    record = route_folder(str(source), tmp_path / "out", "top-p", 0.3, heldout=1, tokens=batches(), protect=0.1)
    assert record["protected_by"] == {"attention": 1, "norm": 1}
    guard = Guard(by="norm", together=6.0, alone=6.0)
    assert guarded(guard, torch.tensor([[1.0, -4.0], [3.0, -4.0]]), None).tolist() == [False, True]
    loaded = load(head_class("qwen3_5_moe"), source)
    route.apply(loaded, read_policy(tmp_path / "out"))
    plain(loaded, batches(1).ids)
    attention.watch(loaded, [])
    for module in loaded.modules():
        if "Attention" in type(module).__name__:
            module.__dict__.pop("received", None)  # as if its attention were of another kind
    with pytest.raises(UserError, match="attention cannot be seen"):
        plain(loaded, batches(1).ids)


# --- null experts ---------------------------------------------------------------------------------------------------


def test_adamoe_is_top_k_with_null_experts() -> None:
    """Against the plain way: logits of E experts and k nulls side by side, the k largest of all, softmax over the true ones."""
    generator = torch.Generator().manual_seed(0)
    logits, k, null = torch.randn(200, 10, generator=generator), 4, 0.9
    top, chosen = logits.topk(k)
    left, new = skip("adamoe", Rule(threshold=null, experts=10), True, chosen, top.softmax(-1), top)
    counts = []
    for token in range(200):
        both = torch.cat([logits[token], torch.full((k,), null)]).topk(k).indices
        true = [int(e) for e in both if e < 10] or [int(logits[token].argmax())]
        counts.append(len(true))
        kept = {int(e): float(w) for e, w in zip(left[token], new[token], strict=True) if e >= 0}
        assert kept.keys() == set(true)
        for expert, weight in zip(true, logits[token][true].softmax(-1).tolist(), strict=True):
            assert kept[expert] == pytest.approx(weight, rel=1e-5)
    assert len(set(counts)) == k
    assert not adamoe(top.softmax(-1), 99.0, 1.0, top).all(-1).any()


def test_adamoe_sees_the_model_s_own_logits(folder, tmp_path: Path) -> None:
    source = folder("gpt_oss")  # whose router has biases
    record = route_folder(str(source), tmp_path / "out", "adamoe", 0.2, heldout=1, tokens=batches())
    assert 0.1 < record["skipped"] < 0.3
    loaded = load(head_class("gpt_oss"), source)
    name = "model.layers.0.mlp.experts"
    router = loaded.get_submodule("model.layers.0.mlp.router")
    logits = []
    router.register_forward_hook(lambda module, inputs, _output: logits.append(inputs[0] @ module.weight.T + module.bias))
    route.apply(loaded, read_policy(tmp_path / "out"))
    spy = Spy(loaded.get_submodule(name))
    plain(loaded, batches(1).ids)
    top = logits[0].view(24, -1).topk(2).values
    assert torch.equal((spy.calls[0][2] < 0)[:, 1], top[:, 1] < spy.inner.rule.threshold) and not (spy.calls[0][2] < 0)[:, 0].any()


def test_adamoe_refuses_other_routers(folder, tmp_path: Path) -> None:
    """Biases of deepseek_v3 choose and do not weigh."""
    source = Path(shutil.copytree(folder("deepseek_v3"), tmp_path / "biased"))
    tensors = load_file(source / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("e_score_correction_bias")]
    save_file(tensors | {name: torch.tensor([0.2, -0.2, 0.0, 0.0])}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"adamoe does not fit the router of DeepseekV3ForCausalLM\n.*largest logits"):
        route_folder(str(source), tmp_path / "no", "adamoe", 0.2, heldout=1, tokens=batches())
    assert not (tmp_path / "no").exists()


# --- learned masks --------------------------------------------------------------------------------------------------


def test_otp_keeps_the_best_scored_number_of_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, scores = torch.rand(100, 4, generator=generator), torch.randn(100, 4, generator=generator)
    for threshold in (-0.5, 0.0, 0.7):
        skipped = otp(weights, threshold, 1.0, scores)
        for token in range(100):
            kept = max(range(1, 5), key=lambda c: scores[token, c - 1] + threshold * (4 - c))
            best = sorted(range(4), key=lambda j: -weights[token, j])[:kept]
            assert [not gone for gone in skipped[token].tolist()] == [j in best for j in range(4)]


@pytest.fixture(scope="module")
def sharp(folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The recipe as it is, but for less text and fewer steps."""
    small = ["calibration.sequences=6", "calibration.heldout=2", "calibration.length=24", "compute.micro_batch=2", "route.steps=30", "allocate.layer_bits=22",
             "allocate.compare=none", "quantize.allow_fallback=true", "compute.dtype=float32"]  # fmt: skip
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "mc-sharp.yaml", small)
    out = tmp_path_factory.mktemp("sharp") / "out"
    return out, pipeline.quantize(pipeline.make_job(str(folder("mixtral")), recipe, tokens=batches()), out).manifest


def test_mc_sharp(sharp, tmp_path: Path, folder) -> None:
    """Quantized and pruned by learned masks; loaded by transformers and by us, what is skipped is not computed."""
    out, manifest = sharp
    record = manifest["routing"]
    assert record["policy"] == "otp" and record["training"]["steps"] == 30 and record["training"]["kl"] > 0
    assert 0.08 < record["skipped"] < 0.35 and record["calibration_skipped"] == pytest.approx(0.2, abs=0.03)
    assert pruner.FILE in read_manifest(out)["files"]
    loaded, ids = load(head_class("mixtral"), out), batches(1).ids
    expected = plain(loaded, ids)
    assert torch.equal(plain(loading.load(out, torch.float32), ids), expected)
    spies = [Spy(module) for module in loaded.modules() if "skipping" in module.__dict__]
    rows = []
    packed = [module.packed for module in loaded.modules() if isinstance(getattr(module, "packed", None), PackedExperts)]
    for one in packed:
        bank = next(iter(one.banks("down").values()))
        own = bank.matmul
        bank.matmul = lambda x, slots, own=own: rows.append(len(slots)) or own(x, slots)
    plain(loaded, ids)
    left = sum(int((answer >= 0).sum()) for spy in spies for _, _, answer in spy.calls)
    assert sum(rows) == left < 2 * 2 * 24
    for spy in spies:  # hard masks: as many of the largest weights as the scores say
        hidden, weights, answer = spy.calls[0]
        one, two = spy.inner.score(hidden, None, weights).unbind(-1)
        ahead = two - one - spy.inner.rule.threshold
        clear = ahead.abs() > 1e-5  # the threshold is where some token's two masks are even
        assert torch.equal((answer >= 0).sum(-1)[clear], 1 + (ahead > 0).int()[clear]) and clear.sum() > 20
        assert (answer.gather(1, weights.argmax(-1, keepdim=True)) >= 0).all()


def test_masks_go_where_the_policy_goes(sharp, folder, tmp_path: Path) -> None:
    """A folder with learned masks that is quantized keeps them; one that is exported, or tuned again, does not."""
    route_folder(str(folder("mixtral")), tmp_path / "routed", "otp", 0.2, heldout=2, tokens=batches(), steps=1)
    recipe = recipe_from([*NESTED, "allocate.candidates=[{bits: 4, group: 32}]"])
    pipeline.quantize(pipeline.make_job(str(tmp_path / "routed"), recipe, tokens=tokens(96)), tmp_path / "packed")
    assert any("skipping" in module.__dict__ for module in loading.load(tmp_path / "packed").modules())
    export(sharp[0], tmp_path / "dense", "float32")
    assert not (tmp_path / "dense" / pruner.FILE).exists()
    route_folder(str(sharp[0]), tmp_path / "again", "odp", 0.2, heldout=2, tokens=batches())
    assert not (tmp_path / "again" / pruner.FILE).exists() and read_policy(tmp_path / "again").learned is None


def test_masks_of_another_folder_are_refused(sharp, folder, tmp_path: Path) -> None:
    out, _ = sharp
    broken = Path(shutil.copytree(out, tmp_path / "broken"))
    (broken / "moecompress" / "manifest.json").unlink()
    pruners = pruner.read(out, read_policy(out).learned)
    next(iter(pruners.values())).bias += 1
    pruner.write(broken, pruners)
    for load_it in (loading.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(UserError, match="does not belong to the policy"):
            load_it(broken)
    (broken / pruner.FILE).unlink()
    with pytest.raises(UserError, match="is missing"):
        loading.load(broken)
    other = load(head_class("qwen3_moe"), folder("qwen3_moe"))
    with pytest.raises(UserError, match="another model"):
        route.apply(other, read_policy(out))


def test_training_finds_where_skipping_is_cheap(folder, tmp_path: Path) -> None:
    """Of a model whose second layer's experts hardly add anything. Its folder is an ordinary one: the policy is applied when asked."""
    source, text = Path(shutil.copytree(folder("qwen3_moe"), tmp_path / "source")), batches(10)
    tensors = load_file(source / "model.safetensors")
    quiet = [name for name in tensors if ".layers.1." in name and "experts" in name and "down_proj" in name]
    save_file(tensors | {name: tensors[name] * 0.01 for name in quiet}, source / "model.safetensors", {"format": "pt"})
    blind = route_folder(str(source), tmp_path / "odp", "odp", 0.25, heldout=4, tokens=text, protect=0)
    found = route_folder(str(source), tmp_path / "80", "otp", 0.25, heldout=4, tokens=text, steps=80)
    assert found["calibration_skipped"] == pytest.approx(0.25, abs=0.02)
    assert 0 < found["after"]["kl_mean"] < 0.5 * blind["after"]["kl_mean"]
    again = load(head_class("qwen3_moe"), tmp_path / "80")
    whole = plain(again, text.ids[:1])
    route.apply(again, getattr(again.config, KEY))
    assert not torch.equal(plain(again, text.ids[:1]), whole)
    assert torch.equal(plain(loading.load(tmp_path / "80", torch.float32), text.ids[:1]), plain(again, text.ids[:1]))


# --- dynamic bits ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=[4, 3])
def nested(request: pytest.FixtureRequest, folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = recipe_from([*NESTED, f"allocate.candidates=[{{code: nested, bits: {request.param}, group: 32}}]"])
    out = tmp_path_factory.mktemp("nested") / "out"
    pipeline.quantize(pipeline.make_job(str(folder("qwen3_moe")), recipe, tokens=tokens(96)), out)
    return out


def test_dynamic_bits(nested: Path, tmp_path: Path) -> None:
    """Pairs of small weight compute what the model loaded at two bits computes, the others what it computes at all bits; and
    only the latter read the tensor of lower bits."""
    record = route_folder(str(nested), tmp_path / "out", "dynamic-bits", 0.4, heldout=2, tokens=batches())
    assert record["calibration_skipped"] == pytest.approx(0.4, abs=0.01) and record["after"]["kl_mean"] > 0
    out, ids = tmp_path / "out", batches(1).ids
    loaded, all_bits = load(head_class("qwen3_moe"), out), load(head_class("qwen3_moe"), nested)
    two_bits = loading.load(nested, torch.float32, load_bits=2)
    assert_close(plain(loading.load(out, torch.float32), ids), plain(loaded, ids), "loaded by us")
    opened = OpenModel(out, torch.float32, prepare=loading.prepare(out))
    found = observe(opened, [ids], torch.ones_like(ids, dtype=torch.bool))
    assert len(found) == 2
    name = "model.layers.0.mlp.experts"
    experts = loaded.get_submodule(name)
    banks = experts.packed.nested()
    assert banks and all(isinstance(bank, SplitIntegers) for bank in banks)
    generator = torch.Generator().manual_seed(3)
    x, chosen = torch.randn(40, 64, generator=generator), torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(40)])
    weights = torch.rand(40, 2, generator=generator)
    few = experts.skipping(x, chosen, weights)[0] < 0
    assert 0 < few.sum() < few.numel()
    one = torch.ones(1, 1)
    rows: dict[bool, int] = {True: 0, False: 0}
    for bank in banks:
        own = bank.matmul
        bank.matmul = lambda x, slots, own=own, bank=bank: rows.__setitem__(bank.few, rows[bank.few] + len(slots)) or own(x, slots)
    with torch.no_grad():
        got = experts(x, chosen, weights)
        for token in range(40):
            wanted = torch.zeros(64)
            for place in range(2):
                model = two_bits if few[token, place] else all_bits
                wanted += weights[token, place] * model.get_submodule(name)(x[token : token + 1], chosen[token : token + 1, place : place + 1], one)[0]
            torch.testing.assert_close(got[token], wanted, rtol=1e-3, atol=1e-4)
    assert rows[True] == 3 * int(few.sum()) and rows[False] == 3 * int((~few).sum())


def test_dynamic_bits_saved_and_taken_away(nested: Path, tmp_path: Path) -> None:
    route_folder(str(nested), tmp_path / "out", "dynamic-bits", 0.4, heldout=2, tokens=batches())
    ids = batches(1).ids
    loaded = load(head_class("qwen3_moe"), tmp_path / "out")
    expected = plain(loaded, ids)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(plain(load(head_class("qwen3_moe"), tmp_path / "again"), ids), expected)
    before, after = stored(nested), stored(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    route.remove(loaded)
    assert torch.equal(plain(loaded, ids), plain(load(head_class("qwen3_moe"), nested), ids))
    fewer = loading.load(tmp_path / "out", torch.float32, load_bits=2)  # has no bits to leave out, and no complaint
    assert_close(plain(fewer, ids), plain(loading.load(nested, torch.float32, load_bits=2), ids), "at two bits")
    fewer.save_pretrained(tmp_path / "two")
    assert KEY not in json.loads((tmp_path / "two" / "config.json").read_text())
    assert_close(plain(loading.load(tmp_path / "two", torch.float32), ids), plain(fewer, ids), "saved at two bits")


def test_dynamic_bits_needs_nested_integers(folder, sharp, tmp_path: Path) -> None:
    for source, words in ((folder("mixtral"), "an ordinary checkpoint"), (sharp[0], "other codes")):
        with pytest.raises(UserError, match=f"no bits to leave out\n.*nested.*\n.*{words}"):
            route_folder(str(source), tmp_path / "no", "dynamic-bits", 0.2, heldout=2, tokens=batches())


# --- two kinds of tokens --------------------------------------------------------------------------------------------

IMAGE = 3


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """qwen3_vl_moe, and four inputs with an image of 4 × 4 patches, four tokens, each."""
    folder = tmp_path_factory.mktemp("eyes") / "model"
    torch.manual_seed(0)
    config = tiny_config("qwen3_vl_moe")
    config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id = IMAGE, 4, 5, 6
    model = head_class("qwen3_vl_moe")._from_config(config)
    shake(model)
    model.save_pretrained(folder)
    vision, generator = config.vision_config, torch.Generator().manual_seed(5)
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs = []
    for _ in range(4):
        ids = torch.randint(8, 96, (1, 20), generator=generator)
        ids[0, 2], ids[0, 3:7], ids[0, 7] = 5, IMAGE, 6
        inputs.append({"input_ids": ids, "pixel_values": torch.randn(16, size, generator=generator), "image_grid_thw": torch.tensor([[1, 4, 4]]),
                       "mm_token_type_ids": (ids == IMAGE).int()})  # fmt: skip
    return folder, inputs


def test_modes_tells_images_from_text(eyes, tmp_path: Path) -> None:
    """The frontier against all pairs of levels; then each kind of token by its own threshold, in a folder loaded again."""
    folder, inputs = eyes
    model = load(head_class("qwen3_vl_moe"), folder)
    seen = observe_inputs(model, inputs)
    assert all(one.vision is not None and one.vision.sum() == 16 and len(one.vision) == 80 for one in seen.values())
    assert sum(one.importance for one in seen.values()) == pytest.approx(1)
    pairs = frontier(seen, 0.3, 6)
    grids = [sorted({0.0} | {pair.text for pair in pairs}), sorted({pair.vision for pair in frontier(seen, 0.0, 6)} | {pair.vision for pair in pairs})]
    for pair in pairs:
        counted = [0, 0]
        for one in seen.values():
            for row, picture in zip((one.importance * one.weights).tolist(), one.vision.tolist(), strict=True):
                counted[0] += sum(score < (pair.vision if picture else pair.text) for score in row)
                counted[1] += len(row)
        assert pair.skipped == pytest.approx(counted[0] / counted[1]) and pair.skipped >= 0.3
        lower = [vision for vision in grids[1] if vision < pair.vision]
        assert all(skipped("modes", seen, dict.fromkeys(seen, pair.text), dict.fromkeys(seen, vision)) < 0.3 for vision in lower)
    policy, measured = tune_modes(model, inputs[:3], inputs[3:], 0.3, 6)
    best = min(measured, key=lambda pair: pair.kl)
    rules = list(policy.layers.values())
    assert len(measured) > 2 and best.kl > 0 and {(rule.threshold, rule.vision) for rule in rules} == {(best.text, best.vision)}
    assert not any("skipping" in module.__dict__ or "kinds" in module.__dict__ for module in model.modules())
    write(folder, tmp_path / "out", policy, {})
    again = loading.load(tmp_path / "out", torch.float32)
    spies = [Spy(module) for module in again.modules() if "skipping" in module.__dict__]
    with torch.no_grad():
        again(**inputs[3], use_cache=False)
    pictures = inputs[3]["input_ids"].flatten() == IMAGE
    for spy in spies:
        ((_, weights, left),) = spy.calls
        limit = torch.where(pictures, spy.inner.rule.vision, spy.inner.rule.threshold)[:, None]
        assert torch.equal(left < 0, spy.inner.rule.importance * weights < limit)
    # The layer walk has several micro-batches on their way at once, and still tells the kinds of each.
    ids = torch.cat([one["input_ids"] for one in inputs])
    ids[1, 3:7] = 9  # a sequence without an image
    opened = OpenModel(tmp_path / "out", torch.float32, prepare=loading.prepare(tmp_path / "out"))
    spies = [Spy(module) for module in opened.model.modules() if "skipping" in module.__dict__]
    walked(opened, ids)
    for spy in spies:
        for lane, (_, weights, left) in enumerate(spy.calls):
            limit = torch.where(ids[lane] == IMAGE, spy.inner.rule.vision, spy.inner.rule.threshold)[:, None]
            assert torch.equal(left < 0, spy.inner.rule.importance * weights < limit)


def test_modes_of_a_text_model_has_one_threshold(folder) -> None:
    with pytest.raises(UserError, match="no tokens of images"):
        tune_modes(load(head_class("qwen3_moe"), folder("qwen3_moe")), [], [], 0.2)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_options(folder, tmp_path: Path, moecompress, tiny_model: Path, text_file: Path) -> None:
    options = ["--text", text_file, "--sequences", 4, "--length", 32, "--heldout", 1, "--no-speed"]
    ran = moecompress("tune-routing", tiny_model, "-o", tmp_path / "out", "--policy", "odp", "--skip", 0.2, "--protect", 0.1, *options)
    assert ran.code == 0 and "by attention received × norm in 3 layers" in ran.out
    ran = moecompress("tune-routing", tiny_model, "-o", tmp_path / "otp", "--policy", "otp", "--skip", 0.2, "--steps", 3, "--json", *options)
    assert ran.code == 0 and ran.json()["training"]["steps"] == 3, ran.err
    ran = moecompress("tune-routing", tiny_model, "-o", tmp_path / "no", "--policy", "dynamic-bits", "--skip", 0.2, *options)
    assert ran.code == 2 and "nested" in ran.err and "Traceback" not in ran.err


def test_policies_of_older_folders_still_load() -> None:
    old = {"policy": "odp", "renormalise": True, "top_k": 2, "skip": 0.1, "layers": {"a": {"threshold": 0.2, "experts": 4}}}
    assert Policy.model_validate(old).layers["a"].guard is None
