"""The shard writer against the safetensors library."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moecompress.model.checkpoint import read_header, write_shard
from moecompress.pack.size import shard_bytes

TENSORS = {
    "b.codes": torch.arange(7 * 13, dtype=torch.uint8).view(7, 13), "a.weight": torch.randn(3, 5, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "ids": torch.arange(3), "flag": torch.tensor([True, False]),
    "turned": torch.randn(4, 6).T, "größe": torch.randn(2, dtype=torch.float64), "half": torch.randn(3).half(),
}  # fmt: skip


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", TENSORS)
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_as_large_as_the_library_writes_it_and_as_announced(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", TENSORS)
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "b.safetensors", metadata={"format": "pt"})
    ours, theirs = ((tmp_path / name).stat().st_size for name in ("a.safetensors", "b.safetensors"))
    assert abs(ours - theirs) <= 16
    announced = shard_bytes({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()})
    assert ours == announced
    assert set(read_header(tmp_path / "a.safetensors")) == set(TENSORS)
