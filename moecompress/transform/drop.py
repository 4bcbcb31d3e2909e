"""Which experts to keep: by score, or by the subset whose outputs are nearest to all experts' (NAEE)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb

import torch

from moecompress.transform.routing import Combine

#: Above this many subsets, NAEE goes backward one expert at a time.
MOST_SUBSETS = 2000


def best(scores: torch.Tensor, count: int, protected: Sequence[int] = (), groups: int = 1) -> list[int]:
    """The ``count`` experts with the highest scores [E], the ``protected`` ones among them, ascending.

    groups: with grouped routing, consecutive experts belong together, and every group must keep as many as the others.
    """
    ranked = scores.double().clone()
    ranked[list(protected)] = torch.inf
    size, each = len(scores) // groups, count // groups
    # A stable sort: of equals, the first stay.
    order = ranked.view(groups, size).sort(descending=True, stable=True).indices[:, :each]
    return sorted((order + size * torch.arange(groups)[:, None]).flatten().tolist())


def naee(outputs: torch.Tensor, logits: torch.Tensor, combine: Combine, k: int, count: int,
         protected: Sequence[int] = (), most_subsets: int = MOST_SUBSETS) -> list[int]:  # fmt: skip
    """The ``count`` experts to keep so that ‖F' − F‖_F of the block is least (NAEE, arXiv:2402.14800, eq. 4), ascending.

    outputs: [E, T, d] what each expert makes of each of T tokens. logits: [T, E]. k: experts a token uses.
    Exact where there are at most ``most_subsets`` subsets; else greedy, one expert less at a time.
    """
    experts = len(outputs)
    loose = [e for e in range(experts) if e not in set(protected)]
    search = _Search(outputs, logits, combine, k)
    if comb(len(loose), experts - count) <= most_subsets:
        gone = min(combinations(loose, experts - count), key=lambda gone: float(search.error(gone).sum()))
    else:
        gone = search.backward(loose, experts - count)
    return [e for e in range(experts) if e not in gone]


class _Search:
    """Squared errors of the block's output, token by token, without some experts. Arguments as of `naee`."""

    def __init__(self, outputs: torch.Tensor, logits: torch.Tensor, combine: Combine, k: int):
        self.outputs, self.logits, self.combine, self.k = outputs, logits, combine, k
        self.tokens = torch.arange(outputs.shape[1])
        self.chosen, _ = combine(logits, k)
        self.whole = self._mixed((), self.tokens)

    def _mixed(self, gone: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        """Σ over the chosen of weight · output, of the experts that are not ``gone``, for the rows ``tokens``."""
        chosen, weights = self.combine(self.logits[tokens], self.k, gone)
        return torch.einsum("tk,tkd->td", weights.float(), self.outputs[chosen, tokens[:, None]].float())

    def error(self, gone: Sequence[int]) -> torch.Tensor:
        """float64 [T]. Only tokens that had chosen an expert that is gone are computed: others keep their output."""
        hit = torch.isin(self.chosen, torch.tensor(gone, dtype=torch.long)).any(-1).nonzero().flatten()
        error = torch.zeros(len(self.tokens), dtype=torch.float64)
        error[hit] = (self._mixed(gone, hit) - self.whole[hit]).double().square().sum(-1)
        return error

    def backward(self, loose: Sequence[int], drop: int) -> tuple[int, ...]:
        """Leave out, ``drop`` times, the expert whose absence costs least."""
        gone: tuple[int, ...] = ()
        for _ in range(drop):
            error, (chosen, _weights) = self.error(gone), self.combine(self.logits, self.k, gone)
            cost = {}
            for expert in set(loose) - set(gone):
                own = (chosen == expert).any(-1).nonzero().flatten()  # only these are routed otherwise
                again = (self._mixed((*gone, expert), own) - self.whole[own]).double().square().sum()
                cost[expert] = float(again - error[own].sum())
            gone = (*gone, min(sorted(cost), key=cost.__getitem__))
        return gone
