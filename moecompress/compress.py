"""The compression walk: layer by layer, calibrate on what the compressed layers before deliver, round, pack, write."""

from __future__ import annotations

import json
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moecompress.calibrate.capture import Capture, Enough, recording
from moecompress.calibrate.merging import merge
from moecompress.calibrate.observe import Calibration, seam_on
from moecompress.calibrate.original import Original
from moecompress.model.anatomy import ATTENTION, DENSE, SHARED, MoELayer, TensorInfo
from moecompress.model.checkpoint import read_header, write_shard, write_text
from moecompress.model.experts import layout_of
from moecompress.model.skeleton import bfloat16_products
from moecompress.model.walk import OpenModel, Walk
from moecompress.pack.scheme import DROPPED, Scheme
from moecompress.progress import track
from moecompress.quantize.encode import Settings, encode
from moecompress.rounding import ExpertRounding, Shared
from moecompress.runtime.graft import keep_only, sprout
from moecompress.runtime.packed import PackedLinear

#: Group size of attention, shared-expert and dense matrices at 8 and 4 bits.
LINEAR_GROUP = 128
#: Shards outside the decoder layers are cut at this size.
REST_SHARD_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Work:
    """What one compression run writes: ``shards`` end up in the output, ``state`` is for resuming only."""

    shards: Path
    state: Path

    def make(self) -> None:
        self.shards.mkdir(parents=True, exist_ok=True)
        self.state.mkdir(parents=True, exist_ok=True)

    def layer_shard(self, layer: int, layers: int) -> Path:
        return self.shards / f"model-layer-{layer:05d}-of-{layers:05d}.safetensors"

    def keep_record(self, layer: int, record: dict[str, Any]) -> None:
        """What was done with a layer; it is finished then."""
        write_text(self._record(layer), json.dumps(record))

    def records(self, layers: int) -> list[dict[str, Any]]:
        return [json.loads(self._record(layer).read_text()) for layer in range(layers)]

    def complete(self, layers: int) -> bool:
        return all(self._record(layer).exists() for layer in range(layers))

    def _record(self, layer: int) -> Path:
        return self.state / f"record-{layer:04d}.json"


def linear_schemes(opened: OpenModel, bits: dict[str, int]) -> dict[str, Scheme]:
    """Linear layer -> scheme, for the layers that are quantized at all. ``bits``: role -> 4, 8 or 16."""
    return {
        name: Scheme(bits[role], LINEAR_GROUP).fitted(opened.model.get_submodule(name).in_features)
        for name, role in opened.anatomy.linears.items()
        if bits.get(role, 16) < 16
    }


def role_bits(attention: int, shared: int, dense: int) -> dict[str, int]:
    return {ATTENTION: attention, SHARED: shared, DENSE: dense}


