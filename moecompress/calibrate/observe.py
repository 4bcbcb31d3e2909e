"""The calibration walk: one pass of the original model that measures routing, harm and sensitivity of every layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from moecompress.calibrate.bases import layer_directions, of_every_expert
from moecompress.calibrate.capture import Capture, recording, route
from moecompress.calibrate.moments import ExpertMoments, chunk_size, expert_moments
from moecompress.calibrate.prediction import TRIED, correction, sampled, tried, tried_layers
from moecompress.calibrate.statistics import LayerStatistics, Statistics, Thinning, gate_mass, narrowing_of, thinning_of
from moecompress.calibrate.thinner import thinned, widths_of
from moecompress.model.anatomy import MoELayer
from moecompress.model.checkpoint import write_shard, write_text
from moecompress.model.experts import ExpertsLayout, projections
from moecompress.model.skeleton import bfloat16_products
from moecompress.model.walk import OpenModel, Walk
from moecompress.pack.scheme import Scheme
from moecompress.progress import track
from moecompress.quantize.encode import Inputs, Settings, expected_error, study
from moecompress.quantize.gptq import rtn, values
from moecompress.quantize.grid import fit
from moecompress.runtime import seam

#: What a layer's experts are replaced by when its sensitivity is measured: strong enough to rise above rounding noise of
#: the forward pass, weak enough for KL to stay proportional to squared error.
PROBE = Scheme(3, 64)


@dataclass(frozen=True)
class Calibration:
    """Token ids [N, L] cut into micro-batches, the mask of tokens that count, and how Hessians are made."""

    ids: torch.Tensor
    mask: torch.Tensor
    micro_batch: int
    hessian: str
    shrink: float
    workspace_bytes: int
    text: str = ""

    @property
    def batches(self) -> list[torch.Tensor]:
        return list(self.ids.split(self.micro_batch))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.ids.numpy().tobytes())
        digest.update(self.mask.numpy().tobytes())
        digest.update(json.dumps([self.micro_batch, self.hessian, self.shrink]).encode())
        return digest.hexdigest()


#: Measures what leaving experts out of a layer does, where that is wanted (transform/shed.py).
Thin = Callable[[OpenModel, MoELayer, Capture], Thinning]


@torch.no_grad()
def observe(opened: OpenModel, calibration: Calibration, schemes: list[Scheme], settings: Settings, work: Path,
            thin: Thin | None = None, narrow: bool = False) -> Statistics:  # fmt: skip
    """Statistics of every MoE layer. ``work`` holds finished layers, so that a killed run goes on behind them. ``narrow``: also
    of thinner experts."""
    work.mkdir(parents=True, exist_ok=True)
    moe = opened.anatomy.moe
    sources = calibration.batches
    # Each layer's probe perturbs a copy of the first sequences of a micro-batch; all probes together add about half a pass.
    probes = {layer: index % len(sources) for index, layer in enumerate(sorted(moe))}
    lanes = {layer: len(sources) + index for index, layer in enumerate(sorted(moe))}
    size = max(1, min(calibration.micro_batch, len(calibration.ids) // len(moe)))
    tries = tried_layers(moe)
    seam_on(opened)
    with bfloat16_products(opened.stored_dtype), Walk(opened, [*sources, *(sources[lane][:size] for lane in probes.values())]) as walk:
        start = walk.restore(work)
        alone = walk.resumable()  # else layers also hand on keys or the like, so every lane must run them itself
        energy: dict[int, float] = {int(k): v for k, v in _read(work / "energy.json").items()}
        for layer in track(walk.layers(start), "calibrate", len(opened.layers) - start):
            outputs: list[Any] = [None] * len(walk.waiting)
            if layer in moe:
                capture, clean = _capture(walk, moe[layer], calibration, outputs, probes[layer])
                statistics = _measure(walk.opened, moe[layer], capture, calibration, schemes, settings, TRIED if layer in tries else 0, narrow)
                if thin is not None:
                    found = vars(thin(walk.opened, moe[layer], capture))
                    statistics |= {f"thinning.{name}": tensor for name, tensor in found.items()}
                clean = clean[: walk.batches[lanes[layer]].numel()]
                write_shard(work / f"layer-{layer:04d}.safetensors", statistics)
            else:
                for lane in range(len(sources)):
                    outputs[lane] = walk.run(lane)
            shared = {source: first(outputs[source], size) for source in set(probes.values())}
            for probed, lane in lanes.items():
                if probed > layer and alone:  # not perturbed yet: the same values as its source
                    outputs[lane] = shared[probes[probed]]
                elif probed != layer:
                    outputs[lane] = walk.run(lane)
            if layer in moe:  # at the end, since it spoils the weights
                outputs[lanes[layer]], energy[layer] = _perturb(walk, moe[layer], lanes[layer], clean)
            last = layer == len(opened.layers) - 1
            if not last:
                write_text(work / "energy.json", json.dumps(energy))
                walk.hand_on(outputs, work)
            else:
                divergence = _divergences(walk, outputs, probes, lanes)
    layers, tokens = {}, int(calibration.mask.sum())
    saved_layers = {layer: load_file(work / f"layer-{layer:04d}.safetensors") for layer in sorted(moe)}
    factors = correction([saved.pop("tried") for saved in saved_layers.values()])
    for layer, saved in saved_layers.items():
        for name in saved.keys() & {"harm", "narrowing.harm"}:
            saved[name] *= factors
        plain = {name: tensor for name, tensor in saved.items() if "." not in name}
        layers[layer] = LayerStatistics(**plain, tokens=tokens, sensitivity=divergence[layer] / max(energy[layer], 1e-30),
                                        thinning=thinning_of(saved), narrowing=narrowing_of(saved))  # fmt: skip
    layers = _smooth(layers)
    return Statistics([s.name for s in schemes], list(moe[min(moe)].layout.projections), layers,
                      calibration.fingerprint(), calibration.text)  # fmt: skip


def first(output: Any, count: int) -> Any:
    """The first sequences of a layer's output (a tensor, or a tuple of tensors and None)."""
    if isinstance(output, tuple):
        return tuple(None if part is None else first(part, count) for part in output)
    return output if len(output) <= count else output[:count].clone()


