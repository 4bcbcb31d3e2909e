"""One record feeds every method: what the experts of a layer were given, and which of them were chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from moecompress.model.experts import routers


@dataclass(frozen=True)
class Capture:
    """T tokens of one MoE layer, k chosen experts each.

    hidden: [T, d] input of the experts. chosen: [T, k] expert indices. weights: [T, k] combine weights, after the model's
    own renormalisation and scaling. router_logits: [T, E] or None where no router with one logit an expert was found.
    keep: [T] True where statistics may use the token (no special tokens).
    """

    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    keep: torch.Tensor
    router_logits: torch.Tensor | None = None


@dataclass(frozen=True)
class Routed:
    """The (token, expert) pairs of a capture, sorted by expert: pairs start[e]:start[e+1] belong to expert e."""

    token: torch.Tensor  # [S]
    gate: torch.Tensor  # [S] float32 combine weights
    start: torch.Tensor  # [E + 1]

    def of(self, expert: int) -> slice:
        return slice(int(self.start[expert]), int(self.start[expert + 1]))

    @property
    def counts(self) -> torch.Tensor:
        return self.start.diff()

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """float64 [E]: sums of ``values`` [S] over the pairs of each expert."""
        index = torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)
        return torch.zeros(len(self.counts), dtype=torch.float64).index_add(0, index, values.double())


def route(capture: Capture, experts: int) -> Routed:
    """Sort the kept tokens by the experts that chose them."""
    chosen = torch.where(capture.keep[:, None], capture.chosen, experts).reshape(-1)
    order = torch.argsort(chosen, stable=True)
    counts = torch.bincount(chosen, minlength=experts + 1)[:experts]
    order = order[: int(counts.sum())]
    start = torch.zeros(experts + 1, dtype=torch.long)
    start[1:] = counts.cumsum(0)
    return Routed(order // capture.chosen.shape[1], capture.weights.reshape(-1)[order].float(), start)


def spread(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """At most ``count`` of the tokens, evenly spread."""
    return tokens[torch.linspace(0, len(tokens) - 1, min(count, len(tokens))).long()] if len(tokens) else tokens


class Enough(Exception):
    """Ends a layer's forward pass where its experts would begin."""


class Recorder:
    """Collects what an experts module is given, over micro-batches. ``only``: end the pass there, compute no experts."""

    def __init__(self, only: bool = False) -> None:
        self.only = only
        self.parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.logits: list[torch.Tensor] = []

    def __call__(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> None:
        self.parts.append((hidden.detach(), chosen.detach(), weights.detach()))
        if self.only:
            raise Enough

    def capture(self, keep: torch.Tensor) -> Capture:
        """``keep``: token mask in the order of the micro-batches."""
        hidden, chosen, weights = (torch.cat(parts) for parts in zip(*self.parts, strict=True))
        logits = torch.cat(self.logits) if len(self.logits) == len(self.parts) else None
        return Capture(hidden, chosen, weights, keep.reshape(-1), logits)


@contextmanager
def recording(block: nn.Module, experts: nn.Module, only: bool = False) -> Iterator[Recorder]:
    """Record what ``experts`` (inside the MoE ``block``) is given, and the logits of the block's router."""
    recorder = Recorder(only)
    experts.watcher = recorder  # read by the experts implementation of runtime/seam.py
    hooks = [
        router.register_forward_hook(_logits_hook(recorder, experts.num_experts)) for router in routers(block, experts)
    ]
    try:
        yield recorder
    finally:
        del experts.watcher
        for hook in hooks:
            hook.remove()


def _logits_hook(recorder: Recorder, experts: int):
    def hook(_module, _inputs, output):
        logits = output[0] if isinstance(output, tuple) else output
        if isinstance(logits, torch.Tensor) and logits.shape[-1] == experts:
            recorder.logits.append(logits.detach().reshape(-1, experts))

    return hook
