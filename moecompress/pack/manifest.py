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
          changed: Collection[str] = (), merged: Mapping[int, Mapping[int, int]] | None = None,
          slimmed: Mapping[int, Mapping[int, int]] | None = None) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Input tensor -> role and fate. ``schemes``: what was quantized (linear layer, or expert module.index.projection).
    ``dropped``: layer -> experts that were left out; ``changed``: parameters that follow them; ``merged``: layer -> expert ->
    the one whose down matrix was refitted to serve for it, too; ``slimmed``: layer -> expert -> neurons that it was left with."""
    result: dict[str, dict[str, Any]] = {}
    for info in anatomy.tensors:
        fate: dict[str, Any] = {"role": info.role, "bytes": info.nbytes}
        if info.role == EXPERT:
            module = info.target.rpartition(".")[0]
            own = re.search(r"experts\.(\d+)\.", info.name)  # else all experts of the layer are in one tensor
            into = (merged or {}).get(info.layer or 0, {})
            if own and int(own[1]) in (dropped or {}).get(info.layer or 0, ()):
                fate["fate"] = merged_into(into[int(own[1])]) if int(own[1]) in into else DROPPED
            else:
                width = (slimmed or {}).get(info.layer or 0, {}).get(int(own[1]), 0) if own else 0
                whole = anatomy.moe[info.layer].layout.width if width and info.layer is not None else 0
                fate |= {"fate": slimmed_to(width, whole) if width else "quantized", "into": f"{module}.packed"}
                if info.target.endswith(".down_proj") and (not own or int(own[1]) in into.values()):
                    fate |= {"refitted": {str(by): [e for e in into if into[e] == by] for by in sorted(set(into.values()))
                                          if not own or int(own[1]) == by}} if into else {}  # fmt: skip
        elif info.target in changed:
            others = "of the experts left" if info.layer in (dropped or {}) else "of the neurons left first"
            fate["fate"] = "sliced" if info.role == ROUTER else others
        elif (linear := info.target.removesuffix(".weight")) in schemes:
            fate |= {"fate": "quantized", "into": f"{linear}.packed", "scheme": schemes[linear]}
        else:
            fate["fate"] = "kept"
        result[info.name] = fate
    return result


def merged_into(expert: int) -> str:
    return f"merged into expert {expert}"


def left_out(gone: Mapping[int, Sequence[int]], shared: Mapping[str, tuple[int, float]], merged: Mapping[int, Mapping[int, int]]
             ) -> dict[str, dict[str, str]]:  # fmt: skip
    """Layer -> expert that has no matrices -> what becomes of its tokens, in words. shared: as of a plan; others as of `fates`."""

    def word(layer: int, expert: int) -> str:
        by, factor = shared.get(f"L{layer:02d}.E{expert:03d}", (None, 0.0))
        if by is None:
            return "dropped, its tokens are routed again"
        if by < 0:
            return "dropped, nobody serves its tokens"
        return merged_into(by) if expert in merged.get(layer, {}) else f"served by expert {by}, times {factor:.3g}"

    return {str(layer): {str(expert): word(layer, expert) for expert in experts} for layer, experts in gone.items()}


def fates_through(anatomy: Anatomy, steps: Sequence[dict[str, dict[str, Any]]], last: dict[str, dict[str, Any]] | None = None
                  ) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Fates of the input's tensors through several stages, each given as the fates of what it was handed.

    ``steps``: those that made a smaller model or trained it; ``last``: quantizing it (None: it was not). A tensor of an expert that a step
    changed is in the layer's packed experts; which of them, if any, is in the steps' maps of experts.
    """
    result: dict[str, dict[str, Any]] = {}
    for info in anatomy.tensors:
        words = [step[info.name]["fate"] for step in steps if info.name in step]
        changed = ", ".join(dict.fromkeys(word for word in words if word != "kept"))
        fate: dict[str, Any] = {"role": info.role, "bytes": info.nbytes, "fate": changed or "kept"}
        if last is not None and not changed:
            fate = last[info.name]
        elif last is not None and info.role == EXPERT and LEFT_OUT not in words:
            module = info.target.rpartition(".")[0]
            fate |= {"fate": f"{changed}, quantized", "into": f"{module}.packed"}
        elif last is not None and last.get(info.name, fate)["fate"] == "quantized":
            fate = last[info.name] | {"fate": f"{changed}, quantized"}
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
    """Add the sha256 of every file in the folder and write it. Nothing in it depends on when or where it was made,
    but the seconds that a distill step says it took."""
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
