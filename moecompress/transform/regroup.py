"""Old experts to new ones: the one record that every way of dropping or merging returns, and its application to weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moecompress.model.experts import DOWN, GATE, UP

#: Per-expert biases, beside the matrices of model/experts.py. Those of gate and up have an entry a neuron.
GATE_BIAS, UP_BIAS, DOWN_BIAS = "gate_bias", "up_bias", "down_bias"
#: Canonical tensor -> the axis its neurons (the experts' inner width m) are on.
NEURON_AXIS = {GATE: 1, UP: 1, DOWN: 2, GATE_BIAS: 1, UP_BIAS: 1}


@dataclass(frozen=True)
class Regrouping:
    """E old experts become N new ones.

    target: int64 [E] the new expert that an old one became, or -1 if it was dropped. keep: int64 [N], ascending: the old
    expert whose place (its router row and biases) each new one takes. share: float32 [E], with what part an expert
    enters its group; sums to 1 in a group. order: int64 [E, m], the order in which an expert's neurons line up with
    those of its group's kept expert (None: as they are).
    """

    target: torch.Tensor
    keep: torch.Tensor
    share: torch.Tensor
    order: torch.Tensor | None = None

    def members(self, new: int) -> list[int]:
        return (self.target == new).nonzero().flatten().tolist()


def dropping(keep: Sequence[int] | torch.Tensor, experts: int) -> Regrouping:
    """Keep the experts ``keep`` as they are and no others."""
    kept = torch.as_tensor(keep, dtype=torch.long).sort().values
    target = torch.full((experts,), -1)
    target[kept] = torch.arange(len(kept))
    return Regrouping(target, kept, (target >= 0).float())


def merging(centroid: torch.Tensor, weight: torch.Tensor, order: torch.Tensor | None = None) -> Regrouping:
    """Merge every expert into its group's centroid. centroid: int64 [E], an old expert (itself for a centroid).

    weight: [E] >= 0; shares are proportional to it, and equal in a group that has none.
    """
    keep = centroid.unique()  # ascending
    target = torch.searchsorted(keep, centroid)
    weight = weight.double()
    total = torch.zeros(len(keep), dtype=torch.float64).index_add(0, target, weight)
    weight = torch.where(total[target] > 0, weight, torch.ones_like(weight))
    total = torch.zeros(len(keep), dtype=torch.float64).index_add(0, target, weight)
    return Regrouping(target, keep, (weight / total[target]).float(), order)


def apply(regrouping: Regrouping, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Canonical tensors [E, ...] of the old experts -> those [N, ...] of the new ones, in the same dtype.

    An expert alone in its group is copied bit for bit; a group's sum is made in float32.
    """
    result = {}
    for name, old in weights.items():
        new = old[regrouping.keep].clone()
        for index in range(len(regrouping.keep)):
            members = regrouping.members(index)
            if len(members) > 1:
                parts = [regrouping.share[e] * _ordered(regrouping, name, old[e].float(), e) for e in members]
                new[index] = torch.stack(parts).sum(0).to(old.dtype)
        result[name] = new
    return result


def _ordered(regrouping: Regrouping, name: str, tensor: torch.Tensor, expert: int) -> torch.Tensor:
    if regrouping.order is None or name not in NEURON_AXIS:
        return tensor
    return tensor.index_select(NEURON_AXIS[name] - 1, regrouping.order[expert])
