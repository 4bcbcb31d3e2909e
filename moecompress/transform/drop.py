"""Which experts to keep: by score, or by the subset whose outputs are nearest to all experts' (NAEE)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb

import torch

from moecompress.transform.routing import Combine

#: Above this many subsets, NAEE goes backward one expert at a time.
MOST_SUBSETS = 5000


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


def mixed(outputs: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ over the chosen of weight · output. outputs [E, T, d], chosen and weights [T, k] -> [T, d]."""
    rows = torch.arange(outputs.shape[1])[:, None]
    return torch.einsum("tk,tkd->td", weights.float(), outputs[chosen, rows].float())


def naee(outputs: torch.Tensor, logits: torch.Tensor, combine: Combine, k: int, count: int,
         protected: Sequence[int] = (), most_subsets: int = MOST_SUBSETS) -> list[int]:  # fmt: skip
    """The ``count`` experts to keep so that ‖F' − F‖_F of the block is least (NAEE, arXiv:2402.14800, eq. 4), ascending.

    outputs: [E, T, d] what each expert makes of each of T tokens. logits: [T, E]. k: experts a token uses.
    Exact where there are at most ``most_subsets`` subsets; else greedy, one expert less at a time.
    """
    experts = len(outputs)
    loose = [e for e in range(experts) if e not in set(protected)]
    whole = mixed(outputs, *combine(logits, k))
    if comb(len(loose), experts - count) <= most_subsets:
        gone = min(combinations(loose, experts - count), key=lambda s: _error(outputs, logits, combine, k, s, whole))
    else:
        gone = _backward(outputs, logits, combine, k, experts - count, loose, whole)
    return [e for e in range(experts) if e not in set(gone)]


def _error(outputs: torch.Tensor, logits: torch.Tensor, combine: Combine, k: int, gone: Sequence[int],
           whole: torch.Tensor) -> float:  # fmt: skip
    return float((mixed(outputs, *combine(logits, k, gone)) - whole).double().square().sum())


def _backward(outputs: torch.Tensor, logits: torch.Tensor, combine: Combine, k: int, drop: int, loose: list[int],
              whole: torch.Tensor) -> tuple[int, ...]:  # fmt: skip
    """Leave out, ``drop`` times, the expert whose absence costs least. Only its own tokens have to be routed again."""
    gone: tuple[int, ...] = ()
    for _ in range(drop):
        chosen, weights = combine(logits, k, gone)
        error = (mixed(outputs, chosen, weights) - whole).double().square().sum(-1)  # (T,)
        best_cost, best_expert = float("inf"), -1
        for expert in loose:
            if expert in gone:
                continue
            tokens = (chosen == expert).any(-1).nonzero().flatten()
            again = _error(outputs[:, tokens], logits[tokens], combine, k, (*gone, expert), whole[tokens])
            cost = again - float(error[tokens].sum())
            if cost < best_cost:
                best_cost, best_expert = cost, expert
        gone = (*gone, best_expert)
    return gone
