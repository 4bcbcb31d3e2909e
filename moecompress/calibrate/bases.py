"""What the shared bases of a layer are made of: sums over all experts that will use one (quantize/shared_basis.py)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from moecompress.calibrate.capture import Capture, route
from moecompress.calibrate.moments import expert_moments
from moecompress.calibrate.statistics import gate_mass
from moecompress.model.experts import ExpertsLayout
from moecompress.pack.scheme import SHARED_BASIS, Scheme
from moecompress.quantize import shared_basis

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Users:
    """The experts of a layer whose matrices of one projection have one basis of ``rank`` rows."""

    projection: str
    experts: Sequence[int]
    rank: int


def of_every_expert(layout: ExpertsLayout, schemes: Sequence[Scheme]) -> dict[str, Users]:
    """For predictions, by projection: one basis for all experts, of the largest rank that any of ``schemes`` has."""
    based = [scheme for scheme in schemes if scheme.code == SHARED_BASIS]
    return {name: Users(name, range(layout.experts), max(scheme.rank(layout.shape(name)[1]) for scheme in based))
            for name in layout.projections if based}  # fmt: skip


def layer_directions(module: nn.Module, layout: ExpertsLayout, capture: Capture, hessian: str, prior: float, chunk: int,
                     wanted: Mapping[Key, Users], damping: float) -> dict[Key, torch.Tensor]:  # fmt: skip
    """`shared_basis.directions` for all that is ``wanted``. An expert counts by the sum of its squared gates, a row by what
    its error does to the output; the moments of `expert_moments` are made once more for it."""
    if not wanted:
        return {}
    routed = route(capture, layout.experts)
    mass = gate_mass(routed.sums(routed.gate.double().square())).float()
    energy, moment = {}, {}
    for key, users in wanted.items():
        cols = layout.shape(users.projection)[1]
        energy[key], moment[key] = (torch.zeros(cols, cols, dtype=torch.float64) for _ in range(2))
    for moments in expert_moments(module, layout, capture, hessian, prior, chunk, sensitivity=True):
        for key, users in wanted.items():
            here = [i for i, e in enumerate(moments.experts) if e in users.experts]
            weight, hessians = mass[[moments.experts[i] for i in here]], moments.hessians[moments.source(users.projection)][here]
            rows = moments.row_weight[users.projection][here] * weight[:, None]
            energy[key] += shared_basis.energy(moments.weights[users.projection][here], rows)
            moment[key] += torch.einsum("n,nij->ij", weight, hessians)
    return {key: shared_basis.directions(energy[key], moment[key], damping, users.rank) for key, users in wanted.items()}
