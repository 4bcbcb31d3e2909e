"""Thinner experts: each keeps its most useful neurons, and its down matrix learns to do without the others.

The neurons of an expert are its inner channels: a row of gate and of up, a column of down, an entry of their biases. All
experts of the model keep the same number, so that the result is an ordinary checkpoint of the same family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file

from moecompress.calibrate.capture import route
from moecompress.calibrate.moments import chunk_size, expert_moments
from moecompress.calibrate.observe import Calibration
from moecompress.compress import Work
from moecompress.errors import UserError
from moecompress.model.checkpoint import write_shard
from moecompress.model.experts import DOWN
from moecompress.model.walk import OpenModel
from moecompress.quantize.neurons import activation, best, error, greedy, repaired, take
from moecompress.transform import gradient
from moecompress.transform.outputs import canonical, stored
from moecompress.transform.regroup import NEURON_AXIS
from moecompress.transform.rewrite import Site, rewrite
from moecompress.transform.shrink import WIDTH, size_of

SCORES = ("greedy", "activation", "slimmoe", "random")


@dataclass(frozen=True)
class Slimming:
    """score: a name of SCORES. count: neurons that every expert keeps. repair: refit down. damping: of the refit's ridge, as
    a share of the mean of the Hessian's diagonal."""

    score: str
    count: int
    repair: bool = True
    damping: float = 0.01
    seed: int = 0

    @staticmethod
    def of(opened: OpenModel, score: str, width: float, repair: bool = True, damping: float = 0.01, seed: int = 0) -> Slimming:
        """width: a share of the neurons below 1, or a number of them. Raises UserError where that cannot be done."""
        if score not in SCORES:
            raise UserError(f"Unknown score {score!r}", expected=", ".join(SCORES))
        if width >= 1 and width != int(width):
            raise UserError(f"Cannot keep {width} neurons", expected="a share below 1, or a whole number")
        whole = size_of(opened, WIDTH)
        count = round(width * whole) if width < 1 else int(width)
        if not 0 < count < whole:
            raise UserError(f"Cannot keep {count} of {whole} neurons", expected=f"1 to {whole - 1}", remedy="choose another --width")
        return Slimming(score, count, repair, damping, seed)


def sliced(weights: Mapping[str, torch.Tensor], keep: torch.Tensor) -> dict[str, torch.Tensor]:
    """Canonical tensors [n, ...] with only the neurons ``keep`` [n, count] of each expert."""
    return {name: take(tensor, keep, NEURON_AXIS[name]) if name in NEURON_AXIS else tensor.clone()
            for name, tensor in weights.items()}  # fmt: skip


# --- the record -----------------------------------------------------------------------------------------------------


def mask_text(keep: torch.Tensor) -> str:
    """The kept neurons [count] of an expert as a hexadecimal number: bit c is set if neuron c is kept."""
    return format(sum(1 << c for c in keep.tolist()), "x")


def kept_neurons(text: str) -> list[int]:
    """The inverse of `mask_text`."""
    number = int(text, 16)
    return [c for c in range(number.bit_length()) if number >> c & 1]


# --- the model ------------------------------------------------------------------------------------------------------


def slim(opened: OpenModel, calibration: Calibration, request: Slimming, work: Work,
         trust_remote_code: bool = False) -> dict[str, Any]:  # fmt: skip
    """Write a whole checkpoint with thinner experts, as `rewrite` does.

    Raises UserError if the score needs gradients and the model does not fit in memory.
    """
    found = _gradients(opened, calibration, work) if request.score == "slimmoe" else {}

    def change(site: Site) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        values = found.get(str(site.moe.layer))
        if request.score == "random":
            seed = torch.Generator().manual_seed(request.seed + site.moe.layer)
            values = torch.rand(site.moe.layout.experts, site.moe.layout.width, generator=seed)
        return thinned(site, request, values)

    return rewrite(opened, calibration, WIDTH, request.count, change, work, "slim", "thinned", trust_remote_code)


def thinned(site: Site, request: Slimming, values: torch.Tensor | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The layer's changed tensors by parameter, and its record. values: scores [E, m] if they were made before."""
    layout, calibration = site.moe.layout, site.calibration
    old = canonical(site.module, layout)
    parts: list[dict[str, torch.Tensor]] = []
    record: dict[str, Any] = {"kept": [], "error": []}
    chunk = chunk_size(layout, calibration.workspace_bytes)
    for moments in expert_moments(site.module, layout, site.capture, calibration.hessian, calibration.shrink, chunk):
        down, inner = moments.weights[DOWN], moments.hessians["inner"]
        names = [f"{site.moe.module}.{e}" for e in moments.experts]
        if request.score == "greedy":
            keep = greedy(down, inner, request.count, request.damping, names)
        else:
            ranked = activation(down, inner)
            if values is not None:
                own = values[moments.experts]
                ranked = torch.where((own > 0).any(1, keepdim=True), own, ranked)  # no token came: gradients say nothing
            keep = best(ranked, request.count)
        part = sliced({name: tensor[moments.experts] for name, tensor in old.items()}, keep)
        if request.repair:
            part[DOWN] = repaired(down, inner, keep, request.damping, names).to(part[DOWN].dtype)
        parts.append(part)
        record["kept"] += [mask_text(one) for one in keep]
        record["error"] += error(down, part[DOWN].float(), inner, keep).tolist()
    record["tokens"] = route(site.capture, layout.experts).counts.tolist()
    new = stored({name: torch.cat([part[name] for part in parts]) for name in old}, layout)
    return {f"{site.moe.module}.{name}": tensor for name, tensor in new.items()}, record


def _gradients(opened: OpenModel, calibration: Calibration, work: Work) -> dict[str, torch.Tensor]:
    """Scores [E, m] of every layer, from gradients; kept in ``work``, so that a killed run need not make them again."""
    work.make()
    path = work.state / "scores.safetensors"
    if not path.exists():
        found = gradient.scores(opened, calibration)
        write_shard(path, {str(layer): values for layer, values in found.items()})
    return load_file(path)
