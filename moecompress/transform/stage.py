"""The walk that drops or merges experts: layer by layer, each decided on what the changed layers before it deliver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moecompress.calibrate.capture import recording
from moecompress.calibrate.observe import Calibration, seam_on
from moecompress.compress import Work, capture_layer, write_rest
from moecompress.errors import UserError
from moecompress.model.anatomy import IGNORED, MoELayer
from moecompress.model.checkpoint import write_index, write_shard
from moecompress.model.skeleton import release, stored_names
from moecompress.model.walk import OpenModel, Walk
from moecompress.pack.manifest import LEFT_OUT
from moecompress.progress import track
from moecompress.transform.methods import METHODS, Scene
from moecompress.transform.outputs import Given, canonical, stored
from moecompress.transform.regroup import Regrouping, apply
from moecompress.transform.shrink import Smaller, experts_of, groups_of, refuse_count, shrink


@dataclass(frozen=True)
class Request:
    """method: a name of METHODS. count: experts that every layer keeps. protected: (layer, expert) that must stay."""

    method: str
    count: int
    protected: tuple[tuple[int, int], ...] = ()
    seed: int = 0

    @staticmethod
    def of(opened: OpenModel, method: str, keep: float, protected: tuple[tuple[int, int], ...] = (), seed: int = 0) -> Request:
        """keep: a share of the experts below 1, or a number of them. Raises UserError where that cannot be done."""
        experts, groups = experts_of(opened), groups_of(opened)
        # A share is rounded to what the groups of the router allow.
        count = groups * round(keep * experts / groups) if keep < 1 else int(keep)
        refuse_count(opened, count)
        for layer, expert in protected:
            if layer not in opened.anatomy.moe or not 0 <= expert < experts:
                raise UserError(f"There is no expert L{layer:02d}.E{expert:03d} to protect",
                                expected=f"layers {min(opened.anatomy.moe)} to {max(opened.anatomy.moe)}, experts 0 to {experts - 1}")  # fmt: skip
        request = Request(method, count, protected, seed)
        for layer in opened.anatomy.moe:
            own = request.protected_in(layer)
            fullest = max((sum(e * groups // experts == g for e in own) for g in range(groups)), default=0)
            if fullest > count // groups:
                raise UserError(f"Layer {layer} protects more experts than it keeps", expected=f"at most {count // groups}"
                                + (" a group" if groups > 1 else ""), got=fullest, remedy="keep more, or protect fewer")  # fmt: skip
        return request

    def protected_in(self, layer: int) -> list[int]:
        return sorted({expert for where, expert in self.protected if where == layer})


@torch.no_grad()
def transform(opened: OpenModel, calibration: Calibration, request: Request, work: Work,
              trust_remote_code: bool = False) -> dict[str, Any]:  # fmt: skip
    """Write a whole checkpoint with fewer experts to ``work.shards``; returns what became of every expert and tensor.

    Finished layers are kept in ``work`` and not done again. ``experts``: of each layer, which are ``kept``, the ``target`` of
    every old one, the ``tokens`` that chose it, and ``output_error``, how far what the experts give is from before.
    """
    work.make()
    smaller = shrink(opened, request.count, work.shards, trust_remote_code)
    seam_on(opened)
    # Layers that the model ignores (multi-token prediction) have the old number of experts.
    write_rest(opened, work, leave_out=IGNORED)
    total = len(opened.layers)
    if not work.complete(total):
        with Walk(opened, calibration.batches) as walk:
            start = walk.restore(work.state)
            for layer in track(walk.layers(start), request.method, total - start):
                record, outputs = _transform_layer(walk, smaller, layer, calibration, request, work)
                work.keep_record(layer, record)
                if layer < total - 1:
                    walk.hand_on(outputs, work.state)
    write_index(work.shards, sorted(work.shards.glob("model-*.safetensors")))
    return {
        "config_keys": smaller.keys,
        "experts": {str(layer): record for layer, record in enumerate(work.records(total)) if record},
        "tensors": _fates(opened, smaller),
    }


def _transform_layer(walk: Walk, smaller: Smaller, layer: int, calibration: Calibration, request: Request,
                     work: Work) -> tuple[dict[str, Any], list[Any]]:  # fmt: skip
    """Decide, write the layer's shard, and run the smaller layer: the map of its experts, and its outputs."""
    opened = walk.opened
    tensors = {
        info.name: opened.checkpoint.read(info.name)
        for info in opened.anatomy.of_layer(layer)
        if info.target not in smaller.axes
    }
    moe = opened.anatomy.moe.get(layer)
    if moe is None:
        record, outputs = {}, _run(walk)
    else:
        capture = capture_layer(walk, moe, calibration)
        module = opened.model.get_submodule(moe.module)
        biases = [t.flatten() for t in _of_layer(opened, smaller, layer).values() if t.numel() == moe.layout.experts]
        scene = Scene(module, moe.layout, capture, request.count, request.protected_in(layer), biases, groups_of(opened),
                      request.seed + layer, calibration.workspace_bytes)  # fmt: skip
        regrouping = METHODS[request.method](scene)
        before = Given(module, capture)
        changed = regrouped(opened, smaller, moe, regrouping)
        tensors |= _on_disk(opened, smaller, changed)
        _replace_layer(opened, smaller, layer, changed)
        record = {"kept": regrouping.keep.tolist(), "target": regrouping.target.tolist(),
                  "tokens": scene.routed.counts.tolist()}  # fmt: skip
        del scene, capture
        module = opened.model.get_submodule(moe.module)
        with recording(opened.model.get_submodule(moe.module.rpartition(".")[0]), module) as recorder:
            outputs = _run(walk)
        record["output_error"] = before.error(module, recorder.capture(calibration.mask))
    write_shard(work.layer_shard(layer, len(opened.layers)), tensors)
    return record, outputs


