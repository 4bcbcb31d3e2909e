"""Many tokens through the experts of a layer, expert after expert: one gather, three products and one scatter for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from moecompress.model.experts import DOWN, GATE, UP, ExpertsLayout, activate

#: Tokens of an expert, on average, from which this is faster than treating all pairs of token and expert at once.
CROWDED = 32


def crowded(chosen: torch.Tensor, experts: int) -> bool:
    """Whether so many pairs [T, k] go to ``experts`` experts that `by_expert` pays."""
    return chosen.numel() >= CROWDED * experts and not torch.compiler.is_compiling()


def by_expert(module: nn.Module, layout: ExpertsLayout, product: Callable[[str, int, torch.Tensor, torch.Tensor], torch.Tensor],
              hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """What the experts ``module`` computes: hidden [T, d], chosen [T, k], weights [T, k] -> [T, d].

    product: (projection, expert, x [S, in], token [S], whose rows these are) -> [S, out]. The module's own activation, biases and norms are used as they are.
    Pairs whose expert is not below E are routing sentinels and add nothing.
    """
    chosen = chosen.reshape(-1)
    order = chosen.argsort(stable=True)
    token, weight = order // (len(chosen) // len(hidden)), weights.reshape(-1, 1)[order]
    ends = torch.bincount(chosen, minlength=layout.experts)[: layout.experts].cumsum(0)
    total = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            rows = token[begin:end]
            y = _one(module, layout, product, expert, hidden[rows], rows) * weight[begin:end]
            total.index_add_(0, rows, y.float())
        begin = end
    return total.to(hidden.dtype)


def _one(module: nn.Module, layout: ExpertsLayout, product: Callable, expert: int, x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    gate = product(GATE, expert, x, token) if layout.gated else None
    inner = activate(module, layout, gate, product(UP, expert, x, token), expert)
    y = product(DOWN, expert, inner.to(x.dtype), token)
    if getattr(module, "has_bias", False):
        y = y + module.down_proj_bias[expert].to(y.dtype)
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y
