"""Thinner experts: against float64 least squares, against plain transformers with those neurons masked out, and by autograd."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import roundtrip
import torch
from tiny import head_class, shake, tiny_checkpoint, tiny_config
from whole import accounts_for_everything, after_step, job_of

from moecompress.calibrate.capture import Capture
from moecompress.errors import UserError
from moecompress.model import families
from moecompress.model.experts import ExpertsLayout, find_experts, layout_of
from moecompress.transform import gradient, slim
from moecompress.transform.outputs import canonical
from moecompress.transform.slim import Slimming

ALWAYS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h")
#: Why their experts cannot become thinner: shared experts or dense layers are as wide, and config.json has one number for both.
REFUSED = {"deepseek_v4": "shared_experts", "hunyuan_v1_moe": "shared_mlp", "inkling": "shared_experts", "jamba": "feed_forward"}
OTHERS = [f for f in families.INTERFACE if f not in (*ALWAYS, *families.FAILS, *REFUSED)]
T = 400
FORMS = ["mixtral", "gpt_oss", "nemotron_h"]  # gated; interleaved, transposed, with biases; without a gate

pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")


def slimmed(folder: Path, out: Path, score: str = "activation", width: float = 0.5, repair: bool = True, **more) -> dict:
    return after_step(folder, out, method="slim", score=score, width=width, repair=repair, **more)


# --- one layer ------------------------------------------------------------------------------------------------------


def experts_of(family: str) -> tuple[torch.nn.Module, ExpertsLayout]:
    """A family's experts module (E = 4, d = 64, m = 32 or 64) with random weights in float32."""
    config = tiny_config(family)
    config.dtype = torch.float32
    model = head_class(family)._from_config(config)
    shake(model)
    module = next(find_experts(model))[1].requires_grad_(False)
    return module, layout_of(module)


def site_of(module: torch.nn.Module, layout: ExpertsLayout, hessian: str = "g2", shrink: float = 0.0):
    """A layer without its model: T tokens, two experts each, some of which do not count."""
    g = torch.Generator().manual_seed(0)
    chosen = torch.rand(T, 4, generator=g).topk(2).indices
    weights = torch.rand(T, 2, generator=g).softmax(-1)
    capture = Capture(torch.randn(T, layout.hidden, generator=g), chosen, weights, torch.rand(T, generator=g) > 0.1)
    calibration = SimpleNamespace(workspace_bytes=0, hessian=hessian, shrink=shrink)
    return SimpleNamespace(module=module, moe=SimpleNamespace(module="here", layer=0, layout=layout), capture=capture, calibration=calibration)


