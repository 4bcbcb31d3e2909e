"""One folder of nested integers, loaded at every width it has."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from moecompress import pipeline
from moecompress.calibrate.data import token_batches
from moecompress.errors import UserError
from moecompress.model.checkpoint import Checkpoint
from moecompress.model.skeleton import load_tokenizer
from moecompress.pack.int_format import unpack_codes
from moecompress.recipe import recipe_from
from moecompress.runtime.loading import load
from moecompress.runtime.packed import PackedExperts
from moecompress.runtime.registration import MoecompressConfig

SMALL = ["calibration.sequences=6", "calibration.length=48", "calibration.heldout=2", "compute.micro_batch=2", "compute.dtype=float32"]
IDS = torch.arange(40)[None]


def make(model, text, out, *changes: str) -> pipeline.Result:
    recipe = recipe_from([*SMALL, f"calibration.text={json.dumps(str(text))}", "allocate.compare=none", "allocate.allocator=uniform", *changes])
    return pipeline.quantize(pipeline.make_job(str(model), recipe), out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, text_file):
    out = tmp_path_factory.mktemp("nested") / "out"
    make(tiny_model, text_file, out, "target.bits=5", "allocate.candidates=[{code: nested, bits: 4, group: 32}]")
    return out


def plain(folder, **chosen):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **chosen)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def bank_of(folder, module: str, key: str) -> dict[str, torch.Tensor]:
    checkpoint, start = Checkpoint(folder), f"{module}.packed.{key}."
    return {name.removeprefix(start): checkpoint.read(name) for name in checkpoint.entries if name.startswith(start)}


@pytest.mark.parametrize("bits", [None, 2, 3, 4])
def test_every_width_is_the_shifted_codes_of_the_file(folder, bits):
    model = plain(folder, **({"quantization_config": MoecompressConfig(load_bits=bits)} if bits else {}))
    module = "model.layers.1.mlp.experts"
    stored = bank_of(folder, module, "up_banks.n4g32s")
    codes = unpack_codes(stored["codes"], 2, 64).int() * 4
    for weight, name in ((2, "plane_3"), (1, "plane_4")):
        codes += weight * unpack_codes_of_one_bit(stored[name], 64)
    k = bits or 4
    scale = (stored["row_scales"].double()[..., None] * stored["scales"].double()).repeat_interleave(32, -1)
    expected = scale * 2 ** (4 - k) * ((codes >> (4 - k)) - (2**k - 1) / 2)
    packed = model.get_submodule(module).packed
    assert isinstance(packed, PackedExperts)
    got = packed.dequantized("up", torch.float32)
    torch.testing.assert_close(got[stored["experts"].long()].double(), expected, rtol=1e-6, atol=0)
    bank = packed.banks("up")["n4g32s"]
    assert bank.codes.nbytes == 8 * 64 * 64 * k // 8  # what is in memory is the width that was asked for
    x, expert = torch.randn(9, 64), torch.arange(9) % 8
    torch.testing.assert_close(packed.project("up", x, expert), torch.einsum("soi,si->so", got[expert], x), rtol=1e-4, atol=1e-3)


def unpack_codes_of_one_bit(plane: torch.Tensor, cols: int) -> torch.Tensor:
    return ((plane.int()[..., None] >> torch.arange(8)) & 1).flatten(-2)[..., :cols]


def test_divergence_falls_with_the_width_and_walks_agree_with_transformers(folder, tiny_model, text_file, moecompress, tmp_path):
    ids = token_batches(load_tokenizer(tiny_model), str(text_file), 4, 48).ids
    measured, sizes = {}, {}
    with torch.no_grad():
        p = plain(tiny_model)(ids).logits.log_softmax(-1)
        for bits in (2, 3, 4):
            ran = moecompress("evaluate", folder, "--reference", tiny_model, "--text", text_file, "--sequences", 4, "--length", 48, "--json",
                              "--no-speed", "--load-bits", bits)  # fmt: skip
            assert ran.code == 0, ran.err
            record = ran.json()
            assert record["load_bits"] == bits
            q = load(folder, dtype=torch.float32, load_bits=bits)(ids).logits.log_softmax(-1)
            measured[bits], sizes[bits] = record["kl_mean"], record["bits_per_weight"]
            assert measured[bits] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.02)
    assert measured[2] > 1.5 * measured[3] and measured[3] > 1.5 * measured[4]
    assert sizes[4] - sizes[3] == sizes[3] - sizes[2] == 1
    dense = tmp_path / "dense"
    ran = moecompress("export", folder, "-o", dense, "--dtype", "float32", "--load-bits", 3)
    assert ran.code == 0, ran.err
    assert torch.allclose(logits(plain(dense)), logits(load(folder, torch.float32, load_bits=3)), atol=1e-3)
    assert moecompress("run", folder, "--prompt", "The", "-n", 3, "--json", "--load-bits", 2).code == 0


def test_saved_again_it_is_all_bits_or_ordinary_integers(folder, tmp_path):
    for bits, scheme in ((None, "n4g32s"), (4, "n4g32s"), (3, "b3g32s"), (2, "b2g32s")):
        model, again = load(folder, torch.float32, load_bits=bits), tmp_path / f"{bits}"
        model.save_pretrained(again)
        names = {name for contents in json.loads((again / "config.json").read_text())["quantization_config"]["experts"].values() for name in contents["up"]}
        assert names == {scheme}
        assert torch.equal(logits(plain(again)), logits(model))
        module = "model.layers.0.mlp.experts"
        if scheme == "n4g32s":
            before, after = bank_of(folder, module, f"gate_banks.{scheme}"), bank_of(again, module, f"gate_banks.{scheme}")
            assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
        else:
            with pytest.raises(UserError, match="none of its matrices is nested"):
                load(again, load_bits=2)


def test_nested_and_others_share_a_layer(tiny_model, text_file, tmp_path):
    """Matrices that are saved as integers join those that were integers."""
    out, again = tmp_path / "out", tmp_path / "again"
    result = make(tiny_model, text_file, out, "target.bits=4.4", "allocate.allocator=global",
                  "allocate.candidates=[{bits: 2, group: 32}, {code: nested, bits: 3, group: 32}, {code: nested, bits: 4, group: 32}, {bits: 8}]")  # fmt: skip
    assert {"b2g32s", "n3g32s", "n4g32s"} <= {choice.candidate for choice in result.plan.choices}
    model = load(out, torch.float32, load_bits=2)
    expected = logits(model)
    assert not torch.equal(expected, logits(load(out, torch.float32)))
    model.save_pretrained(again)
    counts = json.loads((again / "config.json").read_text())["quantization_config"]["experts"]["model.layers.0.mlp.experts"]["up"]
    assert set(counts) <= {"b2g32s", "b8g0s"} and sum(counts.values()) == 8
    assert torch.allclose(logits(plain(again)), expected, atol=1e-4)
    model.save_pretrained(again)
    assert torch.allclose(logits(plain(again)), expected, atol=1e-4)


def test_other_widths_are_refused_with_the_list(folder, packed_tiny, tiny_model, moecompress, tmp_path):
    for command in (["run", folder, "--prompt", "x"], ["export", folder, "-o", tmp_path / "dense"],
                    ["evaluate", folder, "--reference", tiny_model, "--text", "builtin", "--no-speed"]):  # fmt: skip
        ran = moecompress(*command, "--load-bits", 8)
        assert ran.code == 2 and "2, 3, 4" in ran.err and "Traceback" not in ran.err
    assert "nested" in moecompress("run", packed_tiny, "--prompt", "x", "--load-bits", 2).err
    assert "ordinary checkpoint" in moecompress("run", tiny_model, "--prompt", "x", "--load-bits", 2).err
    with pytest.raises(UserError, match="at 5 bits"):
        plain(folder, quantization_config=MoecompressConfig(load_bits=5))


def test_a_damaged_plane_is_named(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "moecompress" / "manifest.json").unlink()
    shard = sorted(broken.glob("model-layer-*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("plane_4"))
    save_file({key: t for key, t in tensors.items() if key != name}, shard, {"format": "pt"})
    with pytest.raises(UserError, match="plane_4"):
        plain(broken)
    logits(load(broken, load_bits=3))  # which does not need it
