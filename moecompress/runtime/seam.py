"""The one seam to transformers: an experts implementation that shows what experts are given, skips some and runs
packed ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from moecompress.model.experts import layout_of, projections
from moecompress.runtime.dispatch import by_expert, crowded
from moecompress.runtime.packed import PackedExperts

NAME = "moecompress"


def experts_forward(self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                    top_k_weights: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """hidden_states [T, d], top_k_index [T, k], top_k_weights [T, k] -> [T, d]."""
    watcher = getattr(self, "watcher", None)
    if watcher is not None:
        watcher(hidden_states, top_k_index, top_k_weights)
    skipping = getattr(self, "skipping", None)
    if skipping is None:
        return compute(self, hidden_states, top_k_index, top_k_weights)
    chosen, weights = skipping(hidden_states, top_k_index, top_k_weights)
    if (vectors := getattr(skipping, "vectors", None)) is not None:
        scales = vectors.to(hidden_states.device)(top_k_index, top_k_weights, chosen)
        return compute_scaled(self, hidden_states, chosen, weights, scales)
    if getattr(skipping, "policy", None) == "dynamic-bits":
        return compute_split(self, hidden_states, top_k_index, chosen, weights)
    return compute_left(self, hidden_states, chosen, weights)


def compute(module: nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    packed = getattr(module, "packed", None)
    if isinstance(packed, PackedExperts):
        return packed.forward_for(module, hidden, chosen, weights)
    if hasattr(module, "watcher") and crowded(chosen, module.num_experts):
        layout = layout_of(module)
        stored = projections(module, layout)
        return by_expert(module, layout, lambda name, expert, x, _: x @ stored[name][expert].T, hidden, chosen, weights)
    return grouped_mm_experts_forward(module, hidden, chosen, weights)


def compute_left(module: nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same where ``chosen`` has −1 for skipped experts: only the pairs that are left enter any product."""
    tokens, top_k = chosen.shape
    left = (chosen.reshape(-1) >= 0).nonzero().squeeze(1)  # [S]
    if len(left) == chosen.numel():
        return compute(module, hidden, chosen, weights)
    if len(left) == 0:
        return torch.zeros_like(hidden)
    alone = hidden.new_ones(len(left), 1)  # each pair is a token with one expert; weights come after, as with all pairs
    y = compute(module, hidden[left // top_k], chosen.reshape(-1, 1)[left], alone)
    y = y * weights.reshape(-1, 1)[left]
    return y.new_zeros(tokens * top_k, y.shape[1]).index_copy(0, left, y).view(tokens, top_k, -1).sum(1).to(hidden.dtype)


def compute_split(module: nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, left: torch.Tensor, weights: torch.Tensor
                  ) -> torch.Tensor:  # fmt: skip
    """The same where ``left`` has −1 for pairs that nested integers compute on their two highest bits alone."""
    packed: Any = module.packed
    y = compute_left(module, hidden, left, weights)
    with packed.few_bits():
        return y + compute_left(module, hidden, chosen.masked_fill(left >= 0, -1), weights)


def compute_scaled(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor,
                   scales: dict[str, torch.Tensor]) -> torch.Tensor:  # fmt: skip
    """The same where ``chosen`` has −1 for experts that vectors stand for (runtime/vectors.py). scales: projection -> [T, in],
    what the inputs of the experts left are multiplied by."""
    chosen = chosen.masked_fill(chosen < 0, module.num_experts)  # a routing sentinel, which does not compute
    packed = getattr(module, "packed", None)
    if isinstance(packed, PackedExperts):
        return packed.scaled_for(module, hidden, chosen, weights, scales)
    layout = layout_of(module)
    stored = projections(module, layout)
    return by_expert(module, layout, lambda name, expert, x, _: x @ stored[name][expert].T, hidden, chosen, weights, scales)


def register() -> None:
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
