"""What a report is made from: the records that compression left in a folder, and evaluations made later."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecompress.allocate.plan import Plan
from moecompress.calibrate.statistics import Statistics
from moecompress.errors import UserError
from moecompress.model.checkpoint import read_header
from moecompress.pack.manifest import FOLDER, MANIFEST, read_manifest

#: What an evaluation must say to be shown.
NEEDED = ("model", "sequences", "context_length", "kl_mean", "kl_interval_95", "perplexity",
          "reference_perplexity", "total_bytes", "bits_per_weight")  # fmt: skip


@dataclass(frozen=True)
class Records:
    """manifest: see pack/manifest.py. stored: bytes in the shards by (role, fate). evaluations: as written."""

    name: str
    manifest: dict[str, Any]
    plan: Plan
    statistics: Statistics
    recipe: str
    stored: dict[tuple[str, str], int]
    evaluations: list[dict[str, Any]]


def read_records(folder: Path, evaluations: Sequence[Path] = ()) -> Records:
    """The records of a folder that `moecompress quantize` wrote. UserError if one is missing or damaged."""
    records = folder / FOLDER
    try:
        manifest = read_manifest(folder)
        plan = Plan.from_json((records / "plan.json").read_text(encoding="utf-8"))
        recipe = (records / "recipe.yaml").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing", expected="the records that moecompress quantize writes",
                        remedy="copy or compress the folder again") from None  # fmt: skip
    except json.JSONDecodeError as error:
        raise UserError(f"{records / MANIFEST} is damaged", got=str(error),
                        remedy="copy or compress the folder again") from None  # fmt: skip
    return Records(folder.resolve().name, manifest, plan, Statistics.load(records), recipe,
                   stored_bytes(folder, manifest["tensors"]),
                   [read_evaluation(path) for path in evaluations])  # fmt: skip


def read_evaluation(path: Path) -> dict[str, Any]:
    """The record that `moecompress evaluate` wrote; UserError if it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in NEEDED if not isinstance(record, dict) or record.get(key) is None]
    except ValueError:
        missing = ["everything: it is not JSON"]
    if missing:
        raise UserError(f"{path} is not an evaluation", expected="the JSON that moecompress evaluate -o writes",
                        got=f"no {', '.join(missing)}")  # fmt: skip
    return {"text": "unnamed text"} | record


def stored_bytes(folder: Path, tensors: dict[str, dict[str, Any]]) -> dict[tuple[str, str], int]:
    """Bytes in the shards by (role, fate) of the input tensors they stand for; tensors that stand for none: "added"."""
    kept = {name: (fate["role"], fate["fate"]) for name, fate in tensors.items()}
    packed: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)  # module -> neurons of its thinner experts, "" for the others
    for fate in tensors.values():
        if "into" in fate:
            packed[fate["into"]].setdefault(_first(r"slimmed to (\d+) of", fate["fate"]), (fate["role"], fate["fate"]))
    total: dict[tuple[str, str], int] = defaultdict(int)
    for shard in sorted(folder.glob("*.safetensors")):
        for name, entry in read_header(shard).items():
            owners = packed.get(name.partition(".packed.")[0] + ".packed", {"": ("added", "marker")})
            owner = owners.get(_first(r"_banks\.\w+w(\d+)\.", name), next(iter(owners.values())))
            total[kept.get(name, owner)] += entry.nbytes
    return dict(total)


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""


def fates_by_role(records: Records) -> list[dict[str, Any]]:
    """One row for each (role, fate) of the input's tensors, the heaviest first: how many, bytes before and after."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for tensor in records.manifest["tensors"].values():
        key = tensor["role"], re.sub(r" expert \d+$", " another expert", tensor["fate"])
        empty = {"role": key[0], "fate": key[1], "count": 0, "before": 0, "after": 0, "schemes": set()}
        row = rows.setdefault(key, empty)
        row["count"] += 1
        row["before"] += tensor["bytes"]
        if "scheme" in tensor:
            row["schemes"].add(tensor["scheme"])
    for key, size in records.stored.items():
        if key in rows:
            rows[key]["after"] = size
    used = {choice.candidate for choice in records.plan.choices}
    for row in rows.values():
        if row["role"] == "expert":
            row["schemes"] = used
    order = {name: index for index, name in enumerate(records.plan.candidates)}
    return [row | {"schemes": sorted(row["schemes"], key=lambda name: order.get(name, -1))}
            for row in sorted(rows.values(), key=lambda row: -row["before"])]  # fmt: skip


def errors_by_layer(manifest: dict[str, Any], projections: Sequence[str]) -> dict[str, dict[int, list[float]]]:
    """Kind of matrix (projection of the experts, or role of a linear layer) -> layer -> relative output errors."""
    fates = [fate for fate in manifest["tensors"].values() if "into" in fate]
    roles = {fate["into"].removesuffix(".packed"): fate["role"] for fate in fates}
    result: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, error in manifest["errors"].items():
        layer = re.search(r"\.(\d+)\.", name)
        kind = roles.get(name) or f"expert {name.rpartition('.')[2]}"
        result[kind][int(layer[1]) if layer else 0].append(error)
    experts = [f"expert {projection}" for projection in projections]
    return {kind: dict(result[kind]) for kind in dict.fromkeys([*experts, *sorted(result)]) if kind in result}


def experts_by_layer(names: Sequence[str]) -> dict[str, list[str]]:
    """["L01.E004", "L01.E014"] -> {"1": ["4", "14"]}"""
    result: dict[str, list[str]] = defaultdict(list)
    for name in names:
        layer, expert = name.split(".")[:2]
        result[str(int(layer[1:]))].append(str(int(expert[1:])))
    return dict(result)


def slimmed(manifest: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Layer -> expert -> neurons that it was left with, both in the order of their numbers."""
    return {layer: dict(sorted(experts.items(), key=lambda item: int(item[0])))
            for layer, experts in sorted(manifest.get("slimmed", {}).items(), key=lambda item: int(item[0]))}  # fmt: skip


def totals(records: Records) -> dict[str, int]:
    """Bytes of all shards, had each of the plans that were measured been written."""
    total = records.manifest["total_bytes"]
    others = {label: total - records.plan.bytes + control.bytes for label, control in records.plan.controls.items()}
    return dict.fromkeys(("plan", "cross", "whole", "bits", "uniform"), total) | others


def points(records: Records) -> list[dict[str, Any]]:
    """What there is to show of size against divergence: label (with the text), bytes, KL and its 95 % interval."""
    manifest = records.manifest
    result: list[dict[str, Any]] = [{"label": "original", "kind": "original", "bytes": manifest["input_bytes"],
                                     "kl": 0.0, "interval": [0.0, 0.0]}]  # fmt: skip
    for label, size in totals(records).items():
        if label in manifest["heldout"]:
            row = manifest["heldout"][label]
            repair = manifest.get("repair") if label == manifest["chosen"] else None
            row = repair["after"] if repair and repair["kept"] else row
            result.append({"label": f"{label}, held-out calibration text", "kind": label, "bytes": size,
                           "kl": row["kl_mean"], "interval": row["kl_interval_95"]})  # fmt: skip
    for row in records.evaluations:
        label = f"{Path(row['model']).name}, {Path(row['text']).name}"
        result.append({"label": label, "kind": "evaluation", "bytes": row["total_bytes"],
                       "kl": row["kl_mean"], "interval": row["kl_interval_95"]})  # fmt: skip
    return result
