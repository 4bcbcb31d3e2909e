"""Many tokens through the experts of a layer, expert after expert: one gather, three products and one scatter for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moecompress.model.experts import DOWN, GATE, UP, ExpertsLayout, activate

#: Tokens of an expert, on average, from which this is faster than treating all pairs of token and expert at once.
CROWDED = 32


def crowded(chosen: torch.Tensor, experts: int) -> bool:
    """Whether so many pairs [T, k] go to ``experts`` experts that `by_expert` pays."""
    return chosen.numel() >= CROWDED * experts and not torch.compiler.is_compiling()


def by_expert(module: nn.Module, layout: ExpertsLayout, product: Callable[[str, int, torch.Tensor, torch.Tensor], torch.Tensor],
              hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor,
              scales: dict[str, torch.Tensor] | None = None) -> torch.Tensor:  # fmt: skip
    """What the experts ``module`` computes: hidden [T, d], chosen [T, k], weights [T, k] -> [T, d].

    product: (projection, expert, x [S, in], token [S], whose rows these are) -> [S, out]. The module's own activation, biases and
    norms are used as they are. Pairs whose expert is not below E are routing sentinels and add nothing. scales: projection ->
    [T, in], by which a token's inputs of that projection are multiplied (None: 1).
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
            own = None if scales is None else {name: scale[rows] for name, scale in scales.items()}
            y = through(module, layout, product, expert, hidden[rows], rows, own) * weight[begin:end]
            total.index_add_(0, rows, y.float())
        begin = end
    return total.to(hidden.dtype)


def through(module: nn.Module, layout: ExpertsLayout, product: Callable, expert: Any, x: torch.Tensor, token: torch.Tensor,
            scales: dict[str, torch.Tensor] | None = None) -> torch.Tensor:  # fmt: skip
    """x [S, d] of tokens [S] through one expert, or each row through its own (``expert`` [S]) -> [S, d]. scales: projection ->
    [S, in]. product: as of `by_expert`."""

    def into(projection: str, value: torch.Tensor) -> torch.Tensor:
        return (value if scales is None else value * scales[projection]).to(x.dtype)

    gate = product(GATE, expert, into(GATE, x), token) if layout.gated else None
    inner = activate(module, layout, gate, product(UP, expert, into(UP, x), token), expert)
    y = product(DOWN, expert, into(DOWN, inner), token)
    if getattr(module, "has_bias", False):
        y = y + module.down_proj_bias[expert].to(y.dtype)
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y
