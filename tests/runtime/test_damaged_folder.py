"""A compressed folder that is not what it was: loading names the tensor or the file, and never returns a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moecompress.errors import UserError

SHARD = "model-layer-00001-of-00003.safetensors"
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture
def folder(packed_tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed_tiny, tmp_path / "packed"))


def load(folder: Path):
    import moecompress  # noqa: F401 (registers the quantizer)

    return AutoModelForCausalLM.from_pretrained(folder)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit the tensors of one shard so that only they are wrong: index and manifest agree with what is there."""
    tensors = load_file(folder / SHARD)
    edit(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    others = {name: file for name, file in record["weight_map"].items() if file != SHARD}
    index.write_text(json.dumps(record | {"weight_map": others | dict.fromkeys(tensors, SHARD)}))
    (folder / "moecompress" / "manifest.json").unlink()


def a_bank(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if f"{EXPERTS}.packed.down_banks" in name and name.endswith(part))


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    name = a_bank(tensors, "codes")
    tensors[name] = tensors[name][:, :, 1:].contiguous()


def twice(tensors: dict[str, torch.Tensor]) -> None:
    name = a_bank(tensors, "experts")
    tensors[name] = torch.full_like(tensors[name], int(tensors[name][0]) ^ 1)


def out_of_range(tensors: dict[str, torch.Tensor]) -> None:
    tensors[a_bank(tensors, "experts")][0] = 1000


EDITS = {
    "missing bank": (lambda t: t.pop(a_bank(t, "codes")), rf"{EXPERTS}\.packed\.down_banks\..*codes"),
    "renamed bank": (lambda t: rename(t, a_bank(t, "codes"), "other.codes"), r"other\.codes|down_banks\..*codes"),
    "renamed layer": (lambda t: rename(t, f"{EXPERTS}.down_proj", "model.layers.9.mlp.experts.down_proj"),
                      r"model\.layers\.9|layers\.1\.mlp\.experts\.down_proj"),
    "missing norm": (lambda t: t.pop("model.layers.1.input_layernorm.weight"), r"layers\.1\.input_layernorm"),
    "missing router": (lambda t: t.pop("model.layers.1.mlp.gate.weight"), r"layers\.1\.mlp\.gate"),
    "missing guard": (lambda t: t.pop(f"{EXPERTS}.down_proj"), rf"{EXPERTS}\.down_proj"),
    "narrower bank": (narrow, rf"{EXPERTS}\.packed\.down_banks\..*codes"),
    "an expert twice": (twice, rf"{EXPERTS}\.packed\.down_banks"),
    "an expert that is none": (out_of_range, rf"{EXPERTS}\.packed\.down_banks"),
}  # fmt: skip


def test_undamaged_folder_loads(folder: Path) -> None:
    """The control: what `change` does besides its edit is no damage."""
    change(folder, lambda tensors: None)
    load(folder)


@pytest.mark.parametrize("name", EDITS)
def test_changed_tensors_are_named(name: str, folder: Path, moecompress) -> None:
    edit, words = EDITS[name]
    change(folder, edit)
    refused(folder, words, moecompress)


def test_truncated_shard_is_named(folder: Path, moecompress) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-7])
    refused(folder, SHARD, moecompress)


def test_truncated_shard_is_named_without_a_manifest(folder: Path, moecompress) -> None:
    (folder / "moecompress" / "manifest.json").unlink()
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: len(data) // 2])
    refused(folder, SHARD, moecompress)


@pytest.mark.parametrize("where", [0.02, 0.5, 0.999])
def test_one_flipped_bit_is_named(where: float, folder: Path, moecompress) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[int(where * len(data))] ^= 4
    (folder / SHARD).write_bytes(data)
    refused(folder, SHARD, moecompress)


def test_checking_every_byte_can_be_left_out(folder: Path) -> None:
    from moecompress.runtime.registration import MoecompressConfig

    data = bytearray((folder / SHARD).read_bytes())
    data[-1] ^= 4
    (folder / SHARD).write_bytes(data)
    with pytest.warns(UserWarning, match="verify"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=MoecompressConfig(verify=False))


def test_missing_shard_is_named(folder: Path, moecompress) -> None:
    (folder / SHARD).unlink()
    refused(folder, SHARD, moecompress)


def test_packed_module_that_the_model_lacks(folder: Path, moecompress) -> None:
    config = json.loads((folder / "config.json").read_text())
    experts = config["quantization_config"]["experts"]
    experts["model.layers.7.mlp.experts"] = experts.pop(EXPERTS)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "moecompress" / "manifest.json").unlink()
    refused(folder, r"model\.layers\.7\.mlp\.experts", moecompress)


def test_other_format_version(folder: Path, moecompress) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "another format version", moecompress)


def refused(folder: Path, words: str, moecompress) -> None:
    with pytest.raises(UserError, match=words):
        load(folder)
    ran = moecompress("run", folder, "--prompt", "The", "-n", 1)
    assert ran.code == 2
    assert "Traceback" not in ran.err