def thin(site, count: int, repair: bool, damping: float = 0.01, values: torch.Tensor | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """Canonical tensors of the thinner experts, and the record."""
    changed, record = slim.thinned(site, Slimming("activation", count, repair, damping), values)
    layout = site.moe.layout
    named = {name.removeprefix("here."): tensor for name, tensor in changed.items()}
    module = SimpleNamespace(**named, has_bias=site.module.has_bias)
    return canonical(module, ExpertsLayout(4, layout.hidden, count, layout.transposed, layout.concatenated, layout.gated)), record


def inner_of(site, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [n, m] what enters an expert's down, by the module's own forward with the identity there; and g [n]."""
    module, c = site.module, site.capture
    hit = (c.chosen == expert) & c.keep[:, None]
    x, gate = c.hidden[hit.any(1)], c.weights[hit]
    down, bias = module.down_proj.clone(), getattr(module, "down_proj_bias", None)
    eye = torch.eye(*down.shape[1:]).expand_as(down)
    module.down_proj.copy_(eye)
    before = None if bias is None else bias.clone()
    if bias is not None:
        bias.zero_()
    a = module(x, torch.full((len(x), 1), expert), torch.ones(len(x), 1))[:, : site.moe.layout.width]
    module.down_proj.copy_(down)
    if bias is not None:
        bias.copy_(before)
    return a.double(), gate.double()


@pytest.mark.parametrize("family", FORMS)
def test_the_neurons_that_matter_are_kept(family: str) -> None:
    module, layout = experts_of(family)
    site = site_of(module, layout)
    new, record = thin(site, layout.width // 2, repair=False)
    old = canonical(module, layout)
    for e in range(4):
        a, g = inner_of(site, e)
        energy = (g[:, None] * a).square().sum(0) * old["down"][e].double().square().sum(0)
        wanted = energy.argsort(descending=True)[: layout.width // 2].sort().values
        assert slim.kept_neurons(record["kept"][e]) == wanted.tolist()
        assert torch.equal(new["down"][e], old["down"][e][:, wanted])
        for name in set(new) - {"down", "down_bias"}:
            assert torch.equal(new[name][e], old[name][e][wanted]), name


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("hessian", ["g2", "1"])
def test_repair_is_least_squares(family: str, hessian: str) -> None:
    """On the same activations, in float64: fit what all neurons gave, and stay near the old columns where λ says so."""
    module, layout = experts_of(family)
    site = site_of(module, layout, hessian)
    new, record = thin(site, layout.width // 2, repair=True, damping=1e-3)
    old = canonical(module, layout)["down"].double()
    for e in range(4):
        a, g = inner_of(site, e)
        kept = slim.kept_neurons(record["kept"][e])
        omega = g.square() if hessian == "g2" else torch.ones_like(g)
        root = (omega / omega.sum()).sqrt()[:, None]
        part = root * a[:, kept]
        ridge = math.sqrt(1e-3 * float(part.square().sum(0).mean())) * torch.eye(len(kept), dtype=torch.float64)
        target = torch.cat([root * (a @ old[e].T), ridge @ old[e][:, kept].T])
        wanted = torch.linalg.lstsq(torch.cat([part, ridge]), target).solution.T
        assert torch.allclose(new["down"][e].double(), wanted, atol=1e-4), float((new["down"][e] - wanted).abs().max())
        assert not torch.allclose(wanted, old[e][:, kept], atol=1e-2)
        lost = (root * (a @ old[e].T - a[:, kept] @ wanted.T)).square().sum() / (root * (a @ old[e].T)).square().sum()
        assert record["error"][e] == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("steps", [64, 3])
def test_greedy_leaves_out_what_the_others_replace_best(steps: int) -> None:
    """Every candidate refitted by float64 least squares, neuron after neuron (or the cheapest two at a time)."""
    g = torch.Generator().manual_seed(0)
    m, count, damping = 9, 3, 0.05
    a = torch.randn(2, 40, m, generator=g) @ torch.randn(2, m, m, generator=g)
    down, inner = torch.randn(2, 5, m, generator=g), a.transpose(1, 2) @ a / 40
    kept = slim.greedy(down, inner, count, damping, ["a", "b"], steps)
    for e in range(2):
        h = inner[e].double()
        lower = torch.linalg.cholesky(h + damping * h.diagonal().mean() * torch.eye(m, dtype=torch.float64)).T

        def loss(keep: list[int], lower=lower, target=down[e].double()) -> float:
            solved = torch.linalg.lstsq(lower[:, keep], lower @ target.T).solution
            return float((lower @ target.T - lower[:, keep] @ solved).square().sum())

        alive = list(range(m))
        while len(alive) > count:
            cheap = sorted(alive, key=lambda c: loss([x for x in alive if x != c]))
            gone = cheap[: 1 if steps == 64 else 2]
            alive = [x for x in alive if x not in gone]
        assert kept[e].tolist() == alive


def test_greedy_loses_less_than_the_energies_of_single_neurons() -> None:
    module, layout = experts_of("mixtral")
    site = site_of(module, layout)
    request = [Slimming(score, layout.width // 2) for score in ("greedy", "activation")]
    errors = [slim.thinned(site, one, None)[1]["error"] for one in request]
    assert all(good < bad for good, bad in zip(*errors, strict=True))


def test_keeping_all_neurons_changes_nothing() -> None:
    module, layout = experts_of("mixtral")
    new, record = thin(site_of(module, layout), layout.width, repair=True)
    for name, tensor in canonical(module, layout).items():
        assert torch.equal(new[name], tensor)
    assert max(record["error"]) == 0


def test_a_neuron_that_another_one_copies_is_not_missed() -> None:
    module, layout = experts_of("mixtral")
    half = layout.width // 2
    weights = canonical(module, layout)
    for name in ("gate", "up"):
        weights[name][:, half:] = weights[name][:, :half]
    weights["down"][:, :, half:] *= 0.1  # so that the copies go
    site = site_of(module, layout)
    new, _ = thin(site, half, repair=True, damping=1e-7)
    assert torch.allclose(new["down"], weights["down"][:, :, :half] + weights["down"][:, :, half:], atol=1e-3)


def test_repair_helps_most_where_tokens_are_few_or_many() -> None:
    """An expert without tokens is refitted on the layer's pool; and repair never makes calibration error larger."""
    module, layout = experts_of("mixtral")
    site = site_of(module, layout, shrink=1.0)
    chosen = site.capture.chosen % 3  # nobody chooses expert 3
    site.capture = Capture(site.capture.hidden, chosen, site.capture.weights, site.capture.keep)
    _, plain = thin(site, layout.width // 2, repair=False)
    _, fitted = thin(site, layout.width // 2, repair=True)
    assert plain["tokens"][3] == 0
    assert all(after < before for before, after in zip(plain["error"], fitted["error"], strict=True))


def test_scores_of_gradients_give_way_where_no_token_came() -> None:
    module, layout = experts_of("mixtral")
    values = torch.rand(4, layout.width, generator=torch.Generator().manual_seed(1))
    values[2] = 0
    site = site_of(module, layout)
    _, record = thin(site, 5, repair=False, values=values)
    _, by_energy = thin(site, 5, repair=False)
    for e in (0, 1, 3):
        assert slim.kept_neurons(record["kept"][e]) == sorted(values[e].topk(5).indices.tolist())
    assert record["kept"][2] == by_energy["kept"][2]


def test_masks_are_read_back() -> None:
    keep = torch.tensor([0, 3, 64, 200])
    assert slim.kept_neurons(slim.mask_text(keep)) == keep.tolist()
    assert slim.mask_text(torch.tensor([0, 1, 5])) == "23"


# --- families -------------------------------------------------------------------------------------------------------


def equals_the_masked_original(family: str, source: Path, out: Path, manifest: dict) -> None:
    """Plain transformers: the original, with the columns of down zeroed that belong to neurons that are gone."""
    ids = roundtrip.tokens(96).ids[:2]
    original, thinner = (roundtrip.load(head_class(family), folder) for folder in (source, out))
    untouched = roundtrip.plain(original, ids)
    modules = [module for name, module in find_experts(original) if "vision" not in name]
    for module, row in zip(modules, manifest["experts"].values(), strict=True):
        weights = canonical(module, layout_of(module))["down"]
        for e, text in enumerate(row["kept"]):
            kept = slim.kept_neurons(text)
            assert len(kept) == weights.shape[2] * manifest["steps"][0]["step"]["width"]
            gone = [c for c in range(weights.shape[2]) if c not in kept]
            weights.data[e][:, gone] = 0
    wanted = roundtrip.plain(original, ids)
    assert roundtrip.difference(wanted, untouched) > 1e-3, "the mask does nothing"
    roundtrip.assert_close(roundtrip.plain(thinner, ids), wanted, f"{family} with thinner experts")


@pytest.mark.parametrize("family", ALWAYS)
def test_thinner_is_masked(family: str, tmp_path: Path) -> None:
    goes_through(family, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family: str, tmp_path: Path) -> None:
    goes_through(family, tmp_path)


def goes_through(family: str, folder: Path) -> None:
    source = folder / "original"
    tiny_checkpoint(family, source)
    manifest = slimmed(source, folder / "sliced", repair=False)
    equals_the_masked_original(family, source, folder / "sliced", manifest)
    accounts_for_everything(source, folder / "sliced", manifest)
    repaired = slimmed(source, folder / "repaired")
    accounts_for_everything(source, folder / "repaired", repaired)
    roundtrip.load(head_class(family), folder / "repaired")


@pytest.mark.parametrize("family", REFUSED)
def test_families_whose_width_is_also_that_of_others_are_refused(family: str, tmp_path: Path) -> None:
    tiny_checkpoint(family, tmp_path / "original")
    with pytest.raises(UserError, match=f"{REFUSED[family]}.* would not follow"):
        slimmed(tmp_path / "original", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shared_experts_keep_their_width_by_being_more(tmp_path: Path) -> None:
    tiny_checkpoint("deepseek_v3", tmp_path / "original")
    manifest = slimmed(tmp_path / "original", tmp_path / "out")
    assert manifest["config_keys"] == ["moe_intermediate_size", "n_shared_experts"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["moe_intermediate_size"], config["n_shared_experts"]) == (16, 2)
    assert all(fate["fate"] == "kept" for name, fate in manifest["tensors"].items() if "shared" in name)
    with pytest.raises(UserError, match="choose a width that divides 32"):
        slimmed(tmp_path / "original", tmp_path / "no", width=24)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gradients_are_those_of_the_plain_model(family: str, tmp_path: Path) -> None:
    """|θ · ∂L/∂θ| of every row and column, batch after batch, by transformers' own experts."""
    tiny_checkpoint(family, tmp_path / "original")
    job = job_of(tmp_path / "original")
    found = gradient.scores(job.open(), job.calibration)
    model = roundtrip.load(head_class(family), tmp_path / "original")
    model.set_experts_implementation("eager")
    modules = [module for _, module in find_experts(model)]
    wanted = [torch.zeros(4, layout_of(module).width) for module in modules]
    generator = torch.Generator().manual_seed(0)
    for ids, mask in zip(job.calibration.ids, job.calibration.mask, strict=True):
        logits = model(input_ids=ids[None], use_cache=False).logits[0][mask]
        top = logits.detach().topk(8)
        drawn = top.indices.gather(1, torch.multinomial(top.values.softmax(-1), 1, generator=generator))
        (-logits.log_softmax(-1).gather(1, drawn).sum()).backward()
        for module, total in zip(modules, wanted, strict=True):
            both, down = ((p * p.grad).abs().detach() for p in (module.gate_up_proj, module.down_proj))
            if family == "gpt_oss":  # [E, d, 2m] with gate and up in turn, [E, m, d], and a bias
                both = both.sum(1) + (module.gate_up_proj_bias * module.gate_up_proj_bias.grad).abs().detach()
                total += both[:, 0::2] + both[:, 1::2] + down.sum(2)
            else:  # [E, 2m, d], [E, d, m]
                both = both.sum(2)
                total += both[:, : total.shape[1]] + both[:, total.shape[1] :] + down.sum(1)
            module.zero_grad()
    assert all(float(total.max()) > 0 for total in wanted)
    for got, total in zip(found.values(), wanted, strict=True):
        assert torch.allclose(got, total, rtol=1e-3, atol=1e-4 * float(total.max()))


def test_a_model_too_large_for_gradients_is_refused(qwen: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UserError, match="too large for gradients"):
        slimmed(qwen, tmp_path / "out", "slimmoe")


# --- the walk -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen") / "original"
    tiny_checkpoint("qwen3_moe", folder)
    return folder


def test_killed_run_goes_on_behind_the_last_layer(qwen: Path, tmp_path: Path, monkeypatch) -> None:
    slimmed(qwen, tmp_path / "whole", "slimmoe")
    thinned, scores, calls = slim.thinned, gradient.scores, []

    def killed(*arguments):
        calls.append("layer")
        if calls.count("layer") == 2:
            raise KeyboardInterrupt
        return thinned(*arguments)

    def counted(*arguments):
        calls.append("gradients")
        return scores(*arguments)

    monkeypatch.setattr(slim, "thinned", killed)
    monkeypatch.setattr(gradient, "scores", counted)
    with pytest.raises(KeyboardInterrupt):
        slimmed(qwen, tmp_path / "again", "slimmoe")
    assert not (tmp_path / "again").exists()
    slimmed(qwen, tmp_path / "again", "slimmoe")
    assert calls == ["gradients", "layer", "layer", "layer"], "something was done again"
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (tmp_path / "again" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("width", "score", "reason"), [
    (32, "activation", "Cannot keep 32 of 32"), (0.001, "activation", "Cannot keep 0 of 32"), (40, "activation", "Cannot keep 40"),
    (1.5, "activation", "a share below 1"), (0.5, "magic", "'greedy', 'activation', 'slimmoe' or 'random'"),
])  # fmt: skip
def test_impossible_wishes_are_refused(qwen: Path, tmp_path: Path, width: float, score: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        slimmed(qwen, tmp_path / "out", score, width)
    assert not (tmp_path / "out").exists()


def test_random_neurons_are_seeded_and_worse(tiny_model: Path, tmp_path: Path, moecompress: Callable, quick: list[str]) -> None:
    def run(name: str, *options: object) -> dict:
        return moecompress("slim", tiny_model, "-o", tmp_path / name, "--width", 0.5, *options, *quick, "--json").json()["steps"][0]

    good, bad = run("good"), run("bad", "--score", "random")
    again, other = run("again", "--score", "random"), run("other", "--score", "random", "--set", "compute.seed=1")
    assert bad["experts"] == again["experts"] and bad["experts"]["0"]["kept"] != other["experts"]["0"]["kept"]
    assert good["heldout"]["kl_mean"] < bad["heldout"]["kl_mean"]
    assert good["heldout"]["router_agreement"] > 0.5


def test_command(tiny_model: Path, tmp_path: Path, moecompress: Callable, quick: list[str]) -> None:
    out = tmp_path / "thin"
    ran = moecompress("slim", tiny_model, "-o", out, "--width", 40, "--no-repair", "--score", "activation", *quick)
    assert ran.code == 0, ran.err
    assert "KL" in ran.out and "slim, width 40, score activation, repair False" in ran.out
    assert moecompress("slim", tiny_model, "-o", out, *quick).code == 2  # not empty
    assert json.loads((out / "config.json").read_text())["moe_intermediate_size"] == 40
    ran = moecompress("quantize", out, "-o", tmp_path / "packed", "--target-bits", 3.9, *quick, "--set", "allocate.compare=none")
    assert ran.code == 0, ran.err
