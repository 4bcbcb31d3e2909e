"""Experts of different widths, decided by the target alone: written, loaded again, and compared with the original model whose
neurons were taken out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import roundtrip
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import job_of, weight_bytes
from test_resume import contents
from tiny import head_class, tiny_checkpoint
from transformers import AutoModelForCausalLM

from moecompress import pipeline, plans
from moecompress.allocate.plan import Plan
from moecompress.calibrate.data import split_heldout
from moecompress.errors import UserError
from moecompress.export.dense import export
from moecompress.model.experts import DOWN, find_experts, layout_of, parameters_from, projections
from moecompress.model.walk import OpenModel
from moecompress.pack.manifest import read_manifest
from moecompress.recipe import recipe_from
from moecompress.report import write_report
from moecompress.runtime import loading

pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")
#: What nothing but thinner experts can reach.
FORCED = ["allocate.drop=false", "allocate.slim=true", "allocate.compare=none"]
EXACT = ["allocate.candidates=[{bits: 16}]", "target.bits=10", "quantize.attention_bits=16", "quantize.shared_bits=16",
         "quantize.dense_bits=16", *FORCED]  # fmt: skip
CODED = ["allocate.candidates=[{code: trellis, bits: 1.5}, {bits: 2, group: 32}, {code: trellis, bits: 3}]", "target.bits=1.2", *FORCED]


@pytest.fixture(scope="module")
def slim(tiny_model: Path, text_file: Path, tmp_path_factory) -> Path:
    """The tiny model, 8 experts of 64 neurons a layer, at 1.2 bits, which its codes reach with fewer neurons alone."""
    folder = tmp_path_factory.mktemp("slim") / "out"
    pipeline.quantize(job_of(tiny_model, text_file, *CODED), folder)
    return folder


def plan_of(folder: Path) -> Plan:
    return Plan.from_json((folder / "moecompress" / "plan.json").read_text())


def widths_of(folder: Path) -> dict[tuple[int, int], set[int]]:
    """(layer, expert) -> neurons of its matrices by plan.json."""
    found: dict[tuple[int, int], set[int]] = {}
    for unit, candidate in plan_of(folder).assignments().items():
        layer, expert, _ = unit.split(".")
        found.setdefault((int(layer[1:]), int(expert[1:])), set()).add(candidate.width or 64)
    return found


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])  # gated; interleaved, transposed, with biases; without a gate
def test_the_original_with_neurons_taken_out_by_hand(family: str, tmp_path: Path) -> None:
    config = tiny_checkpoint(family, tmp_path / "original")
    tokens = roundtrip.tokens(config.get_text_config().vocab_size)
    recipe = recipe_from(["calibration.sequences=3", "calibration.heldout=1", "calibration.length=24", "compute.micro_batch=1", *EXACT])
    result = pipeline.quantize(pipeline.make_job(str(tmp_path / "original"), recipe, tokens=tokens), tmp_path / "out")
    assert result.plan.slimmed and result.manifest["bits_per_weight"] <= 10
    head = head_class(family)
    ids = tokens.ids[:2].repeat(1, 4)
    logits = roundtrip.plain(packed := roundtrip.load(head, tmp_path / "out"), ids)
    by_hand = roundtrip.load(head, tmp_path / "original")
    modules = dict(packed.named_modules())
    thinner = 0
    for name, module in find_experts(by_hand):
        layout = layout_of(module)
        old, own = projections(module, layout), modules[name].packed
        new = {p: own.dequantized(p, torch.float32) for p in layout.projections}
        down = old[DOWN].detach().clone()
        for expert in range(layout.experts):
            (width,) = {b.rows for b in own.banks("up").values() if expert in b.experts}
            thinner += width < layout.width
            places = [(old["up"][expert] == row).all(1).nonzero().item() for row in new["up"][expert][:width]]
            assert len(set(places)) == width and not new["up"][expert][width:].any() and not new[DOWN][expert][:, width:].any()
            down[expert] = 0
            down[expert][:, places] = new[DOWN][expert][:, :width]
        module.down_proj.data = parameters_from({**old, DOWN: down}, layout)["down_proj"]
    assert thinner
    roundtrip.assert_close(logits, roundtrip.plain(by_hand, ids), "by hand")
    for count in (1, 5):  # few tokens and many take different ways
        roundtrip.assert_close(roundtrip.plain(packed, ids[:, :count]), roundtrip.plain(by_hand, ids[:, :count]), f"{count} tokens")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_towards_the_original_outputs(family: str, tmp_path: Path) -> None:
    """On the text of the calibration, what experts give is nearer to what they gave in the original than with their own weights as
    target."""
    config = tiny_checkpoint(family, tmp_path / "original")
    tokens = roundtrip.tokens(config.get_text_config().vocab_size)
    original = roundtrip.load(head_class(family), tmp_path / "original")
    names = [name for name, _ in find_experts(original)]
    used = split_heldout(tokens, 1)[0].ids
    given = {"original": outputs_of(original, names, used)}
    for target in ("own", "cross"):
        recipe = recipe_from(["calibration.sequences=3", "calibration.heldout=1", "calibration.length=24", "compute.micro_batch=1",
                              "compute.dtype=float32", "allocate.candidates=[{bits: 3, group: 32}]", "target.bits=3",
                              f"quantize.target={target}", "quantize.shrink=0", *FORCED])  # fmt: skip
        result = pipeline.quantize(pipeline.make_job(str(tmp_path / "original"), recipe, tokens=tokens), tmp_path / target)
        assert result.plan.slimmed and result.chosen == {"own": "plan", "cross": "cross"}[target]
        given[target] = outputs_of(roundtrip.load(head_class(family), tmp_path / target), names, used)
    off = {target: [float((y - x).square().mean()) for x, y in zip(given["original"], given[target], strict=True)] for target in ("own", "cross")}
    assert sum(off["cross"]) < sum(off["own"])


def outputs_of(model: torch.nn.Module, names: list[str], ids: torch.Tensor) -> list[torch.Tensor]:
    """Of these modules, for all tokens."""
    found: list[torch.Tensor] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _m, _given, out: found.append(out.detach()))
    roundtrip.plain(model, ids)
    return found


def test_bytes_and_what_is_written_down(slim: Path, tiny_model: Path) -> None:
    manifest, plan, widths = read_manifest(slim), plan_of(slim), widths_of(slim)
    assert manifest["bits_per_weight"] <= 1.2 and all(len(found) == 1 for found in widths.values())
    thinner = {key: next(iter(found)) for key, found in widths.items() if found != {64}}
    assert thinner and set(thinner.values()) <= {48, 32, 16}
    assert plan.slimmed == 3 * len(thinner)
    assert manifest["slimmed"] == {str(n): {str(e): w for (m, e), w in thinner.items() if m == n} for n in {n for n, _ in thinner}}
    config = json.loads((slim / "config.json").read_text())["quantization_config"]["experts"]
    banks = {name for contents_ in config.values() for schemes in contents_.values() for name in schemes}
    assert any("w" in name for name in banks)
    of_banks = sum(t.nbytes for name, t in roundtrip.stored(slim).items() if "_banks." in name and not name.endswith(".experts"))
    assert plan.bytes == of_banks
    for name, fate in manifest["tensors"].items():
        if ".experts." in name:
            layer, expert = (int(part) for part in name.split(".") if part.isdigit())
            width = thinner.get((layer, expert))
            assert fate["fate"] == (f"slimmed to {width} of 64" if width else "quantized")
    assert any(".experts." in name for name in manifest["tensors"])


def test_written_bytes_are_predicted(slim: Path, tiny_model: Path, text_file: Path) -> None:
    job = job_of(tiny_model, text_file, *CODED)
    assert plans.written_bytes(job, plan_of(slim)) == weight_bytes(slim)


def test_a_size_of_the_whole_is_kept(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    size = 260_000
    changes = [change for change in CODED if not change.startswith("target")]
    result = pipeline.quantize(job_of(tiny_model, text_file, f"target.size={size}", *changes), tmp_path / "out")
    assert result.plan.slimmed and 0.95 * size <= weight_bytes(tmp_path / "out") <= size


def test_loads_every_way_and_generates(slim: Path, tiny_model: Path, text_file: Path, tmp_path: Path, moecompress) -> None:
    ids = torch.arange(200)[None] % 512
    packed = AutoModelForCausalLM.from_pretrained(slim, dtype=torch.float32).eval()
    logits = roundtrip.plain(packed, ids)
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(roundtrip.plain(roundtrip.load(AutoModelForCausalLM, tmp_path / "again"), ids), logits)
    walk = OpenModel(slim, torch.float32, prepare=loading.prepare(slim))
    roundtrip.assert_close(roundtrip.walked(walk, ids), logits, "walk")
    export(slim, tmp_path / "dense", "float32")
    dense = roundtrip.load(AutoModelForCausalLM, tmp_path / "dense")
    roundtrip.assert_close(roundtrip.plain(dense, ids), logits, "dense export", 1e-4)
    roundtrip.assert_close(roundtrip.plain(dense, ids[:, :3]), roundtrip.plain(packed, ids[:, :3]), "dense export, few tokens", 1e-4)
    ran = moecompress("run", slim, "--prompt", "The", "-n", 4, "--json")
    assert ran.code == 0 and ran.json()["tokens"] == 4
    ran = moecompress("evaluate", slim, "--reference", tiny_model, "--text", text_file, "--sequences", 4, "--length", 48, "--json")
    assert ran.code == 0 and ran.json()["bits_per_weight"] == pytest.approx(read_manifest(slim)["bits_per_weight"])


def test_the_report_lists_them(slim: Path, tmp_path: Path) -> None:
    text = write_report(Path(shutil.copytree(slim, tmp_path / "copy"))).read_text()
    width = next(width for found in read_manifest(slim)["slimmed"].values() for width in found.values())
    assert f"slimmed to {width} of 64" in text and "Thinner experts" in text


def test_a_killed_run_goes_on(slim: Path, tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch) -> None:
    from moecompress import compress

    whole, seen = compress._compress_layer, []

    def dies(walk, layer, *rest):
        seen.append(layer)
        if layer == 2 and seen.count(2) == 1:
            raise KeyboardInterrupt
        return whole(walk, layer, *rest)

    monkeypatch.setattr(compress, "_compress_layer", dies)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(job_of(tiny_model, text_file, *CODED), out)
    pipeline.quantize(job_of(tiny_model, text_file, *CODED), out)
    assert seen == [0, 1, 2, 2] and contents(out) == contents(slim)


@pytest.mark.parametrize("damage", ["elsewhere", "too wide", "nonsense"])
def test_damage_is_found(slim: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(slim, tmp_path / "copy"))
    (copy / "moecompress" / "manifest.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    experts = config["quantization_config"]["experts"]
    if damage == "elsewhere":  # two experts of different widths change places in one projection
        for path in copy.glob("*.safetensors"):
            tensors = load_file(path)
            lists = {key: t for key, t in tensors.items() if ".up_banks." in key and key.endswith(".experts")}
            pair = sorted({key.split(".")[-2].partition("w")[2]: key for key in lists}.values())
            if len(pair) > 1:
                one, other = pair[:2]
                first, second = lists[one].clone(), lists[other].clone()
                first[0], second[0] = lists[other][0], lists[one][0]
                save_file(tensors | {one: first, other: second}, path, metadata={"format": "pt"})
    else:
        schemes = next(s for contents_ in experts.values() for s in contents_.values() if any("w" in key for key in s))
        narrow = next(key for key in schemes if "w" in key)
        schemes[narrow.partition("w")[0] + ("w64" if damage == "too wide" else "w0")] = schemes.pop(narrow)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"how many neurons|neurons left|no storage scheme"):
        AutoModelForCausalLM.from_pretrained(copy)
