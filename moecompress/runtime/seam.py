"""The one seam to transformers: an experts implementation that shows what experts are given and runs packed ones."""

from __future__ import annotations

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
    packed = getattr(self, "packed", None)
    if isinstance(packed, PackedExperts):
        return packed.forward_for(self, hidden_states, top_k_index, top_k_weights)
    if watcher is not None and crowded(top_k_index, self.num_experts):
        layout = layout_of(self)
        stored = projections(self, layout)
        return by_expert(self, layout, lambda name, expert, x: x @ stored[name][expert].T, hidden_states, top_k_index, top_k_weights)
    return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)


def register() -> None:
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
