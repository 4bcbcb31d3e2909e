"""How far a compressed model is from its original: KL over next-token distributions, agreement, perplexity.

Both models are walked layer by layer, so evaluating needs no more memory than one layer and one batch of logits. The
original's last hidden states are kept; the compressed model's own head then turns both into logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moecompress.calibrate.capture import recording
from moecompress.calibrate.observe import seam_on
from moecompress.errors import UserError
from moecompress.model.walk import OpenModel, Walk
from moecompress.progress import track

#: Positions whose log-probabilities are in memory at once.
POSITIONS = 128
BOOTSTRAP = 1000


@dataclass(frozen=True)
class Trace:
    """What is kept of a run of the original: inputs of the head, one [B, L, d] a batch, chosen experts by layer, and how
    many experts each layer has."""

    hidden: list[torch.Tensor]
    chosen: dict[int, torch.Tensor]  # int16 [T, k]
    experts: dict[int, int]


@dataclass(frozen=True)
class Divergence:
    """Per-token values over N sequences of L tokens, and their summaries. KL in nats, of original ‖ compressed."""

    kl: torch.Tensor  # [N, L]
    agree: torch.Tensor  # bool [N, L] same most likely token
    nll: torch.Tensor  # [N, L - 1]
    reference_nll: torch.Tensor  # [N, L - 1]
    router: dict[int, float]  # layer -> mean Jaccard of chosen experts; no layer whose experts have other numbers now

    def summary(self) -> dict[str, Any]:
        low, high = bootstrap(self.kl.mean(1))
        return {
            "kl_mean": float(self.kl.mean()),
            "kl_interval_95": [low, high],
            "kl_p99": float(self.kl.flatten().quantile(0.99)) if self.kl.numel() < 2**24 else float(np.quantile(self.kl, 0.99)),
            "top1_agreement": float(self.agree.double().mean()),
            "router_agreement": float(np.mean(list(self.router.values()))) if self.router else None,
            "router_agreement_by_layer": {str(layer): value for layer, value in self.router.items()},
            "perplexity": math.exp(float(self.nll.mean())),
            "reference_perplexity": math.exp(float(self.reference_nll.mean())),
            "sequences": self.kl.shape[0],
            "context_length": self.kl.shape[1],
        }  # fmt: skip


@torch.no_grad()
def trace(opened: OpenModel, batches: Sequence[torch.Tensor], label: str = "original") -> Trace:
    """Run the original over ``batches`` (token ids [B, L])."""
    hidden: list[torch.Tensor] = []
    chosen: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor, forward: Callable) -> torch.Tensor:
        hidden.append(x.clone())
        return forward(x)

    for _, tail in _walk(opened, batches, chosen, label):
        with head_replaced(opened.model, keep):
            tail()
    return Trace(hidden, chosen, _experts(opened))


@torch.no_grad()
def compare(
    opened: OpenModel, batches: Sequence[torch.Tensor], reference: Trace, label: str = "compressed"
) -> Divergence:
    """Run a compressed model over the same batches and compare it with the trace of the original."""
    chosen: dict[int, torch.Tensor] = {}
    parts = []
    for lane, tail in _walk(opened, batches, chosen, label):
        original = reference.hidden[lane]
        with head_replaced(opened.model, lambda x, forward, original=original: forward(torch.cat([x, original.to(x.dtype)]))):
            logits = tail()
        compressed, uncompressed = logits.chunk(2)
        parts.append(token_divergence(compressed, uncompressed, batches[lane]))
    kl, agree, nll, reference_nll = (torch.cat(column) for column in zip(*parts, strict=True))
    same = [layer for layer, experts in _experts(opened).items() if experts == reference.experts[layer]]
    router = {layer: jaccard(chosen[layer], reference.chosen[layer]) for layer in same}
    return Divergence(kl, agree, nll, reference_nll, router)


def _experts(opened: OpenModel) -> dict[int, int]:
    # Of the modules: layers that a plan dropped experts from have fewer than the config says.
    return {layer: opened.model.get_submodule(moe.module).num_experts for layer, moe in opened.anatomy.moe.items()}


def bootstrap(values: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over sequences, by resampling sequences."""
    generator = np.random.default_rng(seed)
    data = values.double().numpy()
    means = data[generator.integers(0, len(data), (BOOTSTRAP, len(data)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def jaccard(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over tokens of |A ∩ B| / |A ∪ B| for two [T, k] tables of distinct expert indices."""
    common = (one[:, :, None] == other[:, None, :]).any(-1).sum(-1).double()
    return float((common / (one.shape[1] + other.shape[1] - common)).mean())


def _walk(opened: OpenModel, batches: Sequence[torch.Tensor], chosen: dict[int, torch.Tensor], label: str):
    """Walk to the end of the last layer; yields (lane, function that finishes the lane and returns its logits)."""
    if opened.model.get_output_embeddings() is None:
        raise UserError(
            f"{type(opened.model).__name__} has no language-model head", remedy="evaluate a causal language model"
        )
    seam_on(opened)
    moe = opened.anatomy.moe
    with Walk(opened, batches) as walk:
        for layer in track(walk.layers(), label, len(opened.layers)):
            last = layer == len(opened.layers) - 1
            outputs = []
            if layer in moe:
                experts = opened.model.get_submodule(moe[layer].module)
                block = opened.model.get_submodule(moe[layer].module.rpartition(".")[0])
                with recording(block, experts) as recorder:
                    outputs = [walk.run(lane) for lane in range(len(batches))]
                chosen[layer] = torch.cat([part[1] for part in recorder.parts]).to(torch.int16)
            else:
                outputs = [walk.run(lane) for lane in range(len(batches))]
            for lane in range(len(outputs)):
                if last:
                    yield lane, lambda lane=lane, output=outputs[lane]: walk.logits(lane, output)
                else:
                    walk.step(lane, outputs[lane])
                outputs[lane] = None


@contextmanager
def head_replaced(model: Any, forward) -> Iterator[None]:
    """Let ``forward(x, the head's own forward)`` stand in for the head."""
    head = model.get_output_embeddings()
    own = type(head).forward
    head.forward = lambda x, *a, **k: forward(x, lambda y: own(head, y, *a, **k))
    try:
        yield
    finally:
        del head.forward


def token_divergence(logits: torch.Tensor, original: torch.Tensor, ids: torch.Tensor):
    """KL(original ‖ logits), agreement [B, L] and negative log-likelihoods [B, L - 1] of every token, a slice of positions
    at a time."""
    kl, agree, nll, reference_nll = [], [], [], []
    length = ids.shape[1]
    for begin in range(0, length, POSITIONS):
        here = slice(begin, min(begin + POSITIONS, length))
        q, p = (F.log_softmax(side[:, here].float(), dim=-1) for side in (logits, original))
        kl.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
        agree.append(p.argmax(-1) == q.argmax(-1))
        target = ids[:, begin + 1 : here.stop + 1, None]
        reference_nll.append(-p[:, : target.shape[1]].gather(-1, target).squeeze(-1))
        nll.append(-q[:, : target.shape[1]].gather(-1, target).squeeze(-1))
    return tuple(torch.cat(values, dim=1) for values in (kl, agree, nll, reference_nll))
