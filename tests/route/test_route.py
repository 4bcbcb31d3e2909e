"""Tuning, writing and loading on tiny checkpoints of several families, ordinary and packed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from roundtrip import SMALL, assert_close, load, plain, stored, tokens
from tiny import head_class, tiny_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import moe as hf_moe

import moecompress.route as route
from moecompress import pipeline
from moecompress.calibrate.data import TokenBatches, split_heldout
from moecompress.errors import UserError
from moecompress.export.dense import export
from moecompress.model.experts import resolve
from moecompress.model.walk import OpenModel
from moecompress.prune import prune
from moecompress.recipe import step_from
from moecompress.route.calibrate import Seen, most_share, observe, tune
from moecompress.route.folder import route as route_folder
from moecompress.route.frontier import counting
from moecompress.runtime import loading
from moecompress.runtime.bank import DenseBank, IntegerBank, PackedBank
from moecompress.runtime.packed import PackedExperts
from moecompress.runtime.skipping import KEY, Policy, forget_policy, read_policy

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "glm4_moe", "qwen3_5_moe"]
WEIGHTS_ALONE = ["odp", "naee", "top-p", "modes"]
PACKED = ["mixtral", "gpt_oss", "qwen3_5_moe"]


@dataclass
class Model:
    """A checkpoint, ordinary or packed; the class that loads it, and tokens for it."""

    folder: Path
    head: type[PreTrainedModel]
    tokens: TokenBatches

    @property
    def ids(self) -> torch.Tensor:
        return self.tokens.ids[:2]

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return load(self.head, self.folder, dtype)

    @cached_property
    def seen(self) -> dict[str, Seen]:
        opened = OpenModel(self.folder, torch.float32, prepare=loading.prepare(self.folder))
        return observe(opened, self.tokens.ids.split(1), self.tokens.mask, weigh=True)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory):
    """``make(family)`` or ``make(family, True)`` for packed; each is made once."""
    made: dict[tuple[str, bool], Model] = {}

    def get(family: str, packed: bool = False) -> Model:
        if (family, packed) not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            if packed:
                source = get(family)
                pipeline.quantize(pipeline.make_job(str(source.folder), SMALL, tokens=source.tokens), folder)
                made[family, packed] = Model(folder, source.head, source.tokens)
            else:
                config = tiny_checkpoint(family, folder)
                made[family, packed] = Model(folder, head_class(family), tokens(config.get_text_config().vocab_size))
        return made[family, packed]

    return get


def both(families: list[str]) -> list[Any]:
    return [(family, False) for family in families] + [(family, True) for family in families if family in PACKED]


@pytest.fixture(params=both(FAMILIES), ids=lambda case: case[0] + (" packed" if case[1] else ""))
def model(request: pytest.FixtureRequest, make) -> Model:
    return make(*request.param)


@pytest.fixture
def mixtral(make) -> Model:
    return make("mixtral")


def test_wanted_share_is_skipped(model: Model) -> None:
    seen = model.seen
    for name, share in (("odp", 0.15), ("naee", 0.3), ("top-p", 0.25), ("modes", 0.4)):
        policy = tune(name, seen, share)
        assert policy.skip == pytest.approx(share, abs=0.01)
    assert sum(one.importance for one in seen.values()) == pytest.approx(1)


def test_share_when_the_model_runs(mixtral: Model) -> None:
    """All layers skip at once, on the very text: what the first ones skip hardly moves the routing of the last."""
    for name in ("odp", "modes"):
        policy = tune(name, mixtral.seen, 0.2)
        opened = OpenModel(mixtral.folder, torch.float32)
        route.apply(opened.model, policy)
        counts = counting(opened.model)
        observe(opened, mixtral.tokens.ids.split(1), mixtral.tokens.mask)
        assert sum(n for n, _ in counts) / sum(n for _, n in counts) == pytest.approx(0.2, abs=0.03)


def test_skipping_is_a_weight_of_zero(model: Model) -> None:
    """Against transformers' own loop over experts on the weights that the policy leaves, or for packed experts all pairs."""
    loaded = model.load()
    policy = tune("odp", model.seen, 0.3)
    route.apply(loaded, policy)
    experts = loaded.get_submodule(next(iter(policy.layers)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 64, generator=generator)
    chosen = torch.stack([torch.randperm(experts.num_experts, generator=generator)[:2] for _ in range(20)])
    weights = torch.rand(20, 2, generator=generator)
    left, new = experts.skipping(x, chosen, weights)
    assert 0 < (left < 0).sum() < left.numel()
    with torch.no_grad():
        got = experts(x, chosen, weights)
        del experts.skipping
        if not hasattr(experts, "packed"):
            experts.config._experts_implementation = "eager"
        assert_close(got, experts(x, chosen, new), "experts left")


def test_skipped_pairs_are_not_computed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = model.load()
    policy = tune("odp", model.seen, 0.4)
    banks = {id(bank) for m in loaded.modules() if isinstance(m, PackedExperts) for bank in m.modules() if isinstance(bank, PackedBank)}
    rows: list[int] = []
    grouped = hf_moe._grouped_mm

    def spy(x, weight, offs):
        rows.append(len(x))
        return grouped(x, weight, offs)

    def spying(matmul):
        def spy_packed(self, x, slots):
            rows.extend([int((slots >= 0).sum())] if id(self) in banks else [])
            return matmul(self, x, slots)

        return spy_packed

    monkeypatch.setattr(hf_moe, "_grouped_mm", spy)
    for kind in (IntegerBank, DenseBank):
        monkeypatch.setattr(kind, "matmul", spying(kind.matmul))
    for name in policy.layers:
        loaded.get_submodule(resolve(loaded, name)).config._experts_implementation = "moecompress"
    plain(loaded, model.ids)
    everything = sum(rows)
    rows.clear()
    route.apply(loaded, policy)
    counts = counting(loaded)
    plain(loaded, model.ids)
    skipped, calls = map(sum, zip(*counts, strict=True))
    assert skipped > 0
    assert sum(rows) * calls == everything * (calls - skipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_skipped_changes_no_bit(model: Model, dtype: torch.dtype) -> None:
    loaded = model.load(dtype)
    for module in loaded.modules():  # the implementation that skips, without a policy
        if hasattr(module, "num_experts") and hasattr(module, "config"):
            module.config._experts_implementation = "moecompress"
    before = plain(loaded, model.ids)
    for name in WEIGHTS_ALONE:
        route.apply(loaded, tune(name, model.seen, 0.0))
        assert torch.equal(plain(loaded, model.ids), before)
    route.apply(loaded, tune("odp", model.seen, 0.4))
    assert not torch.equal(plain(loaded, model.ids), before)
    route.remove(loaded)
    assert torch.equal(plain(loaded, model.ids), before)


def test_written_folder_computes_the_same(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = route_folder(str(model.folder), out, "odp", 0.2, heldout=1, tokens=model.tokens)
    assert record["after"]["kl_mean"] > 0 and 0 < record["skipped"] < 0.5
    policy = read_policy(out)
    loaded = model.load()
    route.apply(loaded, policy)
    expected = plain(loaded, model.ids)
    assert torch.equal(plain(loading.load(out, torch.float32), model.ids), expected)
    again = load(model.head, out)
    if loading.is_packed(out):
        assert torch.equal(plain(again, model.ids), expected)
        loading.verify_files(out)
        auto = load(AutoModelForCausalLM, out)  # of qwen3_5_moe the text part alone
        assert_close(plain(auto, model.ids), expected, "by AutoModelForCausalLM")
        again.save_pretrained(tmp_path / "saved")
        assert torch.equal(plain(load(model.head, tmp_path / "saved"), model.ids), expected)
        export(out, tmp_path / "dense", "float32")
        assert KEY not in json.loads((tmp_path / "dense" / "config.json").read_text())
    else:
        assert torch.equal(plain(again, model.ids), plain(model.load(), model.ids))  # ordinary: only when asked
        route.apply(again, getattr(again.config, KEY))
        assert torch.equal(plain(again, model.ids), expected)
    assert stored(out).keys() == stored(model.folder).keys()


def test_a_new_policy_replaces_the_old(mixtral: Model, tmp_path: Path) -> None:
    first = route_folder(str(mixtral.folder), tmp_path / "first", "odp", 0.3, heldout=1, tokens=mixtral.tokens)
    again = route_folder(str(tmp_path / "first"), tmp_path / "again", "odp", 0.3, heldout=1, tokens=mixtral.tokens)
    assert again["thresholds"] == first["thresholds"] and again["after"] == first["after"]
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    (tmp_path / "first" / "config.json").write_text(json.dumps(config | {KEY: "damaged"}))
    pair = route_folder(str(tmp_path / "first"), tmp_path / "third", "naee", 0.1, heldout=1, tokens=mixtral.tokens,
                        reference=str(mixtral.folder))  # fmt: skip
    assert pair["before"]["kl_mean"] == 0 < pair["after"]["kl_mean"]


def test_quantizing_keeps_the_policy(mixtral: Model, tmp_path: Path) -> None:
    route_folder(str(mixtral.folder), tmp_path / "routed", "odp", 0.3, heldout=1, tokens=mixtral.tokens)
    pipeline.quantize(pipeline.make_job(str(tmp_path / "routed"), SMALL, tokens=mixtral.tokens), tmp_path / "packed")
    loaded = load(mixtral.head, tmp_path / "packed")
    counts = counting(loaded)
    plain(loaded, mixtral.ids)
    assert sum(n for n, _ in counts) / sum(n for _, n in counts) == pytest.approx(0.3, abs=0.1)


def test_dropping_experts_leaves_the_policy_out(mixtral: Model, tmp_path: Path) -> None:
    """It was tuned for more experts, and the smaller model could not be loaded with it."""
    route_folder(str(mixtral.folder), tmp_path / "routed", "odp", 0.3, heldout=1, tokens=mixtral.tokens)
    recipe = SMALL.model_copy(update={"transform": (step_from({"method": "reap", "keep": 3}),)})
    job = pipeline.make_job(str(tmp_path / "routed"), recipe, tokens=mixtral.tokens)
    prune(job, tmp_path / "pruned")
    assert KEY in job.opened.checkpoint.config and KEY not in json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert read_policy(tmp_path / "pruned") is None


def test_more_skipping_costs_more(mixtral: Model, tmp_path: Path) -> None:
    costs = [route_folder(str(mixtral.folder), tmp_path / str(share), "odp", share, heldout=1, tokens=mixtral.tokens)["after"]["kl_mean"]
             for share in (0.0, 0.1, 0.4)]  # fmt: skip
    assert costs[0] == 0 < costs[1] < costs[2]


def test_as_many_as_a_divergence_allows(mixtral: Model, tmp_path: Path) -> None:
    """The curve begins where nothing is skipped and grows; of its points within the limit, the last is the one written."""
    limit = 0.5 * route_folder(str(mixtral.folder), tmp_path / "much", "top-p", 0.4, heldout=1, tokens=mixtral.tokens)["after"]["kl_mean"]
    record = route_folder(str(mixtral.folder), tmp_path / "out", "top-p", heldout=1, tokens=mixtral.tokens, max_kl=limit)
    curve = record["curve"]
    assert curve[0]["kl_mean"] == curve[0]["skipped"] == 0
    shares = [row["calibration_skipped"] for row in curve]
    assert shares == sorted(shares) and len(curve) > 4
    harmless = [row for row in curve if row["kl_mean"] <= limit]
    assert harmless[-1]["skipped"] == record["skipped"] > 0 and harmless[-1]["kl_mean"] == record["after"]["kl_mean"] <= limit
    assert max(shares) > record["calibration_skipped"], "nothing larger was tried"
    assert read_policy(tmp_path / "out").skip == record["calibration_skipped"]
    # Measured again by the written folder itself, loaded by transformers.
    ids = split_heldout(mixtral.tokens, 1)[1].ids
    p, q = (plain(one, ids).log_softmax(-1) for one in (mixtral.load(), loading.load(tmp_path / "out", torch.float32)))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(record["after"]["kl_mean"], rel=0.02)


def test_no_limit_is_every_call_that_the_policy_can_skip(mixtral: Model, tmp_path: Path) -> None:
    record = route_folder(str(mixtral.folder), tmp_path / "out", "naee", heldout=1, tokens=mixtral.tokens, max_kl=100.0)
    assert record["skipped"] == pytest.approx(0.5) and most_share("naee", mixtral.seen) == pytest.approx(0.5)


def test_impossible_limits_are_refused(mixtral: Model, tmp_path: Path) -> None:
    for share, limit, words in ((None, 0.0, "cannot stay within that KL"), (None, None, "neither"), (0.1, 0.1, "both")):
        with pytest.raises(UserError, match=words):
            route_folder(str(mixtral.folder), tmp_path / "no", "odp", share, heldout=1, tokens=mixtral.tokens, max_kl=limit)
    assert not (tmp_path / "no").exists()


def test_command_line(tiny_model: Path, text_file: Path, tmp_path: Path, moecompress) -> None:
    options = ["--text", text_file, "--sequences", 4, "--length", 32, "--heldout", 1]
    ran = moecompress("tune-routing", tiny_model, "-o", tmp_path / "out", "--policy", "modes", "--skip", 0.25, "--renormalise", *options)
    assert ran.code == 0 and "policy modes skips" in " ".join(ran.out.split())
    assert read_policy(tmp_path / "out").renormalise
    ran = moecompress("tune-routing", tiny_model, "-o", tmp_path / "within", "--max-kl", 0.1, "--json", *options)
    assert ran.code == 0 and ran.json()["after"]["kl_mean"] <= 0.1, ran.err
    assert all(row["tokens_per_second"] > 0 for row in ran.json()["curve"])
    ran = moecompress("tune-routing", tiny_model, "-o", tmp_path / "table", "--max-kl", 0.1, "--no-speed", *options)
    assert ran.code == 0 and ran.out.count("(kept)") == 1 and "tokens/s" not in ran.out
    ran = moecompress("tune-routing", tiny_model, "-o", tmp_path / "more", "--skip", 0.6, *options)
    assert ran.code == 2 and "at most 4" in ran.err
    assert not (tmp_path / "more").exists()


# --- refusals -------------------------------------------------------------------------------------------------------


def test_one_expert_per_token_is_refused() -> None:
    with pytest.raises(UserError, match="one expert per token"):
        tune("modes", {"experts": Seen(torch.ones(10, 1), 4)}, 0.1)


@pytest.mark.parametrize(("policy", "share", "words"), [
    ("odp", 0.6, "at most 50.0%"), ("naee", 0.6, "at most 50.0%"), ("top-p", 0.6, "at most 50.0%"),
    ("odp", 1.0, "Impossible share"), ("odp", -0.1, "Impossible share"), ("best", 0.1, "Unknown policy"),
])  # fmt: skip
def test_impossible_wishes_are_refused(mixtral: Model, policy: str, share: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tune(policy, mixtral.seen, share)


def test_layer_without_choice_is_named() -> None:
    """Routers that give every chosen expert the same weight: nothing tells which to skip, but other layers may give more."""
    layers = {"alike": Seen(torch.full((50, 2), 0.5), 4), "sure": Seen(torch.tensor([[0.9, 0.1]] * 25 + [[0.8, 0.2]] * 25), 4)}
    with pytest.raises(UserError, match=r"at most 0\.0% in alike\n.*\n.*top-p or modes"):
        tune("odp", layers, 0.2)
    assert tune("top-p", layers, 0.25).skip == 0.25
    assert most_share("odp", layers) == 0 and most_share("top-p", layers) == 0.5


def changed(policy: Policy, **changes: Any) -> dict[str, Any]:
    return policy.model_dump() | changes


def test_policies_of_other_models_are_refused(make, mixtral: Model) -> None:
    policy = tune("odp", mixtral.seen, 0.2)
    loaded = mixtral.load()
    layers = policy.model_dump()["layers"]
    first, *rest = layers
    more = layers | {"model.layers.7.mlp.experts": layers[first]}
    for wrong, words in (
        (changed(policy, layers={name: layers[name] for name in rest}), "rules for 1"),
        (changed(policy, layers=more), "module model.layers.7"),
        (changed(policy, top_k=3), "2 experts per token"),
        (changed(policy, layers=layers | {first: layers[first] | {"experts": 8}}), "4 experts in"),
        (changed(policy, layers=layers | {first: layers[first] | {"router": 1.01 * layers[first]["router"]}}), "norm"),
    ):
        with pytest.raises(UserError, match=words):
            route.apply(loaded, wrong)
    assert not any(hasattr(module, "skipping") for module in loaded.modules())
    with pytest.raises(UserError, match="another model"):
        route.apply(make("qwen3_moe").load(), policy)  # the same names and numbers


@pytest.mark.parametrize(("change", "words"), [
    ({"version": 2}, "version"), ({"policy": "best"}, "policy"), ({"layers": {"model": {}}}, "threshold"),
    ({"sikp": 1}, "sikp"), ({"top_k": "two"}, "top_k"),
])  # fmt: skip
def test_damaged_policies_are_refused(make, tmp_path: Path, change: dict, words: str) -> None:
    packed = make("mixtral", True)
    folder = Path(shutil.copytree(packed.folder, tmp_path / "packed"))
    (folder / "moecompress" / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config[KEY] = changed(tune("odp", packed.seen, 0.2)) | change
    (folder / "config.json").write_text(json.dumps(config))
    for load_it in (loading.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(UserError, match=words):
            load_it(folder)


@pytest.mark.parametrize(("policy", "fewer", "thinner", "stays"), [
    ("odp", False, True, True), ("odp", True, False, False), ("compressed-experts", False, True, False), ("compressed-experts", False, False, True),
])  # fmt: skip
def test_a_policy_of_other_experts_is_forgotten(policy: str, fewer: bool, thinner: bool, stays: bool, capsys: pytest.CaptureFixture[str]) -> None:
    config = {KEY: {"policy": policy}, "hidden_size": 64}
    forget_policy(config, fewer, thinner)
    assert (KEY in config) == stays and config["hidden_size"] == 64
    assert ("tune-routing" in capsys.readouterr().err) == (not stays)
