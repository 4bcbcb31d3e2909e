"""Which experts matter, from squared gradients through the whole model instead of a perturbed forward pass for each layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import nn

from moecompress.calibrate.capture import Capture, Routed, route
from moecompress.calibrate.observe import Calibration, seam_on
from moecompress.calibrate.statistics import LayerStatistics, Statistics, gate_mass
from moecompress.errors import UserError
from moecompress.model.anatomy import IGNORED
from moecompress.model.memory import recomputing
from moecompress.model.skeleton import release
from moecompress.model.walk import OpenModel
from moecompress.progress import track


@torch.enable_grad()
def by_gradient(opened: OpenModel, calibration: Calibration, statistics: Statistics) -> Statistics:
    """``statistics`` with sensitivities of layers and importance of experts by squared gradients.

    With L the cross-entropy of the model to tokens drawn from its own distribution, E[(∂L/∂h)²] is the diagonal of the Fisher
    information: an error δ of the experts' output h raises KL(original ‖ compressed) by about ½ Σ (∂L/∂h)² δ². (GEMQ,
    arXiv:2605.23078, multiplies squared gradients with the measured squared errors of each token; here the expected error of
    an expert is multiplied with the g²-weighted mean of its tokens.)

    Needs the whole model in memory, and what one layer keeps for its backward pass: raises UserError if they do not fit.
    """
    refuse_large(opened, calibration.ids.shape[1])
    totals = {layer: torch.zeros(2, moe.layout.experts, dtype=torch.float64) for layer, moe in opened.anatomy.moe.items()}
    generator = torch.Generator().manual_seed(0)
    with whole(opened), recomputing(opened.layers):
        before = opened.model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_())
        for ids, mask in track(list(zip(calibration.ids.split(1), calibration.mask.split(1), strict=True)), "gradients"):
            for layer, (square, capture) in _squares(opened, ids, mask, generator).items():
                totals[layer] += _by_expert(route(capture, opened.anatomy.moe[layer].layout.experts), square)
        before.remove()
    return replace(statistics, harm="gradient", layers={
        layer: weighed(one, *totals[layer]) for layer, one in statistics.layers.items()
    })  # fmt: skip


def weighed(layer: LayerStatistics, energy: torch.Tensor, mass: torch.Tensor) -> LayerStatistics:
    """energy [E]: Σ g² · mean over channels of (∂L/∂h)², over the tokens of an expert; mass [E]: Σ g².

    The layer's sensitivity is half their mean; an expert's importance is its own mean over the layer's. One that text hardly
    used is pulled to the layer's.
    """
    mean = float(energy.sum() / mass.sum().clamp_min(1e-30))
    own = gate_mass(energy) / gate_mass(mass).clamp_min(1e-30)
    return replace(layer, sensitivity=mean / 2, importance=own / max(mean, 1e-30))


def _squares(opened: OpenModel, ids: torch.Tensor, mask: torch.Tensor, generator: torch.Generator
             ) -> dict[int, tuple[torch.Tensor, Capture]]:  # fmt: skip
    """Layer -> (mean over channels of (∂L/∂h)² [T], routing) for a sequence."""
    found: dict[int, tuple[torch.Tensor, Capture]] = {}
    with ExitStack() as stack:
        for layer, moe in opened.anatomy.moe.items():
            stack.enter_context(_watching(opened.model.get_submodule(moe.module), layer, mask, found))
        logits = opened.model(input_ids=ids, use_cache=False).logits[mask].float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        F.cross_entropy(logits, drawn, reduction="sum").backward()
    return found


@contextmanager
def _watching(experts: Any, layer: int, mask: torch.Tensor, found: dict[int, tuple[torch.Tensor, Capture]]) -> Iterator[None]:
    given: list[Capture] = []

    def watcher(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> None:  # called by runtime/seam.py
        given[:] = [Capture(hidden.detach(), chosen.detach(), weights.detach(), mask.reshape(-1))]

    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        capture = given[0]

        def keep(gradient: torch.Tensor) -> None:
            found[layer] = gradient.float().square().reshape(-1, gradient.shape[-1]).mean(-1), capture

        output.register_hook(keep)

    experts.watcher = watcher
    handle = experts.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        del experts.watcher


def _by_expert(routed: Routed, square: torch.Tensor) -> torch.Tensor:
    """float64 [2, E]: Σ g² s over the tokens of each expert, and Σ g². square: s [T]."""
    weight = routed.gate.double().square()
    return torch.stack([routed.sums(weight * square.double()[routed.token]), routed.sums(weight)])


@contextmanager
def whole(opened: OpenModel) -> Iterator[None]:
    """All weights in memory, none of which wants a gradient."""
    seam_on(opened)
    opened.load_before()
    for layer in range(len(opened.layers)):
        opened.load_layer(layer)
    opened.load_after()
    opened.model.requires_grad_(False)
    try:
        yield
    finally:
        release(opened.model)


def refuse_large(opened: OpenModel, tokens: int, more: int = 0,
                 remedy: str = "leave --harm gradient out: sensitivities from forward passes need one layer at a time") -> None:  # fmt: skip
    """UserError unless all weights, the logits of ``tokens`` with what a loss makes of them, and ``more`` bytes fit in memory."""
    weights = sum(opened.dtype.itemsize * torch.Size(t.shape).numel() for t in opened.anatomy.tensors if t.role != IGNORED)
    needed = weights + more + 16 * tokens * opened.model.get_output_embeddings().weight.shape[0]
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError("The model is too large for gradients", expected=f"about {needed:,} bytes of memory: all weights at once",
                        got=f"{free:,} bytes free", remedy=remedy)  # fmt: skip
