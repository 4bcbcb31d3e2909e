"""From a capture to what quantizers and the allocator need of each expert: Hessians and output sensitivities.

Pure functions of (experts module, capture), computed for a chunk of experts at a time so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from moecompress.calibrate.capture import Capture, Routed, route, spread
from moecompress.model.experts import DOWN, GATE, UP, ExpertsLayout, activate, projections
from moecompress.model.memory import trim
from moecompress.quantize.hessian import moment, shrink, token_weights

#: Tokens of the layer that every expert is shown, routed to it or not, to fill in where its own tokens are few.
POOL_TOKENS = 512
#: Tokens of the layer whose inputs make the pooled Hessian, at most: many times its columns.
POOL_INPUTS = 8192
#: Tokens of an expert whose activation slopes are averaged.
SLOPE_TOKENS = 512
#: Step of the central difference for the activation's slope, relative to the spread of the pre-activations.
SLOPE_STEP = 1e-2


@dataclass(frozen=True)
class ExpertMoments:
    """A chunk of n experts.

    weights: projection -> float32 [n, out, in]. hessians: float32 [n, in, in] of the experts' input ("input", of gate and
    up) and of what enters down ("inner"): means over tokens weighted by the power of the gate, shrunk. row_weight:
    projection -> [n, out], how much a squared error of that output row (of gate or up: before the activation) becomes
    squared error of the expert's output. mass: [n] Σ g² over tokens. drift: where x̂ is not the original's x, shrunk like the
    Hessians: mean x̂ (x − x̂)ᵀ [n, in, in] of the input, mean x̂ (y − W x̂)ᵀ [n, in, out] of what enters down, with y the expert's
    output in the original. keep: int64 [n, width], of experts that were made thinner: which neurons they are left with, in the
    order of their matrices; None: all. whole: the weights before that.
    """

    experts: list[int]
    weights: dict[str, torch.Tensor]
    hessians: dict[str, torch.Tensor]
    row_weight: dict[str, torch.Tensor]
    mass: torch.Tensor
    drift: dict[str, torch.Tensor] = field(default_factory=dict)
    keep: torch.Tensor | None = None
    whole: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, positions: list[int]) -> ExpertMoments:
        """Some of the experts."""
        if len(positions) == len(self.experts):
            return self

        def some(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: stack[positions] for name, stack in found.items()}

        keep = None if self.keep is None else self.keep[positions]
        return ExpertMoments([self.experts[i] for i in positions], some(self.weights), some(self.hessians), some(self.row_weight),
                             self.mass[positions], some(self.drift), keep, some(self.whole))  # fmt: skip

    @staticmethod
    def source(projection: str) -> str:
        """Which Hessian belongs to a projection."""
        return "inner" if projection == DOWN else "input"


def chunk_size(layout: ExpertsLayout, workspace_bytes: int, crossing: bool = False) -> int:
    """How many experts fit: their float32 weights, Hessians and about four working copies of each; ``crossing``: drifts, what is
    rounded instead of the weights, and what came of it too."""
    square = layout.hidden**2 + layout.width**2
    one = 4 * ((3 + 2 * crossing) * square + (5 + 2 * crossing) * len(layout.projections) * layout.hidden * layout.width)
    return max(1, min(layout.experts, workspace_bytes // one))


def expert_moments(module: nn.Module, layout: ExpertsLayout, capture: Capture, hessian: str, prior: float, chunk: int,
                   sensitivity: bool = False, original: torch.Tensor | None = None) -> Iterator[ExpertMoments]:  # fmt: skip
    """Moments of all experts, ``chunk`` at a time. ``prior``: tokens at which own and pooled Hessian weigh the same. ``original``:
    [T, d], hidden of the original model for the tokens of the capture; with it comes the drift of the input."""
    routed = route(capture, layout.experts)
    usable = capture.keep.nonzero().squeeze(1)
    pool = capture.hidden[spread(usable, POOL_TOKENS)].float()
    inputs = capture.hidden[spread(usable, max(POOL_INPUTS, 4 * layout.hidden))]
    pool_in = moment(inputs) / max(1, len(inputs))
    stored = projections(module, layout)
    for first in range(0, layout.experts, chunk):
        experts = list(range(first, min(first + chunk, layout.experts)))
        weights = {name: tensor[first : experts[-1] + 1].float().contiguous() for name, tensor in stored.items()}
        parts = [
            _one(module, layout, capture, routed, e, {n: w[i] for n, w in weights.items()}, pool, pool_in, hessian, prior, sensitivity)
            for i, e in enumerate(experts)
        ]  # fmt: skip
        inputs = torch.stack([part[0] for part in parts])
        inner = torch.stack([part[1] for part in parts])
        drift = {} if original is None else {"input": _drifts(capture, original, routed, experts, hessian, prior * layout.hidden)}
        yield ExpertMoments(
            experts,
            weights,
            {"input": inputs, "inner": inner},
            {name: torch.stack([part[2][name] for part in parts]) for name in parts[0][2]},
            torch.tensor([part[3] for part in parts]),
            drift,
        )
        if chunk < layout.experts:  # memory is short: holes that this chunk left must not add up
            trim()


def _drifts(capture: Capture, original: torch.Tensor, routed: Routed, experts: list[int], hessian: str, prior: float) -> torch.Tensor:
    found = []
    for expert in experts:
        pairs = routed.of(expert)
        token, omega = routed.token[pairs], token_weights(routed.gate[pairs], hessian)
        now = capture.hidden[token].float()
        found.append(_drift(now, original[token].float() - now, omega, prior))
    return torch.stack(found)


def _drift(now: torch.Tensor, off: torch.Tensor, omega: torch.Tensor, prior: float) -> torch.Tensor:
    """Mean x̂ offᵀ, float32 [i, k], for x̂ ``now`` [n, i] and what is missing ``off`` [n, k]: shrunk towards no drift."""
    own = (now * omega[:, None]).T @ off
    return shrink(own, float(omega.sum()), len(now), torch.zeros(()), prior) + torch.zeros_like(own)


def entering_down(module: nn.Module, layout: ExpertsLayout, capture: Capture, moments: ExpertMoments, rounded: dict[str, torch.Tensor],
                  original: torch.Tensor, hessian: str, prior: float) -> ExpertMoments:  # fmt: skip
    """The same moments with Hessian and drift of what enters down once the matrices before it are ``rounded``.

    rounded: projection -> [n, m, d], rows of neurons that are gone are not looked at. x̂: of these on the compressed stream's token;
    y: of the original matrices on the original stream's.
    """
    whole = moments.whole or moments.weights
    routed = route(capture, layout.experts)
    pool = capture.hidden[spread(capture.keep.nonzero().squeeze(1), POOL_TOKENS)].float()
    inner, drift = [], []
    for i, expert in enumerate(moments.experts):
        pairs = routed.of(expert)
        token, omega = routed.token[pairs], token_weights(routed.gate[pairs], hessian)
        new, old = ({name: stack[i] for name, stack in stacks.items() if name != DOWN} for stacks in (rounded, whole))
        now, a_pool, before = (
            activate(module, layout, *_pre(weights, x.float()), expert).float()
            for weights, x in ((new, capture.hidden[token]), (new, pool), (old, original[token]))
        )
        if moments.keep is not None:
            now, a_pool = now[:, moments.keep[i]], a_pool[:, moments.keep[i]]
        mass, of_pool = float(omega.sum()), moment(a_pool) / max(1, len(pool))
        inner.append(shrink(moment(now, omega), mass, len(token), of_pool, prior * layout.width))
        off = before @ whole[DOWN][i].T - now @ moments.weights[DOWN][i].T
        drift.append(_drift(now, off, omega, prior * layout.width))
    return replace(moments, hessians=moments.hessians | {"inner": torch.stack(inner)}, drift=moments.drift | {"inner": torch.stack(drift)})


def _one(module, layout: ExpertsLayout, capture: Capture, routed: Routed, expert: int, weights: dict[str, torch.Tensor],
         pool: torch.Tensor, pool_in: torch.Tensor, hessian: str, prior: float, sensitivity: bool):  # fmt: skip
    pairs = routed.of(expert)
    gate = routed.gate[pairs]
    x = capture.hidden[routed.token[pairs]].float()
    omega = token_weights(gate, hessian)
    mass = float(omega.sum())
    x_in = shrink(moment(x, omega), mass, len(x), pool_in, prior * layout.hidden)
    pre = _pre(weights, x)
    pool_pre = _pre(weights, pool)
    a, a_pool = (activate(module, layout, *p, expert).float() for p in (pre, pool_pre))
    inner = shrink(moment(a, omega), mass, len(x), moment(a_pool) / max(1, len(pool)), prior * layout.width)
    rows = {}
    if sensitivity:
        some = spread(torch.arange(len(x)), SLOPE_TOKENS)
        seen = (None if pre[0] is None else pre[0][some], pre[1][some]) if len(x) else pool_pre
        rows = _row_weights(module, layout, expert, weights, seen, gate[some].square() if len(x) else None)
    return x_in, inner, rows, float(gate.square().sum())


def _pre(weights: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Pre-activations (gate or None, up), each [T, m]."""
    return (x @ weights[GATE].T if GATE in weights else None), x @ weights[UP].T


def _row_weights(module, layout: ExpertsLayout, expert: int, weights: dict[str, torch.Tensor],
                 pre: tuple[torch.Tensor | None, torch.Tensor], omega: torch.Tensor | None) -> dict[str, torch.Tensor]:  # fmt: skip
    """First-order: an error ε in pre-activation c moves the output by D[:, c] · a'_c · ε."""
    gate, up = pre
    reach = weights[DOWN].square().sum(0)  # (m,)
    omega = torch.ones(len(up)) if omega is None or float(omega.sum()) == 0 else omega
    omega = (omega / omega.sum())[:, None]
    result = {DOWN: torch.ones(layout.hidden)}
    for name in layout.projections[:-1]:
        values = gate if name == GATE else up
        assert values is not None
        step = SLOPE_STEP * values.std().clamp_min(1e-6)
        shifted = [
            activate(module, layout, *((values + d, up) if name == GATE else (gate, values + d)), expert).float()
            for d in (-step, step)
        ]
        slope = (shifted[1] - shifted[0]) / (2 * step)
        result[name] = reach * (omega * slope.square()).sum(0)
    return result
