"""Split one gated feed-forward layer into a shared part and routed experts, without training.

The pieces of CMoE (arXiv:2502.04416), each a function on tensors, with changes: importance is the norm of what a neuron
adds to the output instead of a top-10 mark; neurons are grouped by the part of it that a linear router can foresee; the
router is a ridge regression instead of one neuron per expert; down_proj answers for what is left out.
Letters: T tokens, d hidden size, n neurons of the dense layer, E experts, m neurons of one expert, s shared neurons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """A linear router: expert e's score for input x is ``weight[e] · x + bias[e]``; the k highest scores win."""

    weight: Tensor  # (E, d)
    bias: Tensor  # (E,)
    largest: float  # of |weight · x| on the calibration text

    def scores(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias  # (T, E)

    def logit_scale(self, ceiling: float) -> float:
        """The power of two, exact in every float format, that brings all |weight · x| seen below ``ceiling``."""
        return 2.0 ** math.floor(math.log2(ceiling / max(self.largest, 1e-30)))

    def choose(self, x: Tensor, top_k: int) -> Tensor:
        """0/1 mask (T, E) of the experts that compute for each token."""
        scores = self.scores(x)
        return torch.zeros_like(scores).scatter_(1, scores.topk(top_k, dim=1).indices, 1.0)


def neuron_importance(h: Tensor, down: Tensor) -> Tensor:
    """Norm of what each neuron adds to the output, (T, n), from activations h (T, n) and down_proj (d, n)."""
    return h.abs() * down.norm(dim=0)


def choose_shared(importance: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Neuron ids (s,) that every token computes, and the others (n - s,): the highest mean energy is shared."""
    order = importance.square().mean(0).argsort(descending=True)
    return order[:shared], order[shared:]


def expert_strength(importance: Tensor, experts: int) -> Tensor:
    """Root of the summed squares of importance over each expert's neurons: (T, E · m) → (T, E).

    The root, because a least-squares fit of the squares would serve the few tokens with huge activations.
    """
    return importance.unflatten(1, (experts, -1)).norm(dim=2)


def foreseeable(x: Tensor, importance: Tensor, damping: float) -> Tensor:
    """What a linear router can know of each neuron: rows (n, d) whose inner products are the covariances between the
    ridge predictions of importance (T, n) from the layer's input x (T, d).

    Clusters of equal size with least scatter of these rows have the most varied predictions of their sums.
    """
    centred = x - x.mean(0)
    gram, cross = centred.T @ centred, centred.T @ (importance - importance.mean(0))
    return torch.linalg.solve_triangular(_damped_root(gram, damping), cross, upper=False).T / math.sqrt(len(x))


def balanced_assignment(cost: Tensor) -> Tensor:
    """Cheapest assignment of rows to columns, cost (n, E), in which every column gets n/E rows: labels (n,)."""
    places = cost.shape[0] // cost.shape[1]
    rows, seats = linear_sum_assignment(cost.repeat_interleave(places, dim=1).numpy())
    labels = torch.empty(cost.shape[0], dtype=torch.long)
    labels[torch.from_numpy(rows)] = torch.from_numpy(seats) // places
    return labels


def balanced_clusters(features: Tensor, experts: int, rounds: int, generator: torch.Generator) -> Tensor:
    """Labels (n,) of E clusters of equal size of the rows of ``features`` (n, q).

    k-means whose assignment step is a linear assignment problem; the start is k-means++.
    """
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    distance = (features - features[chosen[0]]).square().sum(1)
    for _ in range(experts - 1):
        # The tiny floor lets identical rows be drawn when there are fewer distinct rows than experts.
        chosen.append(int(torch.multinomial(distance.clamp_min(1e-9), 1, generator=generator)))
        distance = torch.minimum(distance, (features - features[chosen[-1]]).square().sum(1))
    centres = features[chosen]
    for _ in range(rounds):
        labels = balanced_assignment(torch.cdist(features, centres).square())
        centres = torch.stack([features[labels == e].mean(0) for e in range(experts)])
    return labels


def ridge(gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    """(gram + damping · mean diagonal · I)⁻¹ cross."""
    return torch.cholesky_solve(cross, _damped_root(gram, damping))


def _damped_root(gram: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of gram + damping · mean diagonal · I."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean().clamp_min(1e-12))
    return torch.linalg.cholesky(damped)


def fit_routing(x: Tensor, strength: Tensor, damping: float) -> Routing:
    """The linear prediction of each expert's strength (T, E) from the layer's input x (T, d)."""
    mean_x, mean = x.mean(0), strength.mean(0)
    centred = x - mean_x
    weight = ridge(centred.T @ centred, centred.T @ (strength - mean), damping).T
    return Routing(weight, mean - weight @ mean_x, float((x @ weight.T).abs().max()))


def reach_all(routing: Routing, x: Tensor, top_k: int, floor: float) -> Routing:
    """The routing with the bias of any expert that fewer than ``floor`` of the tokens choose raised until they do."""
    bias = routing.bias.clone()
    for expert in torch.nonzero(routing.choose(x, top_k).mean(0) < floor).flatten().tolist():
        scores = x @ routing.weight.T + bias
        missing = scores.topk(top_k, dim=1).values[:, -1] - scores[:, expert]  # (T,) to enter a token's top-k
        bias[expert] += missing.quantile(floor)
    return replace(routing, bias=bias)


def refit_down(kept: Tensor, error: Tensor, down: Tensor, damping: float) -> Tensor:
    """down_proj (d, n) that answers for the neurons that were not computed.

    Least squares on the activations that remain, ``kept`` (T, n), for the output they miss, ``error`` (T, d), with a
    ridge that holds the result near the dense weights.
    """
    return down + ridge(kept.T @ kept, kept.T @ error, damping).T
