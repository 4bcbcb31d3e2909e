"""The walk that makes the experts of every layer smaller: layer by layer, each decided on what the changed layers before it
deliver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moecompress.calibrate.capture import Capture, recording
from moecompress.calibrate.observe import Calibration, seam_on
from moecompress.compress import Work, capture_layer, write_rest
from moecompress.errors import UserError
from moecompress.model.anatomy import IGNORED, MoELayer
from moecompress.model.checkpoint import write_index, write_shard
from moecompress.model.skeleton import put, release, stored_names
from moecompress.model.walk import OpenModel, Walk
from moecompress.pack.manifest import LEFT_OUT
from moecompress.progress import track
from moecompress.transform.outputs import Given
from moecompress.transform.shrink import Smaller, shrink


@dataclass(frozen=True)
class Site:
    """A layer of the walk, loaded and calibrated. Its experts are those of ``opened``; ``smaller`` will take their place."""

    opened: OpenModel
    smaller: Smaller
    moe: MoELayer
    capture: Capture
    calibration: Calibration

    @property
    def module(self) -> nn.Module:
        return self.opened.model.get_submodule(self.moe.module)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The loaded tensors of the layer that must become smaller, by parameter."""
        prefix = f"{self.opened.anatomy.stack}.{self.moe.layer}."
        state = self.opened.layers[self.moe.layer].state_dict(prefix=prefix)
        return {name: state[name] for name in self.smaller.axes if name.startswith(prefix)}


#: What makes one layer smaller: its changed tensors by parameter, and what is told of its experts.
Change = Callable[[Site], tuple[dict[str, torch.Tensor], dict[str, Any]]]


@torch.no_grad()
def rewrite(opened: OpenModel, calibration: Calibration, field: str, count: int, change: Change, work: Work, label: str,
            fate: str, trust_remote_code: bool = False) -> dict[str, Any]:  # fmt: skip
    """Write a whole checkpoint with ``count`` experts or neurons (``field``) to ``work.shards``; returns what became of every
    expert and tensor. fate: what is told of a tensor that became smaller.

    Finished layers are kept in ``work`` and not done again. The record of every layer has ``output_error``, how far what the
    experts give is from before.
    """
    work.make()
    smaller = shrink(opened, field, count, work.shards, trust_remote_code)
    seam_on(opened)
    # Layers that the model ignores (multi-token prediction) have the old size.
    write_rest(opened, work, leave_out=IGNORED)
    total = len(opened.layers)
    if not work.complete(total):
        with Walk(opened, calibration.batches) as walk:
            start = walk.restore(work.state)
            for layer in track(walk.layers(start), label, total - start):
                record, outputs = _rewrite_layer(walk, smaller, layer, calibration, change, work)
                work.keep_record(layer, record)
                if layer < total - 1:
                    walk.hand_on(outputs, work.state)
    write_index(work.shards, sorted(work.shards.glob("model-*.safetensors")))
    return {
        "config_keys": smaller.keys,
        "experts": {str(layer): record for layer, record in enumerate(work.records(total)) if record},
        "tensors": _fates(opened, smaller, fate),
    }


def _rewrite_layer(walk: Walk, smaller: Smaller, layer: int, calibration: Calibration, change: Change,
                   work: Work) -> tuple[dict[str, Any], list[Any]]:  # fmt: skip
    """Decide, write the layer's shard, and run the smaller layer: what is told of its experts, and its outputs."""
    opened = walk.opened
    tensors = {
        info.name: opened.checkpoint.read(info.name)
        for info in opened.anatomy.of_layer(layer)
        if info.target not in smaller.axes
    }
    moe = opened.anatomy.moe.get(layer)
    if moe is None:
        record: dict[str, Any] = {}
        outputs = walk.run_all()
    else:
        site = Site(opened, smaller, moe, capture_layer(walk, moe, calibration), calibration)
        changed, record = change(site)
        before = Given(site.module, site.capture)
        if missed := sorted(site.tensors.keys() - changed.keys()):
            raise UserError(f"{missed[0]} is a part of experts that moecompress does not know", expected="matrices and biases",
                            remedy="this architecture is not supported yet")  # fmt: skip
        tensors |= _on_disk(opened, smaller, changed)
        _replace_layer(opened, smaller, layer, changed)
        module = site.module  # the smaller one
        with recording(opened.model.get_submodule(moe.module.rpartition(".")[0]), module) as recorder:
            outputs = walk.run_all()
        record["output_error"] = before.error(module, recorder.capture(calibration.mask))
    write_shard(work.layer_shard(layer, len(opened.layers)), tensors)
    return record, outputs


def _on_disk(opened: OpenModel, smaller: Smaller, changed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters as tensors of the checkpoint, in the dtype and under the names that it has them."""
    entries = opened.checkpoint.entries
    named = stored_names(opened.loader, smaller.model, changed)
    if unknown := sorted(named.keys() - entries.keys()):
        raise UserError(f"The checkpoint has no tensor {unknown[0]}", expected="the names that transformers saves this family with",
                        remedy="load the model with transformers and save_pretrained it first")  # fmt: skip
    return {name: tensor.to(entries[name].dtype) for name, tensor in named.items()}


def _replace_layer(opened: OpenModel, smaller: Smaller, layer: int, changed: dict[str, torch.Tensor]) -> None:
    """Put the smaller skeleton's layer, with weights, in the place of the loaded one."""
    old, new = opened.layers[layer], smaller.model.get_submodule(f"{opened.anatomy.stack}.{layer}")
    prefix = f"{opened.anatomy.stack}.{layer}."
    for name, tensor in old.state_dict().items():
        put(new, name, changed.get(prefix + name, tensor))
    release(old)
    opened.model.get_submodule(opened.anatomy.stack)[layer] = new


def _fates(opened: OpenModel, smaller: Smaller, fate: str) -> dict[str, dict[str, Any]]:
    """Input tensor -> role and fate: kept bit for bit, ``fate`` (see the record of its layer), or left out."""
    return {
        info.name: {
            "role": info.role,
            "bytes": info.nbytes,
            "fate": LEFT_OUT if info.role == IGNORED else fate if info.target in smaller.axes else "kept",
        }
        for info in opened.anatomy.tensors
    }
