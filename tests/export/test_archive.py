"""An archive is no checkpoint, and gives the very bytes back."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tiny_model, quick, moecompress) -> Path:
    """Words of a dictionary and, since the target has room for some, five trits a byte."""
    folder = tmp_path_factory.mktemp("dictionary") / "out"
    changes = ["quantize.refine=0", "allocate.drop=false", "allocate.slim=false", "allocate.compare=none",
               "allocate.candidates=[{code: dictionary, bits: 0.8}, {code: ternary}]"]  # fmt: skip
    ran = moecompress("quantize", tiny_model, "-o", folder, "--target-bits", 2.1, *quick, *(word for change in changes for word in ("--set", change)))
    assert ran.code == 0, ran.err
    return folder


@pytest.fixture(scope="module")
def archive(packed, moecompress) -> Path:
    folder = packed.with_name("archive")
    ran = moecompress("export", packed, "-o", folder, "--format", "archive", "--json")
    assert ran.code == 0, ran.err
    assert ran.json()["total_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return folder


def test_there_and_back(packed, archive, tmp_path, moecompress):
    names = {name for shard in packed.glob("model-layer-*") for name in load_file(shard)}
    assert any(".d0_8." in name for name in names) and any(".ternary." in name for name in names)
    ran = moecompress("export", archive, "-o", tmp_path / "back", "--format", "packed")
    assert ran.code == 0, ran.err
    assert contents(tmp_path / "back") == contents(packed)


def test_an_archive_is_no_checkpoint(archive, moecompress):
    ran = moecompress("run", archive, "--prompt", "x", "-n", 1)
    assert ran.code == 2 and "Traceback" not in ran.err


def test_a_damaged_archive_is_refused(archive, tmp_path, moecompress):
    import shutil

    broken = Path(shutil.copytree(archive, tmp_path / "broken"))
    shard = sorted(broken.glob("model-layer-*"))[0]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("rans.stream"))
    for change in (torch.roll(tensors[name].view(torch.int16), 1).view(torch.uint16), None):
        changed = {key: change if key == name else value for key, value in tensors.items() if key != name or change is not None}
        save_file(changed, shard)
        ran = moecompress("export", broken, "-o", tmp_path / "back", "--format", "packed")
        assert ran.code == 2 and "Traceback" not in ran.err and not (tmp_path / "back").exists()


def test_what_cannot_be_archived(tiny_model, packed_tiny, tmp_path, moecompress):
    for folder, form in ((tiny_model, "archive"), (packed_tiny, "archive"), (packed_tiny, "packed")):
        ran = moecompress("export", folder, "-o", tmp_path / "out", "--format", form)
        assert ran.code == 2 and "Traceback" not in ran.err and not (tmp_path / "out").exists()
