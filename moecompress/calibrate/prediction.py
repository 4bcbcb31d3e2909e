"""Does the prediction of errors hold? A few real experts are rounded and run before there is a plan, which corrects the
predictions; and a few of those that were written are run again, which shows how good they were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from moecompress.allocate.candidates import unit_id
from moecompress.allocate.plan import Plan
from moecompress.calibrate.capture import Routed, spread
from moecompress.calibrate.moments import ExpertMoments
from moecompress.calibrate.statistics import Statistics
from moecompress.model.experts import ExpertsLayout
from moecompress.pack.scheme import SHARED_BASIS, Scheme
from moecompress.quantize.encode import Inputs, Settings, encode
from moecompress.runtime.bank import make_bank
from moecompress.runtime.dispatch import by_expert

#: Of what was written: experts of a layer that are run again.
WATCHED = 4
#: Before the plan: layers in which experts are tried with every candidate, and how many experts of each.
TRIED_LAYERS, TRIED = 3, 2
#: Tokens that an expert is run on, at most; one that fewer tokens chose than ENOUGH says too little.
TOKENS, ENOUGH = 1024, 16
#: Medians of measured ÷ predicted within this range are as good as the plan needs: other errors of it are larger.
RANGE = (0.8, 1.25)


def sampled(routed: Routed, count: int) -> list[int]:
    """``count`` experts of a layer, spread over the half with the most tokens: predictions for the others lean on what the
    layer's tokens have in common, which their own few cannot confirm."""
    busy = routed.counts.argsort(descending=True, stable=True)[: -(-len(routed.counts) // 2)]
    return spread(busy[routed.counts[busy] >= ENOUGH], count).tolist()


def tried_layers(layers: Iterable[int]) -> list[int]:
    """The layers in which predictions are compared with trials, spread over all of them."""
    return spread(torch.tensor(sorted(layers)), TRIED_LAYERS).tolist()


def decoded(scheme: Scheme, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], seed: int) -> torch.Tensor:
    """The matrix of a bank of one, float32 [out, in]."""
    one = make_bank(scheme, 1, *shape, torch.float32, seed)
    for name, buffer in one.named_buffers():
        buffer.copy_(tensors[name])
    return one.dequantized(torch.float32)[0]


def tried(module: nn.Module, layout: ExpertsLayout, moments: ExpertMoments, position: int, inputs: Mapping[str, Inputs], hidden: torch.Tensor,
          routed: Routed, expected: Mapping[str, torch.Tensor], schemes: Sequence[Scheme], settings: Settings,
          directions: Mapping[str, torch.Tensor]) -> torch.Tensor:  # fmt: skip
    """Measured ÷ ``expected`` error, float64 [1, P, C], of the expert at ``position`` of a chunk, each matrix alone rounded in
    every scheme; NaN where there is none. inputs: of the chunk, by the names of its Hessians. expected: projection -> [n, C].
    directions: by projection, of shared bases."""
    weights = {name: stack[position] for name, stack in moments.weights.items()}
    alone = {name: one.take([position]) for name, one in inputs.items()}
    ratio = torch.full((len(layout.projections), len(schemes)), torch.nan, dtype=torch.float64)
    for c, scheme in enumerate(schemes):
        if scheme.bits == 16:
            continue
        rounded = {}
        for name in layout.projections:
            fitted = scheme.fitted(layout.shape(name)[1])
            book = directions[name] if scheme.code == SHARED_BASIS else None
            found = encode(weights[name][None], alone[moments.source(name)], fitted, settings, book)
            rounded[name] = decoded(fitted, found.bank.tensors(), layout.shape(name), settings.seed)
        lost = output_errors(module, layout, moments.experts[position], hidden, routed, weights, rounded)
        for p, name in enumerate(layout.projections):
            if min(lost[name], awaited := float(expected[name][position, c])) > 0:
                ratio[p, c] = lost[name] / awaited
    return ratio[None]


def correction(ratios: Sequence[torch.Tensor]) -> torch.Tensor:
    """float64 [P, C]: what predictions are multiplied by, the geometric mean of the trials' ratios [n, P, C]; 1 where there are none."""
    logs = torch.cat(list(ratios)).log()
    return logs.nanmean(0).nan_to_num(0).exp()


def output_errors(module: nn.Module, layout: ExpertsLayout, expert: int, hidden: torch.Tensor, routed: Routed,
                  weights: Mapping[str, torch.Tensor], decoded: Mapping[str, torch.Tensor]) -> dict[str, float]:  # fmt: skip
    """Projection -> Σ g²‖F(x) − F̂(x)‖² / Σ g² over some tokens of ``expert``, F̂ with that projection alone as ``decoded``.

    hidden: [T, d], all tokens of the layer. weights, decoded: projection -> float32 [out, in].
    """
    pairs = routed.of(expert)
    some = spread(torch.arange(pairs.start, pairs.stop), TOKENS)
    x, gate = hidden[routed.token[some]].float(), routed.gate[some][:, None]

    def outputs(matrices: Mapping[str, torch.Tensor]) -> torch.Tensor:
        chosen = torch.full((len(x), 1), expert)
        return by_expert(module, layout, lambda name, _, rows, __: rows @ matrices[name].T, x, chosen, gate)

    whole, mass = outputs(weights), float(gate.double().square().sum())
    lost = {name: outputs({**weights, name: other}) - whole for name, other in decoded.items()}
    return {name: float(off.double().square().sum()) / max(mass, 1e-30) for name, off in lost.items()}


def compare(measured: Mapping[str, float], plan: Plan, statistics: Statistics) -> dict[str, Any]:
    """Measured errors (of `output_errors`, by unit id) beside the predictions that ``plan`` was made from.

    ``units``: unit -> scheme, predicted, measured, both squared errors of the expert's output per unit of Σ g².
    ``spearman``: rank correlation over all of them (None where there are too few). ``ratio``: scheme -> median of
    measured ÷ predicted. ``off``: schemes whose median is outside `RANGE`.
    """
    chosen = {choice.unit: choice.candidate for choice in plan.choices}
    predicted = _predicted(statistics, measured)
    units: dict[str, dict[str, Any]]
    units = {unit: {"scheme": chosen[unit], "predicted": predicted[unit][chosen[unit]], "measured": error}
             for unit, error in measured.items() if unit in chosen}  # fmt: skip
    units = {unit: row for unit, row in units.items() if row["predicted"] > 0}
    ratios: dict[str, list[float]] = defaultdict(list)
    for row in units.values():
        ratios[row["scheme"]].append(row["measured"] / row["predicted"])
    ratio = {scheme: float(np.median(values)) for scheme, values in sorted(ratios.items())}
    return {
        "units": units,
        "spearman": rank_correlation([row["predicted"] for row in units.values()], [row["measured"] for row in units.values()]),
        "ratio": ratio,
        "off": [scheme for scheme, value in ratio.items() if not RANGE[0] <= value <= RANGE[1]],
    }


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's; None for fewer than three values or where all are equal."""
    if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(spearmanr(one, other).statistic)


def _predicted(statistics: Statistics, wanted: Container[str]) -> dict[str, dict[str, float]]:
    """Unit, of those that are ``wanted`` -> candidate -> squared error of the expert's output by rounding, per unit of Σ g²."""
    found: dict[str, dict[str, float]] = {}
    for index, layer in statistics.layers.items():
        errors = layer.unit_error  # (E, P, C)
        for expert in range(len(layer.counts)):
            for p, projection in enumerate(statistics.projections):
                if (unit := unit_id(index, expert, projection)) in wanted:
                    found[unit] = dict(zip(statistics.schemes, errors[expert, p].tolist(), strict=True))
                    if layer.narrowing is not None:
                        thinner = layer.narrowing.harm[expert, :, p] / layer.mass[expert]  # (W, C)
                        found[unit] |= {f"{scheme}w{width}": float(thinner[w, c]) for w, width in enumerate(layer.narrowing.widths.tolist())
                                        for c, scheme in enumerate(statistics.schemes)}  # fmt: skip
    return found
