"""Neurons in line before experts are averaged: an expert is the same function in any order of its neurons."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment

from moecompress.transform.regroup import NEURON_AXIS


def neurons(weights: Mapping[str, torch.Tensor], expert: int) -> torch.Tensor:
    """Everything that belongs to each neuron of an expert, as a row: float32 [m, 3 d] (biases on top)."""
    parts = []
    for name, axis in NEURON_AXIS.items():
        if name in weights:
            one = weights[name][expert].float()
            parts.append(one.T if axis == 2 else one.reshape(len(one), -1))
    return torch.cat(parts, dim=1)


def by_weights(weights: Mapping[str, torch.Tensor], reference: int, expert: int) -> torch.Tensor:
    """Order int64 [m] of ``expert``'s neurons that lines them up with the ``reference`` expert's.

    The assignment with the largest Σ of inner products of gate, up and down weights (M-SMoE, arXiv:2310.01334, sec. 3.1,
    with the gate matrix added).
    """
    return assign(neurons(weights, reference) @ neurons(weights, expert).T)


def by_activations(weights: Mapping[str, torch.Tensor], inner: torch.Tensor, reference: int, expert: int) -> torch.Tensor:
    """Order int64 [m] as in `by_weights`, from distances of activations and of weights, both normalised a neuron (REAM,
    arXiv:2604.04356). inner: [E, T, m], what enters down on the same T tokens."""
    cost = torch.zeros(())
    for rows in (lambda e: inner[e].float().T, lambda e: neurons(weights, e)):
        one, other = (torch.nn.functional.normalize(rows(e), dim=1) for e in (reference, expert))
        cost = cost + torch.cdist(one, other)
    return assign(-cost)


def assign(gain: torch.Tensor) -> torch.Tensor:
    """The column of each row, each once, with the largest sum of ``gain`` [m, m]."""
    _, columns = linear_sum_assignment(gain.detach().double().numpy(), maximize=True)
    return torch.from_numpy(columns).long()
