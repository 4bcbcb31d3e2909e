"""Which experts a layer can do without, in what order, and what that costs: measured, for the allocator.

Unlike the steps of stage.py, nothing is decided here, and every layer may end up with another number of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from moecompress.calibrate.capture import Capture
from moecompress.calibrate.observe import PRIOR_MASS
from moecompress.calibrate.statistics import Thinning
from moecompress.errors import UserError
from moecompress.model.anatomy import EXPERT, MoELayer
from moecompress.model.experts import ExpertsLayout
from moecompress.model.walk import OpenModel
from moecompress.transform.outputs import output, sample
from moecompress.transform.routing import Combine, find_combine
from moecompress.transform.shrink import EXPERTS, experts_of, groups_of, shrink

#: Levels between all experts and the fewest, at most; and tokens that every level is measured on.
LEVELS, TOKENS = 16, 2048


@dataclass(frozen=True)
class Slicing:
    """How a family becomes one with fewer experts. keys: entries of its config. axes: parameter or buffer -> its axis of experts."""

    keys: list[str]
    axes: dict[str, int]


def slicing(opened: OpenModel, trust_remote_code: bool = False) -> Slicing:
    """UserError where layers cannot have fewer experts, each as many as it likes."""
    if groups_of(opened) > 1:
        raise UserError("The router picks groups of experts first", expected="a router without groups", got=f"{groups_of(opened)} groups")
    with TemporaryDirectory() as folder:
        smaller = shrink(opened, EXPERTS, experts_of(opened) - 1, Path(folder), trust_remote_code)
    blocks = tuple(moe.module.rpartition(".")[0] + "." for moe in opened.anatomy.moe.values())
    shapes = opened.loader.expected
    for info in opened.anatomy.tensors:
        if info.target not in smaller.axes or info.role == EXPERT:
            continue
        if not info.target.startswith(blocks) or info.shape != tuple(shapes[info.target].shape):
            raise UserError(f"{info.name} is not stored as the model has it", expected="the router beside the experts, as it is",
                            remedy="this architecture is not supported yet")  # fmt: skip
    return Slicing(smaller.keys, smaller.axes)


def thinning(ways: Slicing, opened: OpenModel, moe: MoELayer, capture: Capture) -> Thinning:
    """Leave out experts of a layer, a sixteenth after the other, and measure what remains of its output.

    The next to go are those whose loss costs least by their gates and mean output norms, given those that are gone; what a
    level really costs is then computed: tokens routed again among the experts that are left (NAEE, arXiv:2402.14800, eq. 4).
    A layer whose router follows no known rule has only the first level.
    """
    module, layout = opened.model.get_submodule(moe.module), moe.layout
    prefix = f"{opened.anatomy.stack}.{moe.layer}."
    state = opened.layers[moe.layer].state_dict(prefix=prefix)
    biases = [state[name].flatten() for name in ways.axes if name in state and state[name].numel() == layout.experts]
    try:
        combine = find_combine(capture, biases)
    except UserError:
        return Thinning(torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.float64),
                        torch.ones(1, layout.experts, dtype=torch.float64))  # fmt: skip
    return _Shedding(module, layout, capture, combine).down_to(capture.chosen.shape[1] + 1)


class _Shedding:
    """One layer on a sample of its tokens."""

    def __init__(self, module: nn.Module, layout: ExpertsLayout, capture: Capture, combine: Combine):
        self.module, self.layout, self.combine = module, layout, combine
        tokens = sample(capture, TOKENS)
        self.hidden, self.k = capture.hidden[tokens], capture.chosen.shape[1]
        assert capture.router_logits is not None
        self.logits = capture.router_logits[tokens]
        self.scale = int(capture.keep.sum()) / max(1, len(tokens))
        self.chosen, self.weights = combine(self.logits, self.k)
        self.whole = self._outputs(self.chosen, self.weights)
        self.energy = self._energy()

    def down_to(self, least: int) -> Thinning:
        experts = self.layout.experts
        step = max(1, experts // LEVELS)
        gone: list[int] = []
        sizes, errors = [0], [0.0]
        masses = [self._mass(self.chosen, self.weights)]
        prior = PRIOR_MASS * masses[0].mean()
        while experts - len(gone) - step >= least:
            for expert in self._next(gone, step, float(prior)):
                gone.append(expert)
            chosen, weights = self.combine(self.logits, self.k, gone)
            lost = (self._outputs(chosen, weights) - self.whole).square().sum()
            sizes.append(len(gone))
            # As with rounding, calibration text that hardly used an expert does not prove that all text can do without it.
            errors.append(float(lost + prior * self.energy[gone].sum()) * self.scale)
            masses.append(self._mass(chosen, weights))
        growth = (torch.stack(masses) + prior) / (masses[0] + prior)
        return Thinning(torch.tensor(gone, dtype=torch.long), torch.tensor(sizes), torch.tensor(errors, dtype=torch.float64), growth)

    def _next(self, gone: list[int], count: int, prior: float) -> list[int]:
        """The ``count`` cheapest to leave out beside ``gone``, as if outputs of different experts were uncorrelated."""
        chosen, weights = self.combine(self.logits, self.k, gone)
        before = self._dense(chosen, weights)
        cost = {}
        for expert in sorted(set(range(self.layout.experts)) - set(gone)):
            own = (chosen == expert).any(-1).nonzero().flatten()  # only these are routed otherwise
            after = self._dense(*self.combine(self.logits[own], self.k, [*gone, expert]))
            cost[expert] = float(((after - before[own]).square() @ self.energy).sum() + prior * self.energy[expert])
        return sorted(cost, key=cost.__getitem__)[:count]

    def _outputs(self, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.module(self.hidden, chosen, weights.to(self.hidden.dtype)).double()

    def _energy(self) -> torch.Tensor:
        """float64 [E]: mean ‖F_e(x)‖² over the tokens that chose an expert; of one that none did, the mean of the others."""
        energy = torch.full((self.layout.experts,), torch.nan, dtype=torch.float64)
        for expert in self.chosen.unique().tolist():
            own = (self.chosen == expert).any(-1)
            energy[expert] = output(self.module, self.layout, self.hidden[own], expert).double().square().sum(-1).mean()
        return torch.where(energy.isnan(), energy.nanmean(), energy)

    def _dense(self, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """float64 [T, E]: the weight of every expert."""
        return torch.zeros(len(chosen), self.layout.experts, dtype=torch.float64).scatter(-1, chosen, weights.double())

    def _mass(self, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._dense(chosen, weights).square().sum(0)
