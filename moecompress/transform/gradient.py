"""What neurons of experts matter to the model's output, by gradients through the whole model."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from moecompress.calibrate.gradient import refuse_large, whole
from moecompress.calibrate.observe import Calibration
from moecompress.model.walk import OpenModel
from moecompress.progress import track
from moecompress.transform.outputs import canonical
from moecompress.transform.regroup import NEURON_AXIS

#: Tokens that the teacher thinks most likely; the others do not count.
TOP = 8


@torch.enable_grad()
def scores(opened: OpenModel, calibration: Calibration) -> dict[int, torch.Tensor]:
    """Layer -> float32 [E, m]: Σ |θ · ∂L/∂θ| over the weights θ of a neuron, summed over micro-batches.

    SlimMoE (arXiv:2506.18349) takes for L the divergence of the current student from its teacher on the teacher's top 8
    tokens. Before anything is removed student and teacher are one, and its gradient is zero. Here L is the cross-entropy of
    the model to tokens drawn from the top 8 of its own distribution: its expected gradient is about zero too, but that of
    a batch is as large as the output depends on θ. The paper's distillation between its stages is not done.

    Needs the whole model in memory, and the gradients of its experts: raises UserError if they do not fit.
    """
    refuse_large(opened, calibration.micro_batch * calibration.ids.shape[1], opened.dtype.itemsize * opened.anatomy.expert_weights,
                 "choose --score activation, which needs one layer at a time, or smaller batches (--set compute.micro_batch=1)")  # fmt: skip
    model = opened.model
    modules = {layer: model.get_submodule(moe.module) for layer, moe in opened.anatomy.moe.items()}
    total = {layer: torch.zeros(moe.layout.experts, moe.layout.width) for layer, moe in opened.anatomy.moe.items()}
    generator = torch.Generator().manual_seed(0)
    masks = calibration.mask.split(calibration.micro_batch)
    with whole(opened):
        for module in modules.values():
            module.requires_grad_(True)
        for ids, mask in track(list(zip(calibration.batches, masks, strict=True)), "gradients"):
            loss(model(input_ids=ids, use_cache=False).logits[mask], generator).backward()
            for layer, module in modules.items():
                total[layer] += _of_neurons(module, opened.anatomy.moe[layer].layout)
                module.zero_grad()
    return total


def loss(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Summed cross-entropy of logits [T, V] to tokens drawn from their own top 8."""
    top, tokens = logits.detach().float().topk(min(TOP, logits.shape[-1]))
    drawn = tokens.gather(1, torch.multinomial(top.softmax(-1), 1, generator=generator)).squeeze(1)
    return F.cross_entropy(logits.float(), drawn, reduction="sum")


def _of_neurons(module: torch.nn.Module, layout) -> torch.Tensor:
    """Σ |θ · ∂L/∂θ| over gate, up and down of every neuron: float32 [E, m]."""
    found = {name: (p.detach() * p.grad).abs().float() for name, p in module._parameters.items() if p is not None and p.grad is not None}
    if not found:
        return torch.zeros(layout.experts, layout.width)
    shown = SimpleNamespace(**found, has_bias=getattr(module, "has_bias", False))
    total = torch.zeros(layout.experts, layout.width)
    for name, tensor in canonical(shown, layout).items():
        if name in NEURON_AXIS:
            total += tensor if tensor.ndim == 2 else tensor.sum(3 - NEURON_AXIS[name])
    return total