def _run(walk: Walk) -> list[Any]:
    return [walk.run(lane) for lane in range(len(walk.waiting))]


def _of_layer(opened: OpenModel, smaller: Smaller, layer: int) -> dict[str, torch.Tensor]:
    """The loaded tensors of a layer that have one slice an expert."""
    prefix = f"{opened.anatomy.stack}.{layer}."
    state = opened.layers[layer].state_dict(prefix=prefix)
    return {name: state[name] for name in smaller.axes if name.startswith(prefix)}


def regrouped(opened: OpenModel, smaller: Smaller, moe: MoELayer, regrouping: Regrouping) -> dict[str, torch.Tensor]:
    """The layer's tensors that change, by parameter: merged experts, and the kept experts' slices of everything else."""
    found = _of_layer(opened, smaller, moe.layer)
    result = {name: tensor.index_select(smaller.axes[name], regrouping.keep) for name, tensor in found.items()
              if not name.startswith(moe.module + ".")}  # fmt: skip
    new = stored(apply(regrouping, canonical(opened.model.get_submodule(moe.module), moe.layout)), moe.layout)
    result |= {f"{moe.module}.{name}": tensor for name, tensor in new.items()}
    if missed := sorted(found.keys() - result.keys()):
        raise UserError(f"{missed[0]} is a part of experts that moecompress does not know", expected="matrices and biases",
                        remedy="this architecture is not supported yet")  # fmt: skip
    return result


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
        tensor = changed.get(prefix + name, tensor)
        where, _, leaf = name.rpartition(".")
        module = new.get_submodule(where)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    release(old)
    opened.model.get_submodule(opened.anatomy.stack)[layer] = new


def _fates(opened: OpenModel, smaller: Smaller) -> dict[str, dict[str, Any]]:
    """Input tensor -> role and fate: kept bit for bit, regrouped (see the map of its layer's experts), or left out."""
    return {
        info.name: {
            "role": info.role,
            "bytes": info.nbytes,
            "fate": LEFT_OUT if info.role == IGNORED else "regrouped" if info.target in smaller.axes else "kept",
        }
        for info in opened.anatomy.tensors
    }
