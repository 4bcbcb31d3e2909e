"""Training the masks of otp (MC#, arXiv 2510.10962): distillation of the model that skips experts from itself waking all.

The mask of a token is drawn from its `Pruner` by Gumbel-softmax, so that it is differentiable: instead of computing c experts,
every one of the k computes and the expert of rank r gets the probability of keeping more than r. Nothing but the pruners is
trained. The loss is the KL of the next-token distributions and λ times the share of pairs kept.

What MC# does not say, or does otherwise: the size of the module (here one matrix a layer), the temperatures, the data; and λ,
which moves here until the share asked for is kept, instead of being guessed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moecompress.errors import UserError
from moecompress.model.anatomy import top_k_of
from moecompress.model.experts import layout_of
from moecompress.route.learning import distance, mean_of_tenth, train
from moecompress.runtime.pruner import Pruner

#: λ at the start, and its bounds: nats for all pairs.
SPARSITY, SPARSITY_BOUNDS = 0.1, (1e-4, 1e3)


@dataclass(frozen=True)
class Training:
    """``share``: of the pairs to skip. ``temperature``: of the Gumbel-softmax, first and last step; between, geometric."""

    share: float
    steps: int = 200
    rate: float = 0.01
    batch: int = 4
    temperature: tuple[float, float] = (2.0, 0.2)
    renormalise: bool = True
    seed: int = 0

    def rate_at(self, step: int) -> float:
        return self.rate

    def temperature_at(self, step: int) -> float:
        first, last = self.temperature
        return first * (last / first) ** (step / max(1, self.steps - 1))


@dataclass
class Soft:
    """A layer's `Pruner` in training, in the place of a `Skipper`. kept: share of pairs, of each call."""

    pruner: Pruner
    renormalise: bool
    temperature: float = 1.0
    kept: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = F.gumbel_softmax(self.pruner(hidden, weights), self.temperature)  # [T, k]: column c − 1 keeps c experts
        keep = mask.flip(-1).cumsum(-1).flip(-1)  # by rank: the probability of keeping more than r
        self.kept.append(keep.mean())
        exact = weights.float()
        keep = torch.zeros_like(keep).scatter(-1, exact.argsort(dim=-1, descending=True, stable=True), keep)
        left = exact * keep
        if self.renormalise:
            left = left * (exact.sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp_min(1e-20))
        return chosen, left.to(weights.dtype)


class Masks:
    """All layers' masks in training (a `Learner`)."""

    def __init__(self, model: nn.Module, layers: Sequence[str], training: Training):
        self.model, self.layers, self.training = model, layers, training
        self.modules = nn.ModuleList(_pruner(model, name) for name in layers)
        self.sparsity, self.skipped = SPARSITY, list[float]()

    def loss(self, ids: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(KL + λ · mean share of pairs kept, KL); and λ moves towards the share asked for."""
        soft = [Soft(one, self.training.renormalise, self.training.temperature_at(step)) for one in self.modules]
        apart = distance(self.model, dict(zip(self.layers, soft, strict=True)), ids)
        kept = torch.stack([one.kept[-1] for one in soft]).mean()
        loss = apart + self.sparsity * kept
        self.skipped.append(1 - float(kept.detach()))
        self.sparsity = min(max(self.sparsity * math.exp(self.training.share - self.skipped[-1]), SPARSITY_BOUNDS[0]), SPARSITY_BOUNDS[1])
        return loss, apart

    def words(self) -> str:
        return f", {self.skipped[-1]:.1%} skipped"


def learn(folder: Path, layers: Sequence[str], ids: torch.Tensor, training: Training, dtype: torch.dtype | str = "auto",
          trust_remote_code: bool = False) -> tuple[dict[str, Pruner], dict[str, Any]]:  # fmt: skip
    """Pruners of the experts modules ``layers`` of the model in ``folder``, and a record of the training; see `learning.train`."""
    masks, losses = train(folder, lambda model: Masks(model, layers, training), ids, training, "masks", dtype, trust_remote_code)
    record = {"steps": training.steps, "share": training.share, "kl": mean_of_tenth(losses), "skipped": mean_of_tenth(masks.skipped),
              "sparsity": masks.sparsity}  # fmt: skip
    return dict(zip(layers, masks.modules, strict=True)), record


def _pruner(model: nn.Module, name: str) -> Pruner:
    top_k = top_k_of(model)
    if top_k is None or top_k < 2:
        raise UserError("otp needs a choice of experts to keep", expected="a model with 2 or more experts per token", got=top_k,
                        remedy="choose another policy")  # fmt: skip
    return Pruner(layout_of(model.get_submodule(name)).hidden, top_k)