@torch.no_grad()
def compress(opened: OpenModel, calibration: Calibration, plan: dict[int, dict[str, list[Scheme]]],
             linears: dict[str, Scheme], settings: Settings, work: Work, label: str = "quantize",
             keys: list[str] | None = None, shared: dict[int, Shared] | None = None, original: OpenModel | None = None
             ) -> dict[str, Any]:  # fmt: skip
    """Write every shard of the compressed model. Returns what was done, for the manifest.

    plan: layer -> projection -> scheme of each expert. keys: where it leaves experts out, the entries of the model's config
    that say how many there are. shared: layers whose router stays as it is, and in which others serve for experts that are
    left out. original: the same checkpoint opened once more; with it experts are rounded towards what they gave in the original
    model (quantize/cross.py). Finished layers are kept in ``work`` and not done again.
    """
    shared = shared or {}
    kept = {layer: kept_experts(schemes) for layer, schemes in plan.items()
            if layer not in shared and any(DROPPED in s for s in schemes.values())}  # fmt: skip
    smaller = {count: sprout(opened.model, keys or [], count) for count in {len(experts) for experts in kept.values()}}
    work.make()
    seam_on(opened)
    total = len(opened.layers)
    write_rest(opened, work)
    if not work.complete(total):
        with ExitStack() as stack:
            stack.enter_context(bfloat16_products(opened.stored_dtype))
            beside = None if original is None else stack.enter_context(Original(original, calibration, work.state / "original"))
            walk = stack.enter_context(Walk(opened, calibration.batches))
            start = walk.restore(work.state)
            if beside is not None:
                beside.restore(start)
            for layer in track(walk.layers(start, None if beside is None else beside.look), label, total - start):
                again = layer < total - 1  # the layer's outputs are needed once it is compressed
                sliced = {}
                if layer in kept:
                    source, experts = smaller[len(kept[layer])], torch.tensor(kept[layer])
                    sliced = keep_only(opened.model, opened.anatomy.moe[layer].module, source, experts)
                if layer in shared:
                    sliced = share_biases(opened, opened.anatomy.moe[layer], shared[layer])
                with _remembering(walk, layer) if again and layer in plan else nullcontext():
                    record = _compress_layer(walk, layer, calibration, plan.get(layer), linears, settings,
                                             work.layer_shard(layer, total), kept.get(layer), sliced, shared.get(layer),
                                             None if beside is None else beside.hidden)  # fmt: skip
                    record["changed"] = sorted(sliced)
                    work.keep_record(layer, record)
                    outputs = walk.run_all() if again else []
                if again:
                    walk.hand_on(outputs, work.state)
                    if beside is not None:
                        beside.keep()
    merged = _nothing_done()
    for record in work.records(total):
        _add(merged, record)
    return merged | {"kept": kept}


def _nothing_done() -> dict[str, Any]:
    """The record of a layer, or of all of them, before anything was done: by name of what it is about, and lists of names."""
    return {"errors": {}, "measured": {}, "schemes": {}, "contents": {}, "archived": {}, "fallbacks": [], "changed": []}


def _add(record: dict[str, Any], more: dict[str, Any]) -> None:
    for key, found in more.items():
        if isinstance(found, list):
            record[key] += found
        else:
            record[key] |= found


def share_biases(opened: OpenModel, moe: MoELayer, shared: Shared) -> dict[str, torch.Tensor]:
    """Biases of experts become those of the experts that serve for them, for tools that take every expert for itself (the
    dense export). Returns them by parameter."""
    module = opened.model.get_submodule(moe.module)
    names = {f"{moe.module}.{name}" for name in layout_of(module).parameters}
    changed = {}
    for name, tensor in module.state_dict(prefix=moe.module + ".").items():
        if name not in names and len(tensor) == len(shared.into):
            tensor = tensor[shared.into.clamp_min(0)]
            changed[name] = tensor * shared.factor[:, None].to(tensor.dtype) if "down" in name else tensor
    return changed


def kept_experts(schemes: dict[str, list[Scheme]]) -> list[int]:
    """The experts of a layer that a plan does not leave out."""
    return [expert for expert, scheme in enumerate(next(iter(schemes.values()))) if scheme != DROPPED]


def _remembering(walk: Walk, layer: int):
    return walk.remembering(walk.opened.model.get_submodule(walk.opened.anatomy.moe[layer].module))