def seam_on(opened: OpenModel) -> None:
    """Route every experts module of the skeleton through our implementation, which can show what it is given."""
    seam.register()
    for layer in opened.anatomy.moe.values():
        opened.model.get_submodule(layer.module).config._experts_implementation = seam.NAME


def _capture(walk: Walk, moe: MoELayer, calibration: Calibration, outputs: list[Any], watched: int
             ) -> tuple[Capture, torch.Tensor]:  # fmt: skip
    """Run a layer on all calibration batches; also returns the experts' output on the ``watched`` one."""
    experts = walk.opened.model.get_submodule(moe.module)
    block = walk.opened.model.get_submodule(moe.module.rpartition(".")[0])
    clean = None
    with recording(block, experts) as recorder:
        for lane in range(len(calibration.batches)):
            with expert_outputs(experts) as seen:
                outputs[lane] = walk.run(lane)
            if lane == watched:
                clean = torch.cat(seen)
    assert clean is not None
    return recorder.capture(calibration.mask), clean


def _measure(opened: OpenModel, moe: MoELayer, capture: Capture, calibration: Calibration, schemes: list[Scheme],
             settings: Settings, trials: int, narrow: bool = False) -> dict[str, torch.Tensor]:  # fmt: skip
    """Statistics of a layer. ``trials``: experts whose predicted errors are compared with measured ones. ``narrow``: see `observe`."""
    layout, experts = moe.layout, opened.model.get_submodule(moe.module)
    routed = route(capture, layout.experts)
    gate_sum, gate_square = routed.sums(routed.gate), routed.sums(routed.gate.double().square())
    harm = torch.zeros(layout.experts, len(layout.projections), len(schemes), dtype=torch.float64)
    chosen, ratios = sampled(routed, trials), [harm.new_zeros(0, *harm.shape[1:])]
    widths = widths_of(layout) if narrow else []
    lost, thin_harm = harm.new_zeros(layout.experts, len(widths)), harm.new_zeros(layout.experts, len(widths), *harm.shape[1:])
    chunk = chunk_size(layout, calibration.workspace_bytes)
    bases = layer_directions(experts, layout, capture, calibration.hessian, calibration.shrink, chunk, of_every_expert(layout, schemes),
                             settings.damping)  # fmt: skip
    for moments in expert_moments(experts, layout, capture, calibration.hessian, calibration.shrink, chunk, sensitivity=True):
        names = [f"{moe.module}.{e}" for e in moments.experts]
        # An expert without a usable Hessian is an error when it is compressed; here its prediction is merely worse.
        forgiving = replace(settings, allow_fallback=True)
        inputs = {name: study(h, names, forgiving, schemes) for name, h in moments.hessians.items()}
        mass = gate_mass(gate_square)[moments.experts]
        expected = _expected(moments, inputs, schemes, settings, bases)
        for p, name in enumerate(layout.projections):
            harm[moments.experts, p] = expected[name] * mass[:, None]
        for w, (thin, loss) in enumerate(thinned(moments, widths, settings.damping, moe.module, True) if widths else []):
            lost[moments.experts, w] = loss * mass
            theirs = _expected(thin, inputs | {"inner": study(thin.hessians["inner"], names, forgiving, schemes)}, schemes, settings, {})
            for p, name in enumerate(layout.projections):
                thin_harm[moments.experts, w, p] = theirs[name] * mass[:, None]
        for position in [i for i, expert in enumerate(moments.experts) if expert in chosen]:
            ratios.append(tried(experts, layout, moments, position, inputs, capture.hidden, routed, expected, schemes, settings, bases))
    narrowing = {"narrowing.widths": torch.tensor(widths, dtype=torch.int64), "narrowing.error": lost, "narrowing.harm": thin_harm} if narrow else {}
    return {"counts": routed.counts, "gate_sum": gate_sum, "gate_square": gate_square, "harm": harm, "tried": torch.cat(ratios)} | narrowing


