"""Perplexity of a model in memory, by its own forward pass."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from moecompress.progress import track


@torch.no_grad()
def perplexity(model: nn.Module, ids: torch.Tensor, label: str = "perplexity") -> float:
    """exp of the mean negative log-likelihood over ids [N, L], each sequence on its own (L − 1 predictions each)."""
    total = sum(
        float(
            F.cross_entropy(
                model(input_ids=row[None], use_cache=False).logits[0, :-1].float(), row[1:], reduction="sum"
            )
        )
        for row in track(ids, label, len(ids))
    )
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))
