"""The same model with fewer experts: which number in its config says so, and which tensors follow it.

Both are found by trying on the meta device, so no family needs a table of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moecompress.errors import UserError
from moecompress.model.checkpoint import copy_companions, write_text
from moecompress.model.experts import find_experts, layout_of
from moecompress.model.skeleton import build_skeleton, load_config
from moecompress.model.walk import OpenModel
from moecompress.progress import notice
from moecompress.runtime import seam
from moecompress.runtime.skipping import KEY


@dataclass(frozen=True)
class Smaller:
    """model: the skeleton, without weights. keys: what was changed in the config.

    axes: parameter or buffer -> the axis on which it has one slice an expert.
    """

    model: PreTrainedModel
    keys: list[str]
    axes: dict[str, int]


def experts_of(opened: OpenModel) -> int:
    """The number of experts, the same in every layer."""
    counts = {moe.layout.experts for moe in opened.anatomy.moe.values()}
    if len(counts) > 1:
        raise UserError("The layers have different numbers of experts", expected="one number", got=sorted(counts),
                        remedy="this architecture is not supported yet")  # fmt: skip
    return counts.pop()


def groups_of(opened: OpenModel) -> int:
    """Groups that routing picks first (DeepSeek); 1 without."""
    return getattr(opened.config.get_text_config(), "n_group", None) or 1


def refuse_count(opened: OpenModel, count: int) -> None:
    """UserError unless ``count`` experts a layer can be routed to as before."""
    experts, k, groups = experts_of(opened), opened.anatomy.top_k, groups_of(opened)
    if k is None:
        raise UserError("config.json does not say how many experts a token uses", remedy="this architecture is not supported yet")
    if not k + 1 <= count < experts:
        raise UserError(f"Cannot keep {count} of {experts} experts", expected=f"{k + 1} to {experts - 1}: a token uses {k}, "
                        "and the router must have a choice", got=count, remedy="choose another --keep")  # fmt: skip
    picked = getattr(opened.config.get_text_config(), "topk_group", None) or 1
    least = max(2, -(-k // picked)) if groups > 1 else 1  # a group's rank is the sum of its two best
    if count % groups or count // groups < least:
        raise UserError(f"Cannot keep {count} experts in {groups} groups", expected=f"a multiple of {groups}, and at least "
                        f"{least} a group: the router first picks {picked} groups", got=count, remedy="choose another --keep")  # fmt: skip


def shrink(opened: OpenModel, count: int, folder: Path, trust_remote_code: bool = False) -> Smaller:
    """Find the config with ``count`` experts a layer; it and the checkpoint's other small files are written to ``folder``."""
    _refuse_tables(opened)
    folder.mkdir(parents=True, exist_ok=True)
    copy_companions(opened.checkpoint.folder, folder)

    kept = dict(opened.checkpoint.config)
    if kept.pop(KEY, None):
        notice("the model's routing policy was tuned for more experts and is left out; see `moecompress tune-routing`")

    def build(keys: list[str]) -> PreTrainedModel:
        config = reduce(lambda done, key: _with(done, key, count), keys, kept)
        write_text(folder / "config.json", json.dumps(config, indent=2))
        loaded = load_config(folder, trust_remote_code)
        loaded.dtype = loaded.get_text_config().dtype = opened.dtype
        return build_skeleton(loaded, trust_remote_code)

    keys = [key for key in _candidates(opened) if _decides(opened, count, partial(build, [key]))]
    if not keys:
        raise UserError("No number in config.json decides how many experts there are", got=f"{experts_of(opened)} experts",
                        remedy="this architecture is not supported yet")  # fmt: skip
    model = build([*keys, *_aliases(opened, keys)])
    for _, experts in find_experts(model):
        experts.config._experts_implementation = seam.NAME
    return Smaller(model, keys, _axes(opened, model, count))


# --- the config -----------------------------------------------------------------------------------------------------


def _candidates(opened: OpenModel) -> list[str]:
    """Every entry of the config, as "key" or "section.key", that equals the number of experts."""
    experts = experts_of(opened)
    found: dict[str, None] = {}
    for source in (opened.checkpoint.config, opened.config.to_dict()):
        for key, value in source.items():
            inside = value.items() if isinstance(value, dict) else ()
            for name, number in ((key, value), *((f"{key}.{k}", v) for k, v in inside)):
                numbers = number if isinstance(number, list) and number else [number]
                if all(type(n) is int and n == experts for n in numbers):
                    found[name] = None
    return list(found)


def _with(config: dict[str, Any], key: str, count: int) -> dict[str, Any]:
    section, _, name = key.rpartition(".")
    if section:
        return config | {section: _with(config.get(section) or {}, name, count)}
    old = config.get(name)
    return config | {name: [count] * len(old) if isinstance(old, list) else count}


def _decides(opened: OpenModel, count: int, build: Callable[[], PreTrainedModel]) -> bool:
    """Does a change of the config change the number of experts of every layer, and nothing else about them?"""
    wanted = {m.module: replace(m.layout, experts=count) for m in opened.anatomy.moe.values()}
    try:
        model = build()
    except UserError:  # a number of something else, that happens to be equal: heads, layers, a token
        return False
    return {name: layout_of(module) for name, module in find_experts(model) if name in wanted} == wanted


def _aliases(opened: OpenModel, keys: list[str]) -> list[str]:
    """Other names in config.json of what ``keys`` name, so that the file does not contradict itself."""
    names = getattr(opened.config.get_text_config(), "attribute_map", {})
    twins = {**names, **{own: alias for alias, own in names.items()}}
    found = []
    for key in keys:
        section, dot, name = key.rpartition(".")
        where = opened.checkpoint.config.get(section, {}) if section else opened.checkpoint.config
        twin = twins.get(name)
        if twin is not None and twin in where and section + dot + twin not in keys:
            found.append(section + dot + twin)
    return found


# --- the tensors ----------------------------------------------------------------------------------------------------


def _axes(opened: OpenModel, smaller: PreTrainedModel, count: int) -> dict[str, int]:
    """Compare shapes: each tensor is as it was, or has ``count`` instead of all experts on one axis."""
    experts, prefix = experts_of(opened), opened.anatomy.stack + "."
    before, after = (dict(model.state_dict()) for model in (opened.model, smaller))
    axes = {}
    for name in sorted(before.keys() | after.keys()):
        old, new = (tuple(side[name].shape) if name in side else None for side in (before, after))
        if old == new:
            continue
        changed = [a for a, pair in enumerate(zip(old or (), new or (), strict=False)) if pair == (experts, count)]
        same = len(changed) == 1 and old is not None and (*old[: changed[0]], count, *old[changed[0] + 1 :]) == new
        if not same or not name.startswith(prefix):
            raise UserError(f"{name} would not follow a smaller number of experts", expected="the same shape, or one slice an expert",
                            got=f"{old} → {new}", remedy="this architecture is not supported yet")  # fmt: skip
        axes[name] = changed[0]
    return axes


def _refuse_tables(opened: OpenModel) -> None:
    """A table of expert numbers (hash routing) names experts that would be gone."""
    for moe in opened.anatomy.moe.values():
        block = opened.model.get_submodule(moe.module.rpartition(".")[0])
        for name, tensor in block.state_dict().items():
            if not tensor.is_floating_point() and tensor.dtype != torch.bool:
                raise UserError(f"{moe.module.rpartition('.')[0]}.{name} holds whole numbers", expected="a router that scores experts",
                                got="what looks like a table of experts by token", remedy="this architecture is not supported yet")  # fmt: skip