def _expected(moments: ExpertMoments, inputs: Mapping[str, Inputs], schemes: list[Scheme], settings: Settings,
              bases: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # fmt: skip
    """Projection -> [n, C] expected errors of rounding."""
    return {name: expected_error(weights, inputs[moments.source(name)], moments.row_weight[name], schemes, settings, bases.get(name))
            for name, weights in moments.weights.items()}  # fmt: skip


def _perturb(walk: Walk, moe: MoELayer, lane: int, clean: torch.Tensor) -> tuple[Any, float]:
    """Run a layer with coarsely rounded experts; returns its output and the squared error of the experts' output."""
    experts = walk.opened.model.get_submodule(moe.module)
    round_in_place(experts, moe.layout)
    with expert_outputs(experts) as seen:
        output = walk.run(lane)
    return output, float((torch.cat(seen).double() - clean.double()).square().sum())


def round_in_place(experts: nn.Module, layout: ExpertsLayout) -> None:
    """Round the experts' weights to nearest in the PROBE scheme. In place: a copy would be a second layer in memory."""
    for stored in projections(experts, layout).values():
        for expert in range(layout.experts):
            one = stored[expert : expert + 1].float()
            grid = fit(one, torch.ones(1, one.shape[-1]), int(PROBE.bits), PROBE.group, PROBE.symmetric)
            stored[expert] = values(rtn(one, grid), grid)[0].to(stored.dtype)


@contextmanager
def expert_outputs(experts: nn.Module) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    hook = experts.register_forward_hook(lambda _m, _i, output: seen.append(output.detach().reshape(-1, output.shape[-1])))
    try:
        yield seen
    finally:
        hook.remove()


def _divergences(walk: Walk, outputs: list[Any], probes: dict[int, int], lanes: dict[int, int]) -> dict[int, float]:
    """KL(clean ‖ perturbed), summed over tokens, for the probe of every layer."""
    result = {}
    for source in sorted(set(probes.values())):
        reference = F.log_softmax(walk.logits(source, outputs[source]).float(), dim=-1)
        for layer in (layer for layer, lane in probes.items() if lane == source):
            other = F.log_softmax(walk.logits(lanes[layer], outputs[lanes[layer]]).float(), dim=-1)
            divergence = F.kl_div(other, reference[: len(other)], log_target=True, reduction="sum")
            result[layer] = float(divergence.double().clamp_min(0))
    return result


def _smooth(layers: dict[int, LayerStatistics]) -> dict[int, LayerStatistics]:
    """Sensitivities are measured on a few sequences each: average their logarithms over neighbouring layers (1-2-1)."""
    order = sorted(layers)
    logs = torch.tensor([layers[i].sensitivity for i in order], dtype=torch.float64).clamp_min(1e-30).log()
    padded = torch.cat([logs[:1], logs, logs[-1:]])
    smooth = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return {i: replace(layers[i], sensitivity=float(value.exp())) for i, value in zip(order, smooth, strict=True)}


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}
