"""What was done: the fate of every input tensor, sizes, and the sha256 of every file of the output."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moecompress.errors import UserError
from moecompress.model.anatomy import EXPERT, ROUTER, Anatomy
from moecompress.model.checkpoint import read_header, sha256_file, write_text

VERSION = 1
FOLDER = "moecompress"
MANIFEST = "manifest.json"
#: The fate of a tensor that the output has nothing of.
LEFT_OUT = "left out"


#: … and of one of an expert that the allocator left out.
DROPPED = "dropped by plan"


def slimmed_to(width: int, whole: int) -> str:
    """The fate of a tensor of an expert that was left with ``width`` neurons of ``whole``."""
    return f"slimmed to {width} of {whole}"


def fates(anatomy: Anatomy, schemes: dict[str, str], dropped: Mapping[int, Sequence[int]] | None = None,
          changed: Collection[str] = (), slimmed: Mapping[int, Mapping[int, int]] | None = None) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Input tensor -> role and fate. ``schemes``: what was quantized (linear layer, or expert module.index.projection).
    ``dropped``: layer -> experts that were left out; ``changed``: parameters that follow them. ``slimmed``: layer -> expert -> neurons
    that it was left with."""
    result: dict[str, dict[str, Any]] = {}
    for info in anatomy.tensors:
        fate: dict[str, Any] = {"role": info.role, "bytes": info.nbytes}
        if info.role == EXPERT:
            module = info.target.rpartition(".")[0]
            own = re.search(r"experts\.(\d+)\.", info.name)  # else all experts of the layer are in one tensor
            if own and int(own[1]) in (dropped or {}).get(info.layer or 0, ()):
                fate["fate"] = DROPPED
            else:
                width = (slimmed or {}).get(info.layer or 0, {}).get(int(own[1]), 0) if own else 0
                whole = anatomy.moe[info.layer].layout.width if width and info.layer is not None else 0
                fate |= {"fate": slimmed_to(width, whole) if width else "quantized", "into": f"{module}.packed"}
        elif info.target in changed:
            others = "of the experts left" if info.layer in (dropped or {}) else "of the neurons left first"
            fate["fate"] = "sliced" if info.role == ROUTER else others
        elif (linear := info.target.removesuffix(".weight")) in schemes:
            fate |= {"fate": "quantized", "into": f"{linear}.packed", "scheme": schemes[linear]}
        else:
            fate["fate"] = "kept"
        result[info.name] = fate
    return result


def fates_through(anatomy: Anatomy, steps: Sequence[dict[str, dict[str, Any]]], last: dict[str, dict[str, Any]] | None = None
                  ) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Fates of the input's tensors through several stages, each given as the fates of what it was handed.

    ``steps``: those that made a smaller model; ``last``: quantizing it (None: it was not). A tensor of an expert that a step
    changed is in the layer's packed experts; which of them, if any, is in the steps' maps of experts.
    """
    result: dict[str, dict[str, Any]] = {}
    for info in anatomy.tensors:
        words = [step[info.name]["fate"] for step in steps if info.name in step]
        changed = [word for word in words if word != "kept"]
        fate: dict[str, Any] = {"role": info.role, "bytes": info.nbytes, "fate": changed[0] if changed else "kept"}
        if last is not None and not changed:
            fate = last[info.name]
        elif last is not None and info.role == EXPERT and changed[0] != LEFT_OUT:
            module = info.target.rpartition(".")[0]
            fate |= {"fate": f"{changed[0]}, quantized", "into": f"{module}.packed"}
        result[info.name] = fate
    return result


def expert_bytes(shards: Iterable[Path]) -> int:
    """Bytes of all tensors that routed experts are rebuilt from, of the files as written."""
    return sum(
        entry.nbytes
        for shard in shards
        for name, entry in read_header(shard).items()
        if ".packed." in name and ("_banks." in name or name.endswith((".packed.into", ".packed.share")))
    )


def write_manifest(folder: Path, record: dict[str, Any]) -> None:
    """Add the sha256 of every file in the folder and write it. Nothing in it depends on when or where it was made."""
    path = folder / FOLDER / MANIFEST
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != path)
    record = {"version": VERSION, **record, "files": {p.relative_to(folder).as_posix(): sha256_file(p) for p in files}}
    write_text(path, json.dumps(record, indent=1, sort_keys=True))


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / FOLDER / MANIFEST
    if not path.exists():
        raise UserError(f"{folder} has no manifest", expected=f"{FOLDER}/{MANIFEST}, as moecompress quantize writes it",
                        remedy="pass a folder made by `moecompress quantize`")  # fmt: skip
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged", got=str(error), remedy="copy or compress the folder again") from None