def _compress_layer(walk: Walk, layer: int, calibration: Calibration, schemes: dict[str, list[Scheme]] | None,
                    linears: dict[str, Scheme], settings: Settings, shard: Path, kept: list[int] | None,
                    sliced: dict[str, torch.Tensor], shared: Shared | None = None, before: torch.Tensor | None = None
                    ) -> dict[str, Any]:  # fmt: skip
    """``kept``: the experts that the router knows, None: all; ``sliced``: tensors that changed with the experts, by parameter;
    ``before``: [T, d], what the experts are given in the original model."""
    opened = walk.opened
    record = _nothing_done()
    tensors: dict[str, torch.Tensor] = {}
    replaced: set[str] = set()
    prefix = opened.anatomy.layer_names[layer] + "."
    for name in [n for n in linears if n.startswith(prefix)]:
        tensors.update(_pack_linear(opened, name, linears[name], record))
        replaced.add(name + ".weight")
    if schemes is not None:
        moe = opened.anatomy.moe[layer]
        moe = replace(moe, layout=layout_of(opened.model.get_submodule(moe.module)))
        capture = capture_layer(walk, moe, calibration)
        numbers = kept or list(range(moe.layout.experts))
        left = {p: [every[e] for e in numbers] for p, every in schemes.items()}
        if shared is not None:
            if shared.merged:  # while all experts, and the tokens of each, are at hand
                merge(opened.model.get_submodule(moe.module), moe.layout, capture, shared.into, shared.factor)
            capture = shared.apply(capture)
        rounding = ExpertRounding(opened, moe, capture, left, calibration, settings, numbers, before)
        rounding.round_all()
        tensors.update(rounding.pack(sliced, shared))
        _add(record, rounding.record)
        replaced.update(f"{moe.module}.{name}" for name in moe.layout.parameters)
        if walk.memory is not None:
            _run_experts(walk, moe, capture)
    for info in opened.anatomy.of_layer(layer):
        if info.target not in replaced:
            part = sliced.get(info.target)
            tensors[info.name] = opened.checkpoint.read(info.name) if part is None else part.to(info.dtype)
    write_shard(shard, tensors)
    return record


def _run_experts(walk: Walk, moe: MoELayer, capture: Capture) -> None:
    """The compressed experts on all micro-batches at once: far fewer and larger products than one batch after the other."""
    experts: Any = walk.opened.model.get_submodule(moe.module)
    outputs = experts(capture.hidden, capture.chosen, capture.weights)
    walk.foretell(outputs.split([batch.numel() for batch in walk.batches]))


def capture_layer(walk: Walk, moe: MoELayer, calibration: Calibration) -> Capture:
    """What the experts of the current layer are given on all calibration batches."""
    experts = walk.opened.model.get_submodule(moe.module)
    block = walk.opened.model.get_submodule(moe.module.rpartition(".")[0])
    with recording(block, experts, only=True) as recorder:
        for lane in range(len(calibration.batches)):
            with suppress(Enough):
                walk.run(lane)
    return recorder.capture(calibration.mask)


def _pack_linear(opened: OpenModel, name: str, scheme: Scheme, record: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Round a linear layer to nearest and swap it for a packed one; returns its tensors by name."""
    old = opened.model.get_submodule(name)
    encoded = encode(old.weight[None].float(), None, scheme, Settings(method="rtn"))
    new = PackedLinear(scheme, old.out_features, old.in_features, old.bias is not None, opened.stored_dtype)
    new.bias = old.bias
    for key, value in encoded.bank.tensors().items():
        getattr(new.packed, key).copy_(value)
    parent, _, leaf = name.rpartition(".")
    setattr(opened.model.get_submodule(parent), leaf, new)
    record["schemes"][name] = scheme.name
    record["errors"][name] = float(encoded.error[0])
    return {f"{name}.packed.{key}": value for key, value in encoded.bank.tensors().items()}


def write_rest(opened: OpenModel, work: Work, leave_out: str | None = None) -> None:
    """Copy what is outside the decoder layers, unchanged, a bounded number of bytes at a time. ``leave_out``: a role."""
    for index, batch in enumerate(rest_shards(opened)):
        names = {info.name for info in batch if info.role != leave_out}
        shard = work.shards / f"model-rest-{index:05d}.safetensors"
        if names and not (shard.exists() and set(read_header(shard)) == names):
            write_shard(shard, {name: opened.checkpoint.read(name) for name in names})


def rest_shards(opened: OpenModel) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = []
    room = 0
    for info in opened.anatomy.of_layer(None):
        if info.nbytes > room:
            shards.append([])
            room = REST_SHARD_BYTES
        shards[-1].append(info)
        room -= info.nbytes
    return shards
