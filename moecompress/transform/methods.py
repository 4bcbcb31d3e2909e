"""The methods by name: what each makes of one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from moecompress.calibrate.capture import Capture, Routed, route
from moecompress.errors import UserError
from moecompress.model.experts import ExpertsLayout
from moecompress.transform import align, drop, merge, outputs, scores
from moecompress.transform.regroup import Regrouping, dropping, merging
from moecompress.transform.routing import find_combine, no_logits

#: Most tokens that all experts are run on, chosen or not; and those whose inner activations line up neurons.
TOKENS, ALIGN_TOKENS = 4096, 512


@dataclass(frozen=True)
class Scene:
    """One layer, what its experts were given, and what is asked for.

    count: experts to keep. protected: old experts that stay themselves. biases: tensors [E] of the layer that may be added
    to router scores. groups: of grouped routing. memory: bytes for outputs of all experts.
    """

    module: nn.Module
    layout: ExpertsLayout
    capture: Capture
    count: int
    protected: Sequence[int] = ()
    biases: Sequence[torch.Tensor] = ()
    groups: int = 1
    seed: int = 0
    memory: int = 2**28

    @cached_property
    def routed(self) -> Routed:
        return route(self.capture, self.layout.experts)

    @cached_property
    def norms(self) -> torch.Tensor:
        return outputs.output_norms(self.module, self.layout, self.capture, self.routed)

    @cached_property
    def usage(self) -> torch.Tensor:
        return scores.frequency(self.routed)

    @property
    def logits(self) -> torch.Tensor:
        """[T, E] of the tokens that count."""
        if self.capture.router_logits is None:
            raise no_logits()
        return self.capture.router_logits[self.capture.keep]

    def tokens(self, most: int, row: int) -> torch.Tensor:
        """At most ``most`` tokens, fewer if rows of ``row`` float32 an expert and token would not fit."""
        fit = self.memory // (4 * self.layout.experts * row)
        return outputs.sample(self.capture, max(64, min(most, fit)))

    def mean_outputs(self) -> torch.Tensor:
        x = self.capture.hidden[outputs.sample(self.capture, TOKENS)]
        return outputs.mean_outputs(self.module, self.layout, x)

    def run(self, function: Callable, tokens: torch.Tensor) -> torch.Tensor:
        """``function`` (inner or output) of every expert on ``tokens``: [E, T, ...]."""
        x = self.capture.hidden[tokens]
        return torch.stack([function(self.module, self.layout, x, e) for e in range(self.layout.experts)])


def frequency(scene: Scene) -> Regrouping:
    return _best(scene, scene.usage)


def activation_norm(scene: Scene) -> Regrouping:
    return _best(scene, scores.activation_norm(scene.routed, scene.norms))


def reap(scene: Scene) -> Regrouping:
    return _best(scene, scores.reap(scene.routed, scene.norms))


def random(scene: Scene) -> Regrouping:
    return _best(scene, scores.random(scene.layout.experts, scene.seed))


def naee(scene: Scene) -> Regrouping:
    _refuse_groups(scene, "naee")
    combine = find_combine(scene.capture, scene.biases)
    tokens = scene.tokens(TOKENS, scene.layout.hidden)
    assert scene.capture.router_logits is not None
    kept = drop.naee(scene.run(outputs.output, tokens), scene.capture.router_logits[tokens], combine,
                     scene.capture.chosen.shape[1], scene.count, scene.protected)  # fmt: skip
    return dropping(kept, scene.layout.experts)


def m_smoe(scene: Scene) -> Regrouping:
    _refuse_merging(scene, "m-smoe")
    centroid = merge.by_router(scene.usage, scene.logits, scene.count)
    weights = outputs.canonical(scene.module, scene.layout)
    order = _orders(scene, centroid, lambda head, e: align.by_weights(weights, head, e))
    return merging(centroid, scene.usage, order)


def hc_smoe(scene: Scene) -> Regrouping:
    _refuse_merging(scene, "hc-smoe")
    return merging(merge.by_outputs(scene.mean_outputs(), scene.usage, scene.count), scene.usage)


def ream(scene: Scene) -> Regrouping:
    _refuse_merging(scene, "ream")
    saliency = scores.reap(scene.routed, scene.norms)
    centroid = merge.by_saliency(saliency, scene.mean_outputs(), scene.logits, scene.count)
    weights = outputs.canonical(scene.module, scene.layout)
    inner = scene.run(outputs.inner, scene.tokens(ALIGN_TOKENS, scene.layout.width))
    order = _orders(scene, centroid, lambda head, e: align.by_activations(weights, inner, head, e))
    return merging(centroid, saliency, order)


METHODS: dict[str, Callable[[Scene], Regrouping]] = {
    "reap": reap, "frequency": frequency, "ean": activation_norm, "naee": naee, "random": random,
    "m-smoe": m_smoe, "hc-smoe": hc_smoe, "ream": ream,
}  # fmt: skip


def _best(scene: Scene, values: torch.Tensor) -> Regrouping:
    return dropping(drop.best(values, scene.count, scene.protected, scene.groups), scene.layout.experts)


def _orders(scene: Scene, centroid: torch.Tensor, line_up: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """Order [E, m] of every expert's neurons; centroids keep theirs."""
    order = torch.arange(scene.layout.width).repeat(scene.layout.experts, 1)
    for expert, head in enumerate(centroid.tolist()):
        if head != expert:
            order[expert] = line_up(head, expert)
    return order


def _refuse_groups(scene: Scene, method: str) -> None:
    if scene.groups > 1:
        raise UserError(f"{method} cannot keep the groups of this router", expected="as many experts in every group",
                        got=f"{scene.groups} groups", remedy="choose reap, ean or frequency: they drop as many from every group")  # fmt: skip


def _refuse_merging(scene: Scene, method: str) -> None:
    _refuse_groups(scene, method)
    if scene.protected:
        raise UserError(f"{method} merges experts and cannot protect some", expected="a method that drops",
                        remedy="leave --protect out, or choose reap, ean, frequency or naee")  # fmt: skip
