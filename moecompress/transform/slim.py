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
from moecompress.quantize.hessian import factor
from moecompress.transform import gradient
from moecompress.transform.outputs import canonical, stored
from moecompress.transform.regroup import NEURON_AXIS
from moecompress.transform.rewrite import Site, rewrite
from moecompress.transform.shrink import WIDTH, size_of

SCORES = ("greedy", "activation", "slimmoe", "random")
#: At most so often does `greedy` look for the next neurons to leave out. With 64 looks its error is within 1 % of one look a
#: neuron, and the time for wide experts is that of a few products of their Hessians.
STEPS = 64


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


# --- one chunk of experts: functions on tensors -----------------------------------------------------------------------


def activation(down: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """[n, m]: what leaving out one neuron c alone adds to the squared error of an expert's output, E[a_c²] · ‖down[:, c]‖².

    down: [n, d, m]. inner: [n, m, m] second moments of what enters down, weighted by the squared combine weight.
    """
    return inner.diagonal(dim1=-2, dim2=-1) * down.square().sum(1)


def best(values: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` neurons with the highest values [n, m] of each expert, ascending: int64 [n, count]. Of equals, the first."""
    return values.double().sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


def greedy(down: torch.Tensor, inner: torch.Tensor, count: int, damping: float, names: list[str], steps: int = STEPS) -> torch.Tensor:
    """Neurons to keep, ascending: int64 [n, count]. Backward: again and again the neuron goes whose absence costs least once
    the others are refitted (optimal brain surgeon, Hassibi and Stork 1993, on the columns of down).

    With H⁻¹ and D of the neurons that are left, that cost is ‖D[:, c]‖² / (H⁻¹)_cc. Of D only DᵀD is needed. Above ``steps``
    neurons to leave out, several go at a time. Arguments as of `repaired`; the ridge is that of all neurons.
    """
    upper, _ = factor(inner, damping, names)
    inverse, gram = upper.transpose(1, 2) @ upper, down.transpose(1, 2) @ down  # (n, m, m)
    width = down.shape[-1]
    alive = torch.ones(len(down), width, dtype=torch.bool)
    least = torch.finfo(torch.float32).tiny
    while (left := int(alive[0].sum()) - count) > 0:
        cost = gram.diagonal(dim1=1, dim2=2).clamp_min(0) / inverse.diagonal(dim1=1, dim2=2).clamp_min(least)
        gone = cost.masked_fill(~alive, torch.inf).topk(min(left, -(-(width - count) // steps)), largest=False).indices
        columns, effect = _take(inverse, gone, 2), _take(gram, gone, 2)  # (n, m, b)
        refit = torch.linalg.solve(_take(columns, gone, 1), columns.transpose(1, 2))  # (n, b, m)
        half = (effect - refit.transpose(1, 2) @ _take(effect, gone, 1) / 2) @ refit
        gram -= half + half.transpose(1, 2)
        inverse -= columns @ refit
        alive.scatter_(1, gone, False)
    return alive.nonzero()[:, 1].view(len(down), count)


def sliced(weights: Mapping[str, torch.Tensor], keep: torch.Tensor) -> dict[str, torch.Tensor]:
    """Canonical tensors [n, ...] with only the neurons ``keep`` [n, count] of each expert."""
    return {name: _take(tensor, keep, NEURON_AXIS[name]) if name in NEURON_AXIS else tensor.clone()
            for name, tensor in weights.items()}  # fmt: skip


def repaired(down: torch.Tensor, inner: torch.Tensor, keep: torch.Tensor, damping: float, names: list[str]) -> torch.Tensor:
    """down [n, d, count] of the kept neurons that comes nearest to what all neurons gave: float32.

    Ridge regression of the lost part on the kept activations: D[:, keep] + D[:, gone] H[gone, keep] (H[keep, keep] + λI)⁻¹
    with λ = damping · mean diag H. It minimises the expected squared error of the output plus λ times the squared change, so
    where the data say nothing, down stays as it is. Arguments as of `activation`; names: of the experts, for errors.
    """
    gone = complement(keep, down.shape[-1])
    cross = _take(_take(inner, gone, 1), keep, 2)  # (n, m - count, count)
    upper, _ = factor(_take(_take(inner, keep, 1), keep, 2), damping, names)
    lost = _take(down, gone, 2) @ cross @ upper.transpose(1, 2) @ upper
    return _take(down, keep, 2) + lost


def error(down: torch.Tensor, new: torch.Tensor, inner: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """[n]: squared error of the experts' outputs, relative to their squared size. new: [n, d, count]; others as of `repaired`."""
    change = down.scatter_add(2, keep[:, None].expand_as(new), -new)
    size = ((down @ inner) * down).sum((1, 2))
    return ((change @ inner) * change).sum((1, 2)) / size.clamp_min(torch.finfo(torch.float32).tiny)


def complement(keep: torch.Tensor, width: int) -> torch.Tensor:
    """The neurons that are not in ``keep`` [n, count], ascending: int64 [n, width - count]."""
    gone = torch.ones(len(keep), width, dtype=torch.bool).scatter(1, keep, False)
    return gone.nonzero()[:, 1].view(len(keep), width - keep.shape[1])


def _take(tensor: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    """``tensor`` [n, ...] with the entries ``index`` [n, count] of ``axis``, other ones for each expert."""
    shape = [1] * tensor.ndim
    shape[0], shape[axis] = index.shape
    wanted = list(tensor.shape)
    wanted[axis] = index.shape[1]
    return tensor.gather(axis, index.view(shape).expand(wanted))


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
