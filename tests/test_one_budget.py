"""Fewer experts at more bits, or all at fewer: decided by the target alone, written, loaded again and measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import roundtrip
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import job_of, weight_bytes
from transformers import AutoModelForCausalLM

from moecompress import pipeline, plans
from moecompress.allocate.joint import Level
from moecompress.allocate.plan import Plan
from moecompress.errors import UserError
from moecompress.export.dense import export
from moecompress.model.walk import OpenModel
from moecompress.pack.manifest import read_manifest
from moecompress.runtime import loading

pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")
#: Two bits (and a half, with scales) or more: any smaller target needs experts to go, as long as they keep their width.
WIDE = ["allocate.candidates=[{bits: 2, group: 0}, {bits: 3, group: 0}, {bits: 4, group: 0}]", "allocate.slim=false"]


def way_of(level: Level) -> str:
    return "merged" if level.merged else "shared" if level.shared else "again"


@contextmanager
def only(way: str) -> Iterator[None]:
    """Let the allocator leave experts out in one way: tokens are routed "again", or other experts are "shared", or "merged"."""
    whole = plans.ladder_of

    def ladder_of(statistics):
        return {layer: [level for level in levels if not level.gone or way_of(level) == way]
                for layer, levels in whole(statistics).items()}  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "ladder_of", ladder_of)
        yield


@pytest.fixture(scope="module", params=["again", "shared", "merged"])
def thinned(request, tiny_model: Path, text_file: Path, tmp_path_factory) -> Path:
    """The tiny model, 8 experts a layer, at 1.7 bits, which two-bit codes alone cannot reach."""
    folder = tmp_path_factory.mktemp("thinned") / request.param
    with only(request.param):
        result = pipeline.quantize(job_of(tiny_model, text_file, "target.bits=1.7", *WIDE), folder)
    assert result.chosen == "plan" and set(result.measured) == {"plan"}  # nothing else fits
    return folder


def counts(folder: Path) -> dict[str, int]:
    return json.loads((folder / "config.json").read_text())["quantization_config"].get("fewer", {"experts": {}})["experts"]


def test_what_was_dropped_is_written_down(thinned, tiny_model):
    manifest, plan = read_manifest(thinned), Plan.from_json((thinned / "moecompress" / "plan.json").read_text())
    assert manifest["bits_per_weight"] <= 1.7
    gone = {(int(layer), expert) for layer, experts in manifest["dropped"].items() for expert in experts}
    assert gone == {(int(c.unit[1:3]), int(c.unit[5:8])) for c in plan.choices if c.candidate == "dropped"} and gone
    if thinned.name == "again":
        assert counts(thinned) == {f"model.layers.{n}.mlp.experts": 8 - len(experts) for n, experts in manifest["dropped"].items()}
    else:
        assert {(int(name[1:3]), int(name[5:])) for name in manifest["shared"]} == gone and not counts(thinned)
        for name, (by, factor) in manifest["shared"].items():
            layer = f"model.layers.{int(name[1:3])}.mlp.experts.packed"
            assert int(roundtrip.stored(thinned)[f"{layer}.into"][int(name[5:])]) == by
            assert (int(name[1:3]), by) not in gone and (by >= 0 or factor == 0)
    merged = set(plan.merged)
    assert merged == ({layer for layer, _ in gone} if thinned.name == "merged" else set())
    for layer, expert in gone:
        word, (by, _) = manifest["left_out"][str(layer)][str(expert)], plan.shared.get(f"L{layer:02d}.E{expert:03d}", (-1, 0))
        assert word == {"again": "dropped, its tokens are routed again", "merged": f"merged into expert {by}"}.get(thinned.name, word)
        assert thinned.name != "shared" or word.startswith(f"served by expert {by}, times ")
    stored, original = roundtrip.stored(thinned), roundtrip.stored(tiny_model)
    for name, fate in manifest["tensors"].items():
        if ".experts." in name:
            layer, expert = (int(part) for part in name.split(".") if part.isdigit())
            into = plan.shared.get(f"L{layer:02d}.E{expert:03d}", (-1, 0))[0]
            words = {"merged": f"merged into expert {into}"}
            assert fate["fate"] == (words.get(thinned.name, "dropped by plan") if (layer, expert) in gone else "quantized")
            served = [e for e in range(8) if plan.shared.get(f"L{layer:02d}.E{e:03d}", (-1, 0))[0] == expert]
            refitted = served and layer in merged and ".down_proj." in name
            assert fate.get("refitted") == ({str(expert): served} if refitted else None)
        if name.endswith("mlp.gate.weight") and (experts := manifest["dropped"].get(name.split(".")[2])):
            kept = [e for e in range(8) if e not in experts or thinned.name != "again"]
            assert fate["fate"] == ("sliced" if thinned.name == "again" else "kept") and torch.equal(stored[name], original[name][kept])
    assert set(manifest["tensors"]) == set(original)


def test_transformers_measures_what_evaluate_printed(thinned, tiny_model, text_file, moecompress):
    from moecompress.calibrate.data import token_batches
    from moecompress.model.skeleton import load_tokenizer

    ran = moecompress("evaluate", thinned, "--reference", tiny_model, "--text", text_file, "--sequences", 6, "--length", 48, "--json")
    assert ran.code == 0, ran.err
    ids = token_batches(load_tokenizer(tiny_model), str(text_file), 6, 48).ids
    with torch.no_grad():
        p, q = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits.log_softmax(-1) for f in (tiny_model, thinned))
    assert ran.json()["kl_mean"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.01)
    assert ran.json()["bits_per_weight"] == pytest.approx(read_manifest(thinned)["bits_per_weight"])


def test_loads_every_way_and_generates(thinned, tmp_path, moecompress):
    ids = torch.arange(20)[None]
    packed = AutoModelForCausalLM.from_pretrained(thinned, dtype=torch.float32).eval()
    logits = roundtrip.plain(packed, ids)
    assert {n: m.num_experts for n, m in packed.named_modules() if n in counts(thinned)} == counts(thinned)
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(roundtrip.plain(roundtrip.load(AutoModelForCausalLM, tmp_path / "again"), ids), logits)
    walk = OpenModel(thinned, torch.float32, prepare=loading.prepare(thinned))
    roundtrip.assert_close(roundtrip.walked(walk, ids), logits, "walk")
    ran = moecompress("run", thinned, "--prompt", "The", "-n", 5, "--json")
    assert ran.code == 0 and ran.json()["tokens"] == 5
    if thinned.name == "again":
        with pytest.raises(UserError, match="keep different numbers of experts"):
            export(thinned, tmp_path / "dense", "float32")
    else:  # an ordinary checkpoint: experts that are served by others are scaled copies of them
        export(thinned, tmp_path / "dense", "float32")
        dense = roundtrip.plain(roundtrip.load(AutoModelForCausalLM, tmp_path / "dense"), ids)
        roundtrip.assert_close(dense, logits, "dense export", 1e-4)


def test_what_does_not_fit_is_refused(thinned, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(thinned, copy)
    if thinned.name != "again":
        for path in copy.glob("*.safetensors"):
            tensors = load_file(path)
            for key in [key for key in tensors if key.endswith("packed.into")]:
                tensors[key] = tensors[key].clone().fill_(int((tensors[key] != torch.arange(8)).nonzero()[0]))
            save_file(tensors, path, metadata={"format": "pt"})
        (copy / "moecompress" / "manifest.json").unlink()
        with pytest.raises(UserError, match="damaged"):
            AutoModelForCausalLM.from_pretrained(copy)
        return
    config = json.loads((copy / "config.json").read_text())
    name = next(iter(config["quantization_config"]["fewer"]["experts"]))
    config["quantization_config"]["fewer"]["experts"][name] += 1
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "moecompress" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"does not have the shape|damaged"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_equal_layers_are_an_ordinary_checkpoint(tiny_model, text_file, tmp_path, monkeypatch):
    """All layers with as many experts: the config says so with its own number, and the dense export is plain."""
    whole = plans.ladder_of
    last = lambda levels: [level for level in levels if not level.shared][-1:]  # noqa: E731
    monkeypatch.setattr(plans, "ladder_of", lambda s: {layer: last(levels) for layer, levels in whole(s).items()})
    job = job_of(tiny_model, text_file, "target.bits=2", "allocate.candidates=[{bits: 3, group: 32}]", "allocate.drop=true", "allocate.slim=false",
                 "allocate.compare=none")  # fmt: skip
    pipeline.quantize(job, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts" if "num_local_experts" in config else "num_experts"] == 3
    assert "fewer" not in config["quantization_config"]
    export(tmp_path / "out", tmp_path / "dense", "float32")
    ids = torch.arange(20)[None]
    packed, dense = (roundtrip.plain(roundtrip.load(AutoModelForCausalLM, tmp_path / f), ids) for f in ("out", "dense"))
    roundtrip.assert_close(dense, packed, "dense export", 1e-4)


def test_joint_plan_must_beat_the_others(tiny_model, text_file, tmp_path):
    """Where all experts fit, too, both ways and the uniform plan are measured, and the best is written."""
    recipe = ["target.bits=2.4", *WIDE, "allocate.drop=true"]
    result = pipeline.quantize(job_of(tiny_model, text_file, *recipe), tmp_path / "out")
    plan, others = plans.plan_and_others(job_of(tiny_model, text_file, *recipe), result.statistics)
    assert set(others) == ({"bits", "uniform"} if plan.dropped else {"uniform"})
    kl = {label: row["kl_mean"] for label, row in result.measured.items() if "minus" not in label}
    assert kl[result.chosen] == min(kl.values())
    if plan.dropped:
        assert plan.harm <= others["bits"].harm and set(kl) == {"plan", "bits", "uniform"}
        assert result.measured["plan_minus_bits"]["kl_mean"] == pytest.approx(kl["plan"] - kl["bits"], abs=1e-6)


@pytest.mark.parametrize("drop", ["true", "false"])
def test_byte_target_with_drops(tiny_model, text_file, tmp_path, drop):
    size = 250_000
    job = job_of(tiny_model, text_file, f"target.size={size}", *WIDE, f"allocate.drop={drop}", "allocate.compare=none")
    if drop == "false":
        with pytest.raises(UserError, match="cannot be reached"):
            pipeline.quantize(job, tmp_path / "out")
        return
    result = pipeline.quantize(job, tmp_path / "out")
    assert result.plan.dropped and plans.written_bytes(job, result.plan) == weight_bytes(tmp_path / "out") <= size


def test_guard_names_the_layer(tiny_model, text_file, tmp_path):
    changes = ["target.bits=1.7", *WIDE, "allocate.max_kl=1e-4"]
    with pytest.raises(UserError, match="too far from the original") as error:
        pipeline.quantize(job_of(tiny_model, text_file, *changes), tmp_path / "out")
    assert "in layer" in str(error.value) and not (tmp_path / "out").exists()
    result = pipeline.quantize(job_of(tiny_model, text_file, *changes[:2]), tmp_path / "out")  # goes on from there
    assert result.folder.exists()


WAYS = [(family, way) for family in ("mixtral", "olmoe", "gpt_oss", "glm4_moe", "qwen3_vl_moe", "granitemoe") for way in ("again", "shared", "merged")]


@pytest.mark.parametrize(("family", "way"), [*WAYS, ("deepseek_v4", "merged")])  # the last one's router has tables
def test_family(family: str, way: str, tmp_path: Path) -> None:
    trip = roundtrip.start(family, tmp_path)
    recipe = roundtrip._recipe("target.bits=2.1", "allocate.drop=true", "allocate.slim=false", "allocate.candidates=[{bits: 2, group: 0}, {bits: 3, group: 0}]")
    with only(way):
        result = pipeline.quantize(pipeline.make_job(str(trip.source), recipe, tokens=trip.tokens), trip.packed)
    assert result.plan.dropped and bool(result.plan.shared) == (way != "again") and bool(result.plan.merged) == (way == "merged")
    logits = roundtrip.plain(roundtrip.load(trip.head, trip.packed), trip.ids)
    again = OpenModel(trip.packed, torch.float32, prepare=loading.prepare(trip.packed))
    roundtrip.assert_close(roundtrip.walked(again, trip.ids), logits, "walk of the packed model")
    if way != "again":
        roundtrip.exports(trip, logits)
    assert 1e-3 < roundtrip.difference(logits, trip.logits) < 1


# --- merged ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(tiny_model: Path, text_file: Path, tmp_path_factory) -> Path:
    """The tiny model merged at 14 bits with nothing rounded: every layer must do without an expert or more."""
    folder = tmp_path_factory.mktemp("exact") / "out"
    with only("merged"):
        pipeline.quantize(exact_job(tiny_model, text_file), folder)
    return folder


def exact_job(model: Path, text: Path) -> pipeline.Job:
    return job_of(model, text, "target.bits=12", "allocate.candidates=[{bits: 16}]", "allocate.drop=true", "quantize.attention_bits=16",
                  "compute.dtype=float32")  # fmt: skip


@torch.no_grad()
def test_merged_weights_put_in_by_hand(exact, tiny_model, text_file):
    """The original in plain transformers, layer after layer on what the merged layers before deliver, refitted in float64."""
    job, plan = exact_job(tiny_model, text_file), Plan.from_json((exact / "moecompress" / "plan.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    assert len(plan.merged) > 1
    for layer in range(3):
        module = model.model.layers[layer].mlp.experts
        seen: list[tuple[torch.Tensor, ...]] = []
        hook = module.register_forward_pre_hook(lambda _, given, into=seen: into.append(given))
        for batch in job.calibration.batches:
            model(batch)
        hook.remove()
        hidden, chosen, weights = (torch.cat(parts).double() for parts in zip(*seen, strict=True))
        gate, up = module.gate_up_proj.double().chunk(2, dim=1)
        old = module.down_proj.double()
        served = {int(name[5:]): by for name, by in plan.shared.items() if int(name[1:3]) == layer}
        for head in {by for by, _ in served.values()}:
            rows, wanted = [], []
            for expert, factor in [(head, 1.0), *((e, factor) for e, (by, factor) in served.items() if by == head)]:
                token, place = (chosen == expert).nonzero(as_tuple=True)
                x, g = hidden[token], weights[token, place][:, None]
                inner = lambda e: torch.nn.functional.silu(x @ gate[e].T) * (x @ up[e].T)  # noqa: B023, E731
                rows.append(factor * g * inner(head))
                wanted.append(g * inner(expert) @ old[expert].T - rows[-1] @ old[head].T)
            a, y = torch.cat(rows), torch.cat(wanted)
            ridge = a.square().sum() / len(a) * torch.eye(a.shape[1])
            new = old[head] + torch.linalg.solve(a.T @ a + ridge, a.T @ y).T
            module.down_proj[head] = new.bfloat16()
        for expert, (head, factor) in served.items():
            module.gate_up_proj[expert] = module.gate_up_proj[head]
            module.down_proj[expert] = factor * module.down_proj[head]
    ids = torch.arange(24)[None]
    packed = roundtrip.load(AutoModelForCausalLM, exact)
    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    by_hand = roundtrip.plain(model, ids)
    assert roundtrip.difference(roundtrip.plain(original, ids), by_hand) > 0.02
    roundtrip.assert_close(roundtrip.plain(packed, ids), by_hand, "merged by hand", 3e-3)


def test_merging_goes_on_where_it_stopped(exact, tiny_model, text_file, tmp_path, monkeypatch):
    """Stopped behind the first layer, the second run does the others and ends with the same bytes."""
    from moecompress import compress

    calls, whole = [], compress.merge

    def stopping(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(*given)

    monkeypatch.setattr(compress, "merge", stopping)
    with only("merged"):
        with pytest.raises(KeyboardInterrupt):
            pipeline.quantize(exact_job(tiny_model, text_file), tmp_path / "out")
        pipeline.quantize(exact_job(tiny_model, text_file), tmp_path / "out")
    assert len(calls) == 2 + len(Plan.from_json((exact / "moecompress" / "plan.json").read_text()).merged) - 1
    for path in exact.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_inspect_and_report_name_them(exact, tmp_path, moecompress):
    ran = moecompress("inspect", exact, "--json")
    left_out = read_manifest(exact)["left_out"]
    assert ran.json()["left_out"] == left_out and left_out
    expert, word = next(iter(next(iter(left_out.values())).items()))
    assert f"expert {expert} {word}" in moecompress("inspect", exact).out.replace("\n", " ")
    ran = moecompress("report", exact, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert ran.code == 0 and f"{expert} {word}" in page and "merged into another expert" in page


def test_statistics_without_merging_are_made_again(exact, tiny_model, text_file, tmp_path):
    """Those that an older version left behind say less; they are read, but not planned with."""
    import shutil

    from moecompress.calibrate.statistics import Statistics

    folder = tmp_path / "calibrate"
    shutil.copytree(exact / "moecompress", folder)
    kept = pipeline.calibrate(exact_job(tiny_model, text_file), folder)
    path = folder / "statistics.safetensors"
    before = path.stat().st_mtime_ns
    assert kept.thinned and all(layer.thinning.merged.any() for layer in kept.layers.values())
    pipeline.calibrate(exact_job(tiny_model, text_file), folder)
    assert path.stat().st_mtime_ns == before
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.endswith("thinning.merged")}, path)
    assert not Statistics.load(folder).thinned
    assert pipeline.calibrate(exact_job(tiny_model, text_file), folder).thinned and Statistics.load(folder).thinned
    (folder / "statistics.json").unlink()  # as if it had been stopped before the end
    path = folder / "layer-0001.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "thinning.merged"}, path)
    assert pipeline.calibrate(exact_job(tiny_model, text_file), folder).thinned
