"""A folder whose experts have outliers: planned, written, loaded, saved again; and one that was tampered with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moecompress.errors import UserError

CANDIDATES = ("[{bits: 2, symmetric: false}, {bits: 2, symmetric: false, outliers: 0.01}, {bits: 3, symmetric: false}, "
              "{bits: 3, symmetric: false, outliers: 0.02}]")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, moecompress, quick) -> Path:
    out = tmp_path_factory.mktemp("outliers") / "out"
    ran = moecompress("quantize", tiny_model, "-o", out, "--target-bits", 3.2, *quick, "--set", f"allocate.candidates={CANDIDATES}")
    assert ran.code == 0, ran.err
    return out


def load(folder: Path):
    import moecompress  # noqa: F401 (registers the quantizer)

    return AutoModelForCausalLM.from_pretrained(folder)


def test_bytes_are_priced_and_the_target_is_met(folder):
    plan = json.loads((folder / "moecompress" / "plan.json").read_text())
    manifest = json.loads((folder / "moecompress" / "manifest.json").read_text())
    names = {unit["candidate"] for unit in plan["units"].values()}
    assert any("_o" in name for name in names)
    indices = 4 * len(plan["units"])
    assert manifest["expert_bytes"] == plan["bytes"] + indices
    assert 3.2 * 0.98 < manifest["bits_per_weight"] <= 3.2


def test_a_saved_copy_computes_the_same(folder, tmp_path):
    model = load(folder).eval()
    model.save_pretrained(tmp_path / "again")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load(tmp_path / "again").eval()(ids).logits)


def test_a_column_that_is_none_is_refused(folder, tmp_path, moecompress):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "moecompress" / "manifest.json").unlink()
    for shard in sorted(copy.glob("model-layer-*.safetensors")):
        tensors = load_file(shard)
        for name in [name for name in tensors if name.endswith("outlier_columns")]:
            tensors[name].view(-1)[0] = 64
        save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match="outlier_columns"):
        load(copy)
    ran = moecompress("run", copy, "--prompt", "The", "-n", 1)
    assert ran.code == 2 and "outlier_columns" in ran.err and "Traceback" not in ran.err
