"""Training the vectors of compressed experts (arXiv 2503.00634): distillation of the model that computes ``main`` experts a token
from itself computing all k.

The paper finetunes the vectors together with the model on instructions, which takes its data and its GPUs. Here the model, packed
or not, stays as it is, and the vectors, which start at 1, learn its next-token distributions: KL, on any text.

Whether the combine weights of the main experts grow to the sum of all k (``renormalise``) the paper does not say. On a model of 22 M
parameters, one of its two experts a token computing, 80 steps of 2 sequences of 128 tokens, 12 held-out sequences: with growing weights
0.0608 nats without vectors and 0.0484 with them, with weights as they are 0.0557 and 0.0465. So they stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecompress.errors import UserError
from moecompress.model.experts import layout_of
from moecompress.route.learning import distance, mean_of_tenth, train
from moecompress.runtime.skipping import Rule, Skipper
from moecompress.runtime.vectors import Vectors

POLICY = "compressed-experts"


@dataclass(frozen=True)
class Training:
    """``main``: experts of a token that compute. ``rate``: first learning rate; it falls to zero by a cosine. ``batch``: sequences."""

    main: int
    steps: int = 200
    rate: float = 0.01
    batch: int = 4
    renormalise: bool = False
    seed: int = 0

    def rate_at(self, step: int) -> float:
        return self.rate * (1 + math.cos(math.pi * step / self.steps)) / 2


def main_experts(top_k: int | None, main: int | None) -> int:
    """How many of ``top_k`` experts compute: ``main``, or half of them (rounded up). UserError if there is nothing to choose."""
    if top_k is None or top_k < 2:
        raise UserError("Compressed experts need a choice of experts", expected="a model with 2 or more experts per token", got=top_k,
                        remedy="with one expert per token there is none that a vector could stand for")  # fmt: skip
    if main is not None and not 1 <= main < top_k:
        raise UserError("That many main experts cannot be", expected=f"1 to {top_k - 1}, of {top_k} experts per token", got=main)
    return (top_k + 1) // 2 if main is None else main


class Standing:
    """All layers' vectors in training (a `Learner`)."""

    def __init__(self, model: nn.Module, layers: Sequence[str], training: Training):
        self.model, self.layers, self.training = model, layers, training
        self.modules = nn.ModuleList(Vectors.of(layout_of(model.get_submodule(name))) for name in layers)

    def loss(self, ids: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        apart = distance(self.model, few_experts(self.model, dict(zip(self.layers, self.modules, strict=True)), self.training), ids)
        return apart, apart

    def words(self) -> str:
        return ""


def learn(folder: Path, layers: Sequence[str], ids: torch.Tensor, training: Training, dtype: torch.dtype | str = "auto",
          trust_remote_code: bool = False) -> tuple[dict[str, Vectors], dict[str, Any]]:  # fmt: skip
    """Vectors for the experts modules ``layers`` of the model in ``folder``, and a record of the training; see `learning.train`."""
    vectors, losses = train(folder, lambda model: Standing(model, layers, training), ids, training, "vectors", dtype, trust_remote_code)
    record = {"steps": training.steps, "main": training.main, "kl_first": mean_of_tenth(losses, last=False), "kl": mean_of_tenth(losses)}
    return {name: rounded(one) for name, one in zip(layers, vectors.modules, strict=True)}, record


def rounded(vectors: Vectors) -> Vectors:
    """As they will be read from the file."""
    return Vectors.from_tensors(vectors.tensors()).requires_grad_(False)


def few_experts(model: nn.Module, vectors: Mapping[str, Vectors], training: Training) -> dict[str, Skipper]:
    """What experts modules ask while ``main`` experts of a token compute."""
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in vectors}
    return {name: Skipper(POLICY, Rule(threshold=training.main, experts=module.num_experts), training.renormalise, vectors=vectors[name])
            for name, module in modules.items()}  # fmt: skip
