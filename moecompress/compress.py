"""The compression walk: layer by layer, calibrate on what the compressed layers before deliver, round, pack, write."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moecompress.calibrate.bases import Users, layer_directions
from moecompress.calibrate.capture import Capture, Enough, recording, route
from moecompress.calibrate.merging import merge
from moecompress.calibrate.moments import chunk_size, entering_down, expert_moments
from moecompress.calibrate.observe import Calibration, seam_on
from moecompress.calibrate.original import Original
from moecompress.calibrate.prediction import WATCHED, decoded, output_errors, sampled
from moecompress.calibrate.thinner import by_width, sorted_bias, widened
from moecompress.model.anatomy import ATTENTION, DENSE, SHARED, MoELayer, TensorInfo
from moecompress.model.checkpoint import read_header, write_shard, write_text
from moecompress.model.experts import DOWN, layout_of
from moecompress.model.memory import forget
from moecompress.model.skeleton import bfloat16_products
from moecompress.model.walk import OpenModel, Walk
from moecompress.pack.scheme import DROPPED, SHARED_BASIS, VECTOR, Scheme
from moecompress.progress import track
from moecompress.quantize import cross, vector
from moecompress.quantize.encode import Inputs, Settings, encode, study
from moecompress.runtime.bank import PackedBank, make_bank
from moecompress.runtime.graft import keep_only, sprout
from moecompress.runtime.packed import PackedLinear, pack_experts_in_place

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
        for key, found in record.items():
            if isinstance(found, list):
                merged[key] += found
            else:
                merged[key] |= found
    return merged | {"kept": kept}


def _nothing_done() -> dict[str, Any]:
    """The record of a layer, or of all of them, before anything was done: by name of what it is about, and lists of names."""
    return {"errors": {}, "measured": {}, "schemes": {}, "contents": {}, "archived": {}, "fallbacks": [], "changed": []}


@dataclass(frozen=True)
class Shared:
    """Whose matrices serve each of a layer's E experts. into: int64 [E], -1: nobody's; factor: float32 [E] of their output.
    merged: are they refitted to serve all?"""

    into: torch.Tensor
    factor: torch.Tensor
    merged: bool = False

    def apply(self, capture: Capture) -> Capture:
        """What the experts that are left are given; E: nobody is."""
        into = torch.where(self.into < 0, len(self.into), self.into)
        weights = capture.weights * self.factor[capture.chosen].to(capture.weights.dtype)
        return replace(capture, chosen=into[capture.chosen], weights=weights)


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
        tensors.update(_pack_experts(opened, moe, capture, left, calibration, settings, record, numbers, sliced, shared, before))
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
    _fill(new.packed, encoded.bank.tensors())
    parent, _, leaf = name.rpartition(".")
    setattr(opened.model.get_submodule(parent), leaf, new)
    record["schemes"][name] = scheme.name
    record["errors"][name] = float(encoded.error[0])
    return {f"{name}.packed.{key}": value for key, value in encoded.bank.tensors().items()}


def _pack_experts(opened: OpenModel, moe: MoELayer, capture: Capture, schemes: dict[str, list[Scheme]],
                  calibration: Calibration, settings: Settings, record: dict[str, Any], numbers: list[int],
                  sliced: dict[str, torch.Tensor], shared: Shared | None = None, before: torch.Tensor | None = None
                  ) -> dict[str, torch.Tensor]:  # fmt: skip
    """Round all experts of a layer and swap the module's weights for banks; returns the banks' tensors by name. ``numbers``:
    of the experts in the input, for the record. ``sliced`` gets biases that moved with the neurons of thinner experts. ``before``:
    as in `_compress_layer`."""
    layout, experts = moe.layout, opened.model.get_submodule(moe.module)
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for projection in layout.projections:
        for expert, scheme in enumerate(schemes[projection]):
            if scheme != DROPPED:
                members[projection, scheme.name].append(expert)
    contents = {
        p: {name: len(found) for (q, name), found in sorted(members.items()) if q == p} for p in layout.projections
    }
    widths = {e: scheme.width for e, scheme in enumerate(schemes[layout.projections[0]]) if scheme.width}
    neurons: dict[int, torch.Tensor] = {}
    filled = _empty_banks(layout, contents, opened.stored_dtype, settings.seed)
    used = [Scheme.parse(name) for name in {name for _, name in members}]
    chunk = chunk_size(layout, calibration.workspace_bytes, before is not None)
    books = _books(opened, moe, capture, schemes, calibration, chunk, settings)
    books |= layer_directions(experts, layout, capture, calibration.hessian, calibration.shrink, chunk, _with_bases(layout, members),
                              settings.damping)  # fmt: skip
    routed = route(capture, layout.experts)
    watched = {e for e in sampled(routed, WATCHED) if schemes[layout.projections[0]][e] != DROPPED}
    weighting = calibration.hessian, calibration.shrink

    def rounded(expert: int, p: str) -> torch.Tensor:
        scheme = schemes[p][expert]
        bank, slot = filled[p, scheme.name], members[p, scheme.name].index(expert)
        one = {name: tensor if name in bank.shared else tensor[slot : slot + 1] for name, tensor in bank.named_buffers()}
        return decoded(scheme, one, layout.shape(p, scheme.width), settings.seed)

    every = expert_moments(experts, layout, capture, *weighting, chunk, original=before)
    for moments in by_width(every, widths, settings.damping, moe.module, settings.allow_fallback):
        if moments.keep is not None:
            neurons |= dict(zip(moments.experts, moments.keep, strict=True))
        experts_here = [f"{moe.module}.{numbers[e]}" for e in moments.experts]
        inputs: dict[str, Inputs] = {}
        targets = dict(moments.weights)
        for projection in layout.projections:
            source = moments.source(projection)
            if before is not None and projection == DOWN:
                new = {p: torch.stack([targets[p][i] if schemes[p][e] == DROPPED else rounded(e, p) for i, e in enumerate(moments.experts)])
                       for p in layout.projections if p != DOWN}  # fmt: skip
                moments = entering_down(experts, layout, capture, moments, new, before, *weighting)
            if source not in inputs:
                inputs[source] = study(moments.hessians[source], experts_here, settings, used)
                if before is not None:
                    mend = cross.mending(moments.hessians[source], moments.drift[source], settings.damping)
            if before is not None:
                targets[projection] = cross.target(moments.weights[projection], mend)
            chosen: dict[Scheme, list[int]] = defaultdict(list)
            for position, expert in enumerate(moments.experts):
                if schemes[projection][expert] != DROPPED:
                    chosen[schemes[projection][expert]].append(position)
            for scheme, positions in chosen.items():
                ids = [moments.experts[i] for i in positions]
                names = [f"{moe.module}.{numbers[e]}.{projection}" for e in ids]
                slots = [members[projection, scheme.name].index(e) for e in ids]
                bank = filled[projection, scheme.name]
                if scheme.bits == 16:
                    targets[projection][positions] = moments.weights[projection][positions]
                    bank.weight[slots] = moments.weights[projection][positions].to(bank.weight.dtype)
                    continue
                book = books.get((projection, scheme.name))
                encoded = encode(targets[projection][positions], inputs[source].take(positions), scheme, settings, book)
                for key, value in encoded.bank.tensors().items():
                    if key in bank.shared:
                        getattr(bank, key).copy_(value)  # the same for every chunk
                    else:
                        _assignable(getattr(bank, key))[slots] = _assignable(value)
                if encoded.archived_bits is not None:
                    record["archived"][f"{moe.module}.{projection}"] = {"scheme": scheme.name, "bits": encoded.archived_bits}
                record["errors"].update({n: float(error) for n, error in zip(names, encoded.error, strict=True)})
        record["fallbacks"] += sorted(
            {experts_here[i] for one in inputs.values() for i in one.fallen.nonzero().flatten().tolist()
             if DROPPED not in (schemes[p][moments.experts[i]] for p in layout.projections)}
        )
        for expert in watched.intersection(moments.experts):
            weights = {p: targets[p][moments.experts.index(expert)] for p in layout.projections}
            new = {p: rounded(expert, p) for p in layout.projections}
            if expert in neurons:
                weights, new = (widened(each, neurons[expert], layout) for each in (weights, new))
            lost = output_errors(experts, layout, expert, capture.hidden, routed, weights, new)
            record["measured"].update({f"{moe.module}.{numbers[expert]}.{p}": error for p, error in lost.items()})
        for name in layout.parameters:
            forget(experts._parameters[name][moments.experts[0] : moments.experts[-1] + 1])
    if neurons and getattr(experts, "has_bias", False):
        served = {} if shared is None else {e: neurons[by] for e, by in enumerate(shared.into.tolist()) if by in neurons}
        bias = "gate_up_proj_bias" if layout.gated else "up_proj_bias"
        own, where = getattr(experts, bias).data, f"{moe.module}.{bias}"
        sliced[where] = sorted_bias(sliced.get(where, own), layout, neurons | served)
        own.copy_(sorted_bias(own, layout, neurons | served))
    packed = pack_experts_in_place(experts, contents, opened.stored_dtype, settings.seed)
    tensors = {f"{moe.module}.down_proj": experts.down_proj.detach()}
    if shared is not None:
        packed.into, packed.share = shared.into.to(torch.int32), shared.factor.float()
        tensors |= {f"{moe.module}.packed.into": packed.into, f"{moe.module}.packed.share": packed.share}
    for (projection, name), found in members.items():
        bank = filled[projection, name]
        bank.register_buffer("experts", torch.tensor(found, dtype=torch.int32))
        packed.banks(projection)[name] = bank
        where = f"{moe.module}.packed.{projection}_banks.{name}"
        tensors.update({f"{where}.{key}": value for key, value in bank.named_buffers()})
    record["contents"][moe.module] = contents
    for projection in layout.projections:
        of_each = zip(numbers, schemes[projection], strict=True)
        record["schemes"].update({f"{moe.module}.{e}.{projection}": s.name for e, s in of_each})
    return tensors


def _books(opened: OpenModel, moe: MoELayer, capture: Capture, schemes: dict[str, list[Scheme]], calibration: Calibration, chunk: int,
           settings: Settings) -> dict[tuple[str, str], torch.Tensor]:  # fmt: skip
    """A book for every bank of vectors, of all experts in it; where there are any, moments are made twice."""
    users = {(projection, scheme): of_experts.count(scheme) for projection, of_experts in schemes.items()
             for scheme in set(of_experts) if scheme.code == VECTOR}  # fmt: skip
    if not users:
        return {}
    experts = opened.model.get_submodule(moe.module)
    samples: dict[tuple[str, Scheme], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    widths = {e: scheme.width for e, scheme in enumerate(next(iter(schemes.values()))) if scheme.width}
    every = expert_moments(experts, moe.layout, capture, calibration.hessian, calibration.shrink, chunk)
    for moments in by_width(every, widths, settings.damping, moe.module, settings.allow_fallback):
        for (projection, scheme), count in users.items():
            here = [i for i, e in enumerate(moments.experts) if schemes[projection][e] == scheme]
            if here:
                diagonal = moments.hessians[moments.source(projection)][here].diagonal(dim1=-2, dim2=-1)
                share = -(-vector.size_of_sample(scheme.bits) * len(here) // count)
                samples[projection, scheme].append(vector.sample(moments.weights[projection][here], diagonal, scheme.bits, share))
    books = {}
    for (projection, scheme), parts in sorted(samples.items(), key=lambda item: (item[0][0], item[0][1].name)):
        mixed = torch.randperm(sum(len(values) for values, _ in parts), generator=torch.Generator().manual_seed(0))
        values, importance = (torch.cat(column)[mixed] for column in zip(*parts, strict=True))
        books[projection, scheme.name] = vector.train(values, importance, scheme.bits)
    return books


def _with_bases(layout, members: dict[tuple[str, str], list[int]]) -> dict[tuple[str, str], Users]:
    """The banks of matrices that share a basis; ``members``: experts by projection and name of the scheme."""
    found = {}
    for (projection, name), experts in members.items():
        if (scheme := Scheme.parse(name)).code == SHARED_BASIS:
            found[projection, name] = Users(projection, experts, scheme.rank(layout.shape(projection)[1]))
    return found


def _empty_banks(layout, contents: dict[str, dict[str, int]], dtype: torch.dtype, seed: int
                 ) -> dict[tuple[str, str], PackedBank]:  # fmt: skip
    banks = {}
    for projection, schemes in contents.items():
        for name, count in schemes.items():
            scheme = Scheme.parse(name)
            rows, cols = layout.shape(projection, scheme.width)
            banks[projection, name] = make_bank(scheme, count, rows, cols, dtype, seed)
    return banks


def _assignable(tensor: torch.Tensor) -> torch.Tensor:
    """torch cannot assign to chosen rows of uint16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.uint16 else tensor


def _fill(bank: PackedBank, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        getattr(bank, name).copy_(tensor)


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
