"""One expert in the place of several: its down matrix is refitted until it serves the tokens of all of them.

The average of trained experts' weights is far from each of them, even with their neurons lined up (M-SMoE, arXiv:2310.01334,
sec. 3.1). But an expert's output is linear in its down matrix: with its gate and up as they are, what comes nearest to the
outputs of all members of a group is a regression. On a small trained model (16 experts, 10 of a layer's left out; squared error
relative to the output's; first layer and fourth) another expert scaled loses 0.043 and 0.058, the average 0.066 and 0.098, this
0.014 and 0.059. With gate and up averaged before the regression, too, it is the same, so they are not.

Letters: T pairs of a token and the expert that it chose, d hidden size, m width of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moecompress.calibrate.capture import Capture, Routed, route, spread
from moecompress.model.experts import DOWN, ExpertsLayout, inner, output, projections

#: Pairs that a group is fitted on, at most.
PAIRS = 8192
#: The ridge of the fit, as a number of tokens of mean power.
RIDGE = 1.0


@dataclass(frozen=True)
class Group:
    """What a serving expert sees and what is wanted of it, all weighted by |combine weight|.

    features: [T, m] what enters its down. wanted: [T, d] output of the expert that the token chose. constant: [T, d] what the
    serving expert adds whatever its down is (its bias). member: [T] position of the chosen expert in the group, 0: itself.
    size: members.
    """

    features: torch.Tensor
    wanted: torch.Tensor
    constant: torch.Tensor
    member: torch.Tensor
    size: int

    @staticmethod
    def of(module: nn.Module, layout: ExpertsLayout, hidden: torch.Tensor, routed: Routed, members: Sequence[int],
           most: int = PAIRS) -> Group:  # fmt: skip
        """members: the serving expert, then those it stands for. hidden: [T, d] that ``routed`` was made of. As many pairs of
        each as ``most`` allows, evenly spread, weighted so that each stands for all of its tokens."""
        bias = module.down_proj_bias[members[0]].float() if getattr(module, "has_bias", False) else torch.zeros(layout.hidden)
        parts = []
        for position, expert in enumerate(members):
            every = torch.arange(len(routed.token))[routed.of(expert)]
            some = spread(every, max(1, most // len(members)))
            x = hidden[routed.token[some]]
            gate = routed.gate[some].abs()[:, None] * (len(every) / max(1, len(some))) ** 0.5
            parts.append((gate * inner(module, layout, x, members[0]), gate * output(module, layout, x, expert), gate * bias,
                          torch.full((len(some),), position)))  # fmt: skip
        features, wanted, constant, member = (torch.cat(column) for column in zip(*parts, strict=True))
        return Group(features, wanted, constant, member, len(members))

    def fitted(self, down: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """The down matrix [d, m] for which the serving expert's output, times ``share`` [members], is nearest to what is wanted:
        float32. Ridge regression of what ``down`` leaves, so without data it stays as it is."""
        scale = share.float()[self.member][:, None]
        x, down = scale * self.features, down.float()
        left = self.wanted - scale * self.constant - x @ down.T
        tokens, width = x.shape
        ridge = RIDGE * float(x.square().sum()) / max(1, tokens)
        if ridge == 0:
            return down
        gram = x.T @ x if width <= tokens else x @ x.T  # the same solution; the smaller system
        gram.diagonal().add_(ridge)
        lower = torch.linalg.cholesky(gram)
        if width <= tokens:
            return down + torch.cholesky_solve(x.T @ left, lower).T
        return down + torch.cholesky_solve(left, lower).T @ x

    def shares(self, down: torch.Tensor) -> torch.Tensor:
        """float64 [members]: the multiple of the serving expert's output that is nearest to each member's. 1 for itself, and for
        those that no token chose."""
        got = (self.features @ down.float().T + self.constant).double()
        both, norm = (torch.zeros(self.size, dtype=torch.float64).index_add(0, self.member, (got * other).sum(1))
                      for other in (self.wanted.double(), got))  # fmt: skip
        share = torch.where(norm > 0, both / norm.clamp_min(1e-300), 1.0)
        share[0] = 1
        return share


def members_of(into: torch.Tensor) -> list[list[int]]:
    """Groups of more than one, the serving expert first. into: int64 [E], see `Thinning`."""
    groups = []
    for head in sorted(set(into.tolist()) - {-1}):
        rest = [e for e in (into == head).nonzero().flatten().tolist() if e != head]
        if rest:
            groups.append([head, *rest])
    return groups


@torch.no_grad()
def merge(module: nn.Module, layout: ExpertsLayout, capture: Capture, into: torch.Tensor, share: torch.Tensor) -> None:
    """Refit the down matrices of experts that serve for others, in place. into, share: [E], see `Thinning`; capture: of the
    experts before, each with tokens of its own."""
    down, routed = projections(module, layout)[DOWN], route(capture, layout.experts)
    for members in members_of(into):
        group = Group.of(module, layout, capture.hidden, routed, members)
        down[members[0]] = group.fitted(down[members[0]], share[members]).to(down.dtype)
