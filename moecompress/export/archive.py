"""The smallest form for storage and transport, and back: trits at their entropy (SPEC.md, section 8), all else as it is.

Going back gives the very bytes again; they are compared with the sha256 that the folder's manifest has of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from moecompress.errors import UserError
from moecompress.job import refuse_target, work_folder
from moecompress.model.checkpoint import give_name, read_entry, read_header, read_object, write_shard, write_text
from moecompress.model.walk import OpenModel
from moecompress.pack import dictionary, rans, ternary
from moecompress.pack.fields import wrong
from moecompress.pack.manifest import FOLDER, read_manifest
from moecompress.pack.scheme import DICTIONARY, TERNARY, Scheme
from moecompress.progress import track
from moecompress.runtime.bank import FewValues
from moecompress.runtime.loading import is_packed, prepare, verify_files

#: Says what was archived, and keeps config.json out of the way: an archive is no checkpoint that could be loaded.
RECORD, CONFIG = f"{FOLDER}/archive.json", f"{FOLDER}/config.json"
PARTS = ("stream", "ends", "states", "tables")


def export(model: Path, output: Path, dtype: str, load_bits: int | None = None) -> dict[str, Any]:
    """Write the archive of ``model``, a folder of `moecompress quantize`. ``dtype`` does not matter; ``load_bits`` must be None."""
    refuse_target(output)
    if not is_packed(model) or load_bits is not None:
        raise UserError(f"{model} cannot be archived", expected="a folder of `moecompress quantize`, all bits", remedy="leave --load-bits out")
    listed = read_manifest(model)["files"]
    verify_files(model)
    skeleton = OpenModel(model, prepare=prepare(model)).model
    banks = {name: module for name, module in skeleton.named_modules()
             if isinstance(module, FewValues) and module.scheme.code in (DICTIONARY, TERNARY)}  # fmt: skip
    if not banks:
        raise UserError(f"{model} has no ternary experts", expected="candidates of code dictionary or ternary", remedy="keep the folder as it is")
    work = _fresh(output)
    for name in track(_all(listed), "archive"):
        if not _rewritten(model / name, work / name, banks, _archived):
            _copy(model / name, work / (CONFIG if name == "config.json" else name))
    record = {"version": 1, "banks": {name: {"scheme": bank.scheme.name, "cols": bank.cols} for name, bank in banks.items()}}
    write_text(work / RECORD, json.dumps(record, indent=1))
    give_name(work, output)
    return _said(output, "archive")


def restore(model: Path, output: Path, dtype: str, load_bits: int | None = None) -> dict[str, Any]:
    """The folder that the archive ``model`` was made from, byte for byte. UserError if it cannot be had back."""
    refuse_target(output)
    if not (model / RECORD).exists():
        raise UserError(f"{model} is no archive", expected=RECORD, remedy="pass a folder made by `moecompress export --format archive`")
    listed, banks = read_manifest(model)["files"], read_object(model / RECORD).get("banks", {})
    work = _fresh(output)
    for name in track(_all(listed), "restore"):
        if not _rewritten(model / name, work / name, banks, _restored):
            _copy(model / (CONFIG if name == "config.json" else name), work / name)
    verify_files(work)
    give_name(work, output)
    return _said(output, "packed")


def _all(listed: Iterable[str]) -> list[str]:
    return [*listed, f"{FOLDER}/manifest.json"]


def _rewritten(source: Path, target: Path, banks: dict[str, Any], change: Callable[[str, Any, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
               ) -> bool:  # fmt: skip
    """Write ``source`` with the banks that are in it changed; False if it has none and is to be copied as it is."""
    if source.suffix != ".safetensors" or not source.exists():
        return False
    tensors = _read(source)
    here = [name for name in banks if f"{name}.levels" in tensors]
    for name in here:
        tensors |= {f"{name}.{part}": tensor for part, tensor in change(name, banks[name], tensors).items()}
    if here:
        write_shard(target, tensors)
    return bool(here)


def _archived(name: str, bank: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Takes the bank's words or codes out of ``tensors``; returns what stands for them."""
    for key in bank.bank().tensors():
        setattr(bank, key, tensors[f"{name}.{key}"] if key == "levels" else tensors.pop(f"{name}.{key}"))
    whole = bank.bank()
    trits = dictionary.decode(whole) if bank.scheme.code == DICTIONARY else ternary.unpack_trits(whole.codes, whole.cols)
    return {f"rans.{part}": tensor for part, tensor in rans.archive(trits).tensors().items()}


def _restored(name: str, bank: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    levels, scheme = tensors[f"{name}.levels"], Scheme.parse(bank["scheme"])
    missing = [part for part in PARTS if f"{name}.rans.{part}" not in tensors]
    if missing or levels.dim() != 3:
        raise wrong(f"{name}.rans.{(missing or PARTS)[0]}", "to be there", "no such tensor")
    rows, cols = levels.shape[1], bank["cols"]
    trits = rans.restore(rans.Archive(**{part: tensors.pop(f"{name}.rans.{part}") for part in PARTS}, rows=rows, cols=cols))
    if scheme.code == TERNARY:
        return ternary.pack_ternary(trits, levels).tensors()
    return dictionary.pack(trits, levels, dictionary.rate_prices(scheme.bits), dictionary.room(rows, cols, scheme.bits)).tensors()


def _read(shard: Path) -> dict[str, torch.Tensor]:
    return {name: read_entry(entry) for name, entry in read_header(shard).items()}


def _fresh(output: Path) -> Path:
    work = work_folder(output)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        raise UserError(f"{source} is missing", remedy="copy the folder again")
    shutil.copyfile(source, target)


def _said(output: Path, name: str) -> dict[str, Any]:
    sizes = [path.stat().st_size for path in output.glob("*.safetensors")]
    return {"output": str(output), "format": name, "total_bytes": sum(sizes), "shards": len(sizes)}
