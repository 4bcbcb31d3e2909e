"""The same model with fewer or narrower experts: which number in its config says so, and which tensors follow it.

Both are found by trying on the meta device, so no family needs a table of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
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
from moecompress.runtime import seam
from moecompress.runtime.skipping import forget_policy

#: What may become smaller: a field of ExpertsLayout -> its name in messages.
EXPERTS, WIDTH = "experts", "width"
NAMES = {EXPERTS: "the number of experts", WIDTH: "the width of the experts"}


@dataclass(frozen=True)
class Smaller:
    """model: the skeleton, without weights. keys: what was changed in the config.

    axes: parameter or buffer -> the axis on which it became smaller (that of the experts, or that of their neurons).
    """

    model: PreTrainedModel
    keys: list[str]
    axes: dict[str, int]


def size_of(opened: OpenModel, field: str) -> int:
    """``field`` of the experts' layout (EXPERTS or WIDTH), the same in every layer."""
    sizes = {getattr(moe.layout, field) for moe in opened.anatomy.moe.values()}
    if len(sizes) > 1:
        raise UserError(f"The layers differ in {NAMES[field]}", expected="one number", got=sorted(sizes),
                        remedy="this architecture is not supported yet")  # fmt: skip
    return sizes.pop()


def experts_of(opened: OpenModel) -> int:
    return size_of(opened, EXPERTS)


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


def shrink(opened: OpenModel, field: str, count: int, folder: Path, trust_remote_code: bool = False) -> Smaller:
    """Find the config in which ``field`` of every layer's experts is ``count`` and nothing else changes.

    field: EXPERTS or WIDTH. The config and the checkpoint's other small files are written to ``folder``.
    """
    if field == EXPERTS:
        _refuse_tables(opened)
    folder.mkdir(parents=True, exist_ok=True)
    copy_companions(opened.checkpoint.folder, folder)
    whole = size_of(opened, field)

    kept = dict(opened.checkpoint.config)
    forget_policy(kept, fewer=field == EXPERTS, thinner=field == WIDTH)

    def build(numbers: Mapping[str, int]) -> PreTrainedModel:
        config = reduce(lambda done, key: with_number(done, key, numbers[key]), numbers, kept)
        write_text(folder / "config.json", json.dumps(config, indent=2))
        loaded = load_config(folder, trust_remote_code)
        loaded.dtype = loaded.get_text_config().dtype = opened.dtype
        return build_skeleton(loaded, trust_remote_code)

    keys = [key for key in _candidates(opened, whole) if _decides(opened, field, count, partial(build, {key: count}))]
    if not keys:
        raise UserError(f"No number in config.json decides {NAMES[field]}", got=whole,
                        remedy="this architecture is not supported yet")  # fmt: skip
    numbers = dict.fromkeys([*keys, *_aliases(opened, keys)], count)
    model, axes, numbers = _following(opened, field, count, build, numbers)
    for _, experts in find_experts(model):
        experts.config._experts_implementation = seam.NAME
    return Smaller(model, list(numbers), axes)


def _following(opened: OpenModel, field: str, count: int, build: Callable[[Mapping[str, int]], PreTrainedModel],
               numbers: dict[str, int]) -> tuple[PreTrainedModel, dict[str, int], dict[str, int]]:  # fmt: skip
    """The model whose tensors all follow, the axes on which they do, and what its config needed.

    Where shared experts are as wide as a number of routed ones, that number grows as routed experts become narrower.
    """
    model = build(numbers)
    try:
        return model, _axes(opened, model, field, count), numbers
    except UserError as error:
        if field == EXPERTS:
            raise
        for more in _shared(opened, count):
            model = build(numbers | more)
            with suppress(UserError):
                return model, _axes(opened, model, field, count), numbers | more
        raise error


# --- the config -----------------------------------------------------------------------------------------------------


def _entries(opened: OpenModel) -> Iterator[tuple[str, Any]]:
    """Every entry of the config, those it leaves to the family included, as "key" or "section.key"."""
    for source in (opened.checkpoint.config, opened.config.to_dict()):
        for key, value in source.items():
            yield key, value
            if isinstance(value, dict):
                yield from ((f"{key}.{inner}", v) for inner, v in value.items())


def _candidates(opened: OpenModel, whole: int) -> list[str]:
    """The entries that equal ``whole``, or are lists of it."""
    found: dict[str, None] = {}
    for name, number in _entries(opened):
        numbers = number if isinstance(number, list) and number else [number]
        if all(type(n) is int and n == whole for n in numbers):
            found[name] = None
    return list(found)


def _shared(opened: OpenModel, count: int) -> list[dict[str, int]]:
    """Numbers of shared experts with which they are as wide as before, if a shared expert is as wide as a routed one."""
    whole = size_of(opened, WIDTH)
    found = {name: n * whole // count for name, n in _entries(opened)
             if "shared" in name and type(n) is int and n > 0 and n * whole % count == 0}  # fmt: skip
    return [{name: n} for name, n in found.items()]


def with_number(config: dict[str, Any], key: str, count: int) -> dict[str, Any]:
    """The config with ``count`` at ``key`` ("key" or "section.key"), or a list of it where it has a list."""
    section, _, name = key.rpartition(".")
    if section:
        return config | {section: with_number(config.get(section) or {}, name, count)}
    old = config.get(name)
    return config | {name: [count] * len(old) if isinstance(old, list) else count}


def _decides(opened: OpenModel, field: str, count: int, build: Callable[[], PreTrainedModel]) -> bool:
    """Does a change of the config change ``field`` of the experts of every layer, and nothing else about them?"""
    change: dict[str, Any] = {field: count}
    wanted = {m.module: replace(m.layout, **change) for m in opened.anatomy.moe.values()}
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


def _axes(opened: OpenModel, smaller: PreTrainedModel, field: str, count: int) -> dict[str, int]:
    """Compare shapes: each tensor is as it was, or smaller on one axis, as ``field`` is."""
    whole = size_of(opened, field)
    # Experts are in all that a layer has one slice an expert of; neurons only in experts, gate and up often in one tensor.
    prefixes = (opened.anatomy.stack + ".",) if field == EXPERTS else tuple(m.module + "." for m in opened.anatomy.moe.values())
    multiples = (1,) if field == EXPERTS else (1, 2)
    pairs = [(n * whole, n * count) for n in multiples]
    before, after = (dict(model.state_dict()) for model in (opened.model, smaller))
    axes = {}
    for name in sorted(before.keys() | after.keys()):
        old, new = (tuple(side[name].shape) if name in side else () for side in (before, after))
        if old == new:
            continue
        changed = [axis for axis, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]]
        follows = len(old) == len(new) and len(changed) == 1 and (old[changed[0]], new[changed[0]]) in pairs
        if not follows or not name.startswith(prefixes):
            what = "one slice an expert" if field == EXPERTS else "a part of a routed expert"
            remedy = "this architecture is not supported yet"
            if field == WIDTH and "shared" in name and changed and old[changed[0]] % count:
                remedy = f"shared experts are as wide as a number of routed ones: choose a width that divides {old[changed[0]]}"
            raise UserError(f"{name} would not follow if {NAMES[field]} were smaller", expected=f"the same shape, or {what}",
                            got=f"{old} → {new}", remedy=remedy)  # fmt: skip
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
