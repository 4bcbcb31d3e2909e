"""Which experts become one. Each returns, for every old expert, the centroid that it merges into: int64 [E].

The merged model routes by the centroids' router rows. The papers of M-SMoE and HC-SMoE instead keep all rows and send several
old experts to one new one; no plain checkpoint can say that.
"""

from __future__ import annotations

import torch
from scipy.cluster.hierarchy import cut_tree, linkage

#: Most experts of a REAM group, its centroid included.
REAM_GROUP = 16


def by_router(usage: torch.Tensor, logits: torch.Tensor, count: int) -> torch.Tensor:
    """M-SMoE (arXiv:2310.01334, sec. 3.1): the ``count`` most used experts stay, the others join the one whose router
    logits [T, E] over the same tokens have the largest cosine with theirs. usage: [E].

    Unlike there, every layer keeps the same number.
    """
    kept = usage.double().sort(descending=True, stable=True).indices[:count].sort().values
    unit = torch.nn.functional.normalize(logits.double(), dim=0)  # (T, E)
    centroid = kept[(unit.T @ unit[:, kept]).argmax(1)]
    centroid[kept] = kept
    return centroid


def by_outputs(mean: torch.Tensor, usage: torch.Tensor, count: int) -> torch.Tensor:
    """HC-SMoE (arXiv:2410.08589, sec. 3.2): agglomerative clusters, average linkage, of the experts' mean outputs [E, d]
    over all tokens, chosen or not. A cluster's centroid is its most used expert."""
    label = torch.from_numpy(cut_tree(linkage(mean.double().numpy(), "average"), n_clusters=count).ravel()).long()
    centroid = torch.empty_like(label)
    for cluster in label.unique():
        members = (label == cluster).nonzero().flatten()
        centroid[members] = members[usage[members].argmax()]
    return centroid


def by_saliency(saliency: torch.Tensor, mean: torch.Tensor, logits: torch.Tensor, count: int,
                size: int = REAM_GROUP) -> torch.Tensor:  # fmt: skip
    """REAM (arXiv:2604.04356): the ``count`` most salient experts [E], in that order, each absorb the nearest experts that
    are left until they are ``size``. Distance: half from mean outputs [E, d], half from gate probabilities over tokens.

    With few experts to merge, only the most salient absorb any.
    """
    gates = torch.nn.functional.normalize(logits.double().softmax(-1), dim=0).T  # (E, T)
    apart = torch.cdist(gates, gates)
    unit = torch.nn.functional.normalize(mean.double(), dim=1)
    distance = 1 - ((unit @ unit.T + 1) / 2 + 1 - apart / apart.max().clamp_min(1e-30)) / 2
    order = saliency.double().sort(descending=True, stable=True).indices
    centroid = torch.arange(len(saliency))
    left = sorted(order[count:].tolist())
    for head in order[:count].tolist():
        nearest = sorted(left, key=lambda e: float(distance[head, e]))[: size - 1]
        centroid[nearest] = head
        left = [e for e in left if e not in nearest]
    if left:  # more than the groups may hold: the rest joins the nearest
        heads = order[:count]
        centroid[left] = heads[distance[left][:, heads].argmin(1)]
    return centroid
