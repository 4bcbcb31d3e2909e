"""Upcycling as in MoTE: nearly the dense model at first, and the whole way to packed ternary experts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import roundtrip
import torch
from test_dense import FAMILIES, logits, reload, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from moecompress.convert.mote import upcycle
from moecompress.errors import UserError
from moecompress.pack.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("quiet_and_single_threaded")

RECIPE = Path(__file__).parents[2] / "recipes" / "mote.yaml"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_nearly_the_dense_model(family: str, tmp_path: Path) -> None:
    """Off by the weight of the chosen copies, and by nothing else."""
    cls, config, changes = FAMILIES[family]
    dense = tiny(cls, config, **changes)
    ids = torch.randint(61, (4, 24), generator=torch.Generator().manual_seed(1))
    want = logits(dense, ids)
    off = []
    for weight in (1e-2, 1e-3):
        upcycle(dense, tmp_path / str(weight), None, experts=3, weight=weight, dtype=torch.float32)
        moe = reload(tmp_path / str(weight))
        assert (moe.config.num_experts_per_tok, moe.config.n_routed_experts) == (1, 3)
        off.append(float((logits(moe, ids) - want).norm() / want.norm()))
    assert 1e-4 < off[0] < 0.1 and off[1] == pytest.approx(off[0] / 10, rel=0.3)


def test_a_layer_adds_its_chosen_copy_by_the_routers_sigmoid(tmp_path: Path) -> None:
    dense = tiny(LlamaForCausalLM, LlamaConfig)
    upcycle(dense, tmp_path, None, experts=4, weight=0.25, dtype=torch.float32)
    moe = reload(tmp_path)
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    block, mlp = dense.model.layers[1].mlp, moe.model.layers[1].mlp
    largest = (x @ mlp.gate.weight.T).amax(-1, keepdim=True)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), block(x) * (1 + 2 * 0.25 * largest.sigmoid()), rtol=1e-4, atol=1e-5)


def test_refusals(tmp_path: Path) -> None:
    for changes, words in (({"experts": 1}, "do not fit"), ({"weight": 0.0}, "do not fit")):
        with pytest.raises(UserError, match=words):
            upcycle(tiny(LlamaForCausalLM, LlamaConfig), tmp_path / "out", None, **changes)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "complaint"), [
    (["--method", "mote", "--top-k", 2], "--top-k cannot be given with --method mote"),
    (["--weight", 0.1], "--weight cannot be given with --method cmoe"),
    (["--method", "moe"], "Unknown method"),
])  # fmt: skip
def test_options_of_the_other_method(changes: list, complaint: str, tmp_path: Path, moecompress: Callable) -> None:
    ran = moecompress("convert", tmp_path, "-o", tmp_path / "out", *changes)
    assert ran.code == 2 and complaint in ran.err


def test_from_a_dense_model_to_packed_ternary_experts(tokenizer_folder: Path, text_file: Path, tmp_path: Path, moecompress: Callable) -> None:
    """The commands that recipes/mote.yaml names. What is trained is what is packed; what MoTE freezes stays."""
    dense, start, out, packed, again = (tmp_path / name for name in ("dense", "start", "trained", "packed", "again"))
    tiny(LlamaForCausalLM, LlamaConfig, vocab_size=512).to(torch.bfloat16).save_pretrained(dense)
    for path in tokenizer_folder.iterdir():
        shutil.copyfile(path, dense / path.name)
    few = ["--text", text_file, "--set", "calibration.length=32", "--set", "calibration.heldout=4"]
    ran = moecompress("convert", dense, "-o", start, "--method", "mote", "--json")
    assert ran.code == 0 and ran.json()["experts"] == 4, ran.err
    ran = moecompress("distill", start, "--teacher", dense, "-o", out, "--train", "experts+router", "--qat", "ternary", "--kd-share", 0,
                      "--cross-entropy", 1, "--balance", 0.01, "--steps", 6, "--check-every", 3, "--batch", 16, "--accumulate", 1, "--rate", 1e-2,
                      "--sequences", 64, "--json", *few)  # fmt: skip
    assert ran.code == 0, ran.err
    record = ran.json()
    assert record["heldout"]["perplexity"] == pytest.approx(min(one["perplexity"] for one in record["history"]), rel=1e-4)
    assert record["heldout"]["perplexity"] < record["before"]["perplexity"]
    ran = moecompress("quantize", out, "-o", packed, "--recipe", RECIPE, "--target-bits", 3, "--set", "calibration.sequences=8", *few)
    assert ran.code == 0, ran.err
    schemes = {scheme for name, scheme in read_manifest(packed)["schemes"].items() if ".experts." in name}
    assert schemes == {"ternary"}
    assert moecompress("export", packed, "-o", again, "--format", "dense").code == 0
    first, trained, unpacked = (roundtrip.stored(folder) for folder in (start, out, again))
    for name, tensor in trained.items():
        routed = ".experts." in name or "mlp.gate.weight" in name
        assert torch.equal(first[name], tensor) != routed, name
        if routed:
            assert torch.equal(unpacked[name].to(tensor.dtype), tensor), name
