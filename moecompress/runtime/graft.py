"""Layers with fewer experts than the config says: the block around a layer's experts comes from the same family's skeleton
with a smaller number of experts, so its own code routes among those that are left."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moecompress.errors import UserError
from moecompress.model.experts import layout_of
from moecompress.model.skeleton import first_line, put, quiet_transformers


def sprout(model: PreTrainedModel, keys: list[str], count: int) -> PreTrainedModel:
    """A weightless model like ``model`` with ``count`` experts in every layer. keys: entries of its config that say how many
    ("key", or "section.key"; a text model taken out of a multimodal checkpoint is its section)."""
    from accelerate import init_empty_weights

    config = deepcopy(model.config)
    for key in keys:
        section, _, name = key.rpartition(".")
        where: Any = getattr(config, section, config) if section else config
        old = getattr(where, name, None)
        setattr(where, name, [count] * len(old) if isinstance(old, list) else count)
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            return type(model)(config).eval()
    except Exception as error:  # a wrong name or number raises whatever it leads to, inside transformers
        raise UserError(f"transformers cannot build {type(model).__name__} with {count} experts", got=first_line(error),
                        remedy="config.json was changed: copy or compress the folder again") from None  # fmt: skip


def graft(model: PreTrainedModel, experts: str, source: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """Put the block around the module ``experts`` of ``source`` in the place of ``model``'s; returns the old and the new one.

    Tensors of the new block are without values, in the dtype and on the device of the old one's.
    """
    where = experts.rpartition(".")[0]
    old, new = model.get_submodule(where), source.get_submodule(where)
    for name, tensor in old.state_dict().items():
        put(new, name, torch.empty(new.state_dict()[name].shape, dtype=tensor.dtype, device="meta"))
    new.get_submodule(experts.removeprefix(where + ".")).config = model.get_submodule(experts).config
    parent, _, leaf = where.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    return old, new


def keep_only(model: PreTrainedModel, experts: str, source: PreTrainedModel, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same where the block has weights: the new one gets the slices of the experts ``kept`` [n]. Returns its tensors that
    became smaller, by parameter of the model, the experts' own matrices left out."""
    old, new = graft(model, experts, source)
    where, sliced = experts.rpartition(".")[0], {}
    matrices = {f"{experts}.{name}" for name in layout_of(model.get_submodule(experts)).parameters}
    shapes = {name: tensor.shape for name, tensor in new.state_dict().items()}
    for name, tensor in old.state_dict().items():
        axis = smaller_axis(tuple(tensor.shape), tuple(shapes[name]))
        if axis is not None:
            tensor = tensor.index_select(axis, kept)
            if f"{where}.{name}" not in matrices:
                sliced[f"{where}.{name}"] = tensor
        put(new, name, tensor)
    return sliced


def smaller_axis(old: tuple[int, ...], new: tuple[int, ...]) -> int | None:
    """The axis on which two shapes differ; None if they are the same."""
    changed = [axis for axis, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
    return changed[0] if changed else None
