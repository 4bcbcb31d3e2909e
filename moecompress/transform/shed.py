"""Which experts a layer can do without, in what order, and what that costs: measured, for the allocator.

Unlike the steps of stage.py, nothing is decided here, and every layer may end up with another number of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from moecompress.calibrate.capture import Capture, route
from moecompress.calibrate.merging import Group, members_of
from moecompress.calibrate.statistics import PRIOR_MASS, Thinning
from moecompress.errors import UserError
from moecompress.model.anatomy import EXPERT, MoELayer
from moecompress.model.experts import DOWN, ExpertsLayout, projections
from moecompress.model.walk import OpenModel
from moecompress.transform.outputs import mean_outputs, output, sample
from moecompress.transform.routing import Combine, find_combine
from moecompress.transform.shrink import EXPERTS, experts_of, groups_of, shrink

#: Levels between all experts and the fewest, at most; and tokens that every level is measured on.
LEVELS, TOKENS = 16, 2048
#: How many other experts are tried in an expert's place, and on how many tokens.
NEAREST, PAIR_TOKENS = 8, 256
#: Pairs of token and expert that a group of merged experts is fitted on here.
FIT_PAIRS = 2048


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


def thinning(ways: Slicing | None, opened: OpenModel, moe: MoELayer, capture: Capture) -> Thinning:
    """Leave out experts of a layer, a sixteenth after the other, and measure what remains of its output, in three ways.

    *Again*: their tokens are routed again among the experts that are left (NAEE, arXiv:2402.14800, eq. 4). Only where the
    router follows a known rule and the family can have fewer experts (``ways``).
    *Shared*: the router stays as it is; an expert that stays serves their tokens, too, its output scaled to what is nearest
    to theirs (as M-SMoE, arXiv:2310.01334, leaves its router, but without averaging weights: outputs of trained experts
    are too far apart).
    *Merged*: as before, but what is linear in the expert that stays, its down matrix, is refitted to the outputs of all that
    it serves for (calibrate/merging.py), at the price that it serves its own tokens less well.
    """
    module, layout = opened.model.get_submodule(moe.module), moe.layout
    shedding = _Shedding(module, layout, capture)
    found = [shedding.none()]
    if ways is not None:
        prefix = f"{opened.anatomy.stack}.{moe.layer}."
        state = opened.layers[moe.layer].state_dict(prefix=prefix)
        biases = [state[name].flatten() for name in ways.axes if name in state and state[name].numel() == layout.experts]
        with suppress(UserError):
            found += shedding.again(find_combine(capture, biases))
    found += shedding.shared()
    if not getattr(module, "has_post_expert_norm", False):  # else outputs are not linear in down
        found += shedding.merged()
    columns = zip(*(vars(way).values() for way in found), strict=True)
    return Thinning(*(torch.stack([torch.as_tensor(value) for value in column]) for column in columns))


@dataclass(frozen=True)
class _Way:
    """One way to leave experts out; fields as of `Thinning`."""

    into: torch.Tensor
    share: torch.Tensor
    again: bool
    error: torch.Tensor
    growth: torch.Tensor
    merged: bool = False


class _Shedding:
    """One layer on a sample of its tokens."""

    def __init__(self, module: nn.Module, layout: ExpertsLayout, capture: Capture):
        self.module, self.layout, self.experts = module, layout, layout.experts
        tokens = sample(capture, TOKENS)
        self.hidden, self.chosen, self.weights = (part[tokens] for part in (capture.hidden, capture.chosen, capture.weights))
        self.logits = None if capture.router_logits is None else capture.router_logits[tokens]
        self.scale = int(capture.keep.sum()) / max(1, len(tokens))
        # Merged experts are fitted on the others, if there are enough.
        self.others = replace(capture, keep=capture.keep.index_fill(0, tokens, False)) if self.scale > 2 else capture
        self.routed = route(self.others, self.experts)
        self.least = capture.chosen.shape[1] + 1
        self.whole = self._outputs(self.chosen, self.weights)
        self.energy = self._energy()
        self.mass = self._mass(self.chosen, self.weights)
        # As with rounding: that calibration text hardly used an expert does not prove that all text can do without it.
        self.prior = PRIOR_MASS * float(self.mass.mean())

    @property
    def steps(self) -> list[int]:
        """How many experts are left out on each level."""
        step = max(1, self.experts // LEVELS)
        return list(range(step, self.experts - self.least + 1, step))

    def none(self) -> _Way:
        return self._way(torch.arange(self.experts), torch.ones(self.experts), False, self.chosen, self.weights)

    # --- routed again -----------------------------------------------------------------------------------------------

    def again(self, combine: Combine) -> list[_Way]:
        """The next to go are those whose loss costs least by their gates and mean output norms, given those that are gone."""
        assert self.logits is not None
        k = self.chosen.shape[1]
        gone: list[int] = []
        ways = []
        for count in self.steps:
            gone += self._next(combine, gone, count - len(gone))
            into = torch.arange(self.experts)
            into[gone] = -1
            ways.append(self._way(into, torch.ones(self.experts), True, *combine(self.logits, k, gone)))
        return ways

    def _next(self, combine: Combine, gone: list[int], count: int) -> list[int]:
        """The ``count`` cheapest to leave out beside ``gone``, as if outputs of different experts were uncorrelated."""
        assert self.logits is not None
        k = self.chosen.shape[1]
        chosen, weights = combine(self.logits, k, gone)
        before = self._dense(chosen, weights)
        cost = {}
        for expert in sorted(set(range(self.experts)) - set(gone)):
            own = (chosen == expert).any(-1).nonzero().flatten()  # only these are routed otherwise
            after = self._dense(*combine(self.logits[own], k, [*gone, expert]))
            cost[expert] = float(((after - before[own]).square() @ self.energy).sum() + self.prior * self.energy[expert])
        return sorted(cost, key=cost.__getitem__)[:count]

    # --- shared -----------------------------------------------------------------------------------------------------

    def shared(self) -> list[_Way]:
        """Everyone who is gone is served by the nearest expert that is left, scaled."""
        return [self._way(into, share, False, *self._served(into, share)) for into, share in self._near_groups]

    @cached_property
    def _near_groups(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self._assigned(*self._near())

    def _assigned(self, gain: torch.Tensor, factor: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Into and share (see `Thinning`) of every level: the next to go is the one with which the least energy is lost in all,
        everyone who is gone being served by the expert left with the largest gain. gain, factor: as of `_near`."""
        worth = (self.mass + self.prior) * self.energy
        gone: list[int] = []
        found = []
        for count in self.steps:
            while len(gone) < count:
                left = sorted(set(range(self.experts)) - set(gone))
                gone.append(min(left, key=lambda e: float((worth * (1 - _best(gain, [*gone, e])[0]))[[*gone, e]].sum())))
            best, into = _best(gain, gone)
            share = factor.gather(1, into[:, None]).squeeze(1)
            share[best <= 0], into[best <= 0] = 0, -1
            stays = torch.ones(self.experts, dtype=torch.bool)
            stays[gone] = False
            into[stays], share[stays] = torch.arange(self.experts)[stays], 1
            found.append((into, share))
        return found

    def _served(self, into: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the experts are given then: chosen and weights [T, k]."""
        return into[self.chosen].clamp_min(0), self.weights * share[self.chosen].to(self.weights.dtype)

    def _near(self) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 [E, E]: the part of an expert's weighted energy that another's scaled output explains (0 where that was not
        looked at), and the scale."""
        gain, factor = (torch.zeros(self.experts, self.experts, dtype=torch.float64) for _ in range(2))
        mean = mean_outputs(self.module, self.layout, self.hidden[:PAIR_TOKENS]).double()
        unit = torch.nn.functional.normalize(mean, dim=1)
        alike = (unit @ unit.T).abs().fill_diagonal_(-1)
        nearest = alike.topk(min(NEAREST, self.experts - 1), dim=1).indices
        for expert in range(self.experts):
            rows, place = (self.chosen == expert).nonzero(as_tuple=True)
            rows, place = rows[:PAIR_TOKENS], place[:PAIR_TOKENS]
            if not len(rows):
                continue
            gate = self.weights[rows, place].double()[:, None]
            own = gate * output(self.module, self.layout, self.hidden[rows], expert).double()
            for other in nearest[expert].tolist():
                its = gate * output(self.module, self.layout, self.hidden[rows], other).double()
                both, norm = float((own * its).sum()), float(its.square().sum())
                if norm > 0:
                    factor[expert, other] = both / norm
                    gain[expert, other] = both**2 / (norm * float(own.square().sum().clamp_min(1e-30)))
        return gain, factor

    # --- merged -----------------------------------------------------------------------------------------------------

    def merged(self) -> list[_Way]:
        """Groups as of `shared`, so nothing more is looked for; and as there, an error measured with the weights that there would be.

        What it costs beyond that: every level has one or a few groups that the level before did not have, and each of these is
        fitted twice, for n = min(m, pairs) by n³ / 3 + n · m · pairs products, on tokens that the error is not measured on.
        """
        ways = []
        fitted: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        for into, share in self._near_groups:
            share = share.clone()
            groups = [tuple(members) for members in members_of(into)]
            fitted = {members: fitted.get(members) or self._fit(members) for members in groups}
            for members, (_, shares) in fitted.items():
                share[list(members)] = shares
            with _replaced(self.down, {members[0]: down for members, (down, _) in fitted.items()}):
                ways.append(self._way(into, share, False, *self._served(into, share), merged=True))
        return ways

    def _fit(self, members: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The first member's refitted down, and the share of each."""
        group = Group.of(self.module, self.layout, self.others.hidden, self.routed, members, FIT_PAIRS)
        down = self.down[members[0]]
        share = group.shares(group.fitted(down, torch.ones(len(members))))
        return group.fitted(down, share).to(down.dtype), share

    @property
    def down(self) -> torch.Tensor:
        return projections(self.module, self.layout)[DOWN]

    # --- means ------------------------------------------------------------------------------------------------------

    def _way(self, into: torch.Tensor, share: torch.Tensor, again: bool, chosen: torch.Tensor, weights: torch.Tensor,
             merged: bool = False) -> _Way:  # fmt: skip
        """``chosen``, ``weights``: what the experts are given then."""
        gone = into != torch.arange(self.experts)
        lost = (self._outputs(chosen, weights) - self.whole).square().sum() + self.prior * self.energy[gone].sum()
        growth = (self._mass(chosen, weights) + self.prior) / (self.mass + self.prior)
        lost = lost * self.scale if gone.any() else torch.zeros((), dtype=torch.float64)
        return _Way(into, share.double(), again, lost, growth, merged)

    def _outputs(self, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.module(self.hidden, chosen, weights.to(self.hidden.dtype)).double()

    def _energy(self) -> torch.Tensor:
        """float64 [E]: mean ‖F_e(x)‖² over the tokens that chose an expert; of one that none did, the mean of the others."""
        energy = torch.full((self.experts,), torch.nan, dtype=torch.float64)
        for expert in self.chosen.unique().tolist():
            own = (self.chosen == expert).any(-1)
            energy[expert] = output(self.module, self.layout, self.hidden[own], expert).double().square().sum(-1).mean()
        return torch.where(energy.isnan(), energy.nanmean(), energy)

    def _dense(self, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """float64 [T, E]: the weight of every expert."""
        return torch.zeros(len(chosen), self.experts, dtype=torch.float64).scatter_add(-1, chosen, weights.double())

    def _mass(self, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._dense(chosen, weights).square().sum(0)


@contextmanager
def _replaced(tensor: torch.Tensor, parts: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Inside, rows of ``tensor`` are others."""
    before = {index: tensor[index].clone() for index in parts}
    try:
        for index, part in parts.items():
            tensor[index] = part
        yield
    finally:
        for index, part in before.items():
            tensor[index] = part


def _best(gain: torch.Tensor, gone: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """For every expert, the largest gain [E] by an expert that is not ``gone``, and which that is."""
    left = gain.clone()
    left[:, gone] = -1
    best = left.max(1)
    return best.values.clamp_min(0), best.indices
