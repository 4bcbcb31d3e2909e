"""GPTQ as its definition: one row after the other, one column after the other, float64, the conditional update by matrix
inversion."""

from __future__ import annotations

import itertools

import torch


def plain_gptq(weights, hessian, damping, order, choose):
    """Codes uint8 of weights [E, o, i]. choose: (expert, row, column, weight) -> (code, value it stands for)."""
    codes = torch.zeros(weights.shape, dtype=torch.uint8)
    for e, r in itertools.product(range(weights.shape[0]), range(weights.shape[1])):
        w = weights[e, r].double().clone()
        h = hessian[e].double()
        h = h + torch.eye(len(h), dtype=torch.float64) * damping * h.diagonal().mean()
        left = order[e].tolist()
        while left:
            j = left[0]
            code, value = choose(e, r, j, w[j])
            codes[e, r, j] = int(code)
            inverse = torch.linalg.inv(h[left][:, left])
            w[left[1:]] -= (w[j] - value) / inverse[0, 0] * inverse[0, 1:]
            left = left[1:]
    return codes
