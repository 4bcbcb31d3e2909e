"""How much an expert matters, by what it does on calibration text. Higher is better; float64 [E]."""

from __future__ import annotations

import torch

from moecompress.calibrate.capture import Routed


def frequency(routed: Routed) -> torch.Tensor:
    """How many tokens chose the expert (the baseline of Z-code's pruning, arXiv:2109.10465)."""
    return routed.counts.double()


def activation_norm(routed: Routed, norms: torch.Tensor) -> torch.Tensor:
    """EAN: Σ ‖F_e(x)‖ over the tokens that chose the expert. norms: [S], in the order of ``routed``."""
    return routed.sums(norms)


def reap(routed: Routed, norms: torch.Tensor) -> torch.Tensor:
    """REAP (arXiv:2510.13999, eq. 9): mean of g_e(x)·‖F_e(x)‖ over the tokens that chose the expert, 0 without any.

    g is the combine weight that the model applies, so renormalised where the model does that. norms: [S], in the order of
    ``routed``.
    """
    return routed.sums(routed.gate * norms) / routed.counts.clamp_min(1)


def random(experts: int, seed: int) -> torch.Tensor:
    """For comparison: anything better than this is knowledge."""
    return torch.rand(experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
