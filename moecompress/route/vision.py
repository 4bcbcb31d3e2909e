"""MoDES for models of images and text (arXiv 2511.15690): a threshold for tokens of text and one for those of images.

Of all pairs of thresholds that skip the wanted share, the one of least divergence is wanted. The share grows with both, so for
each threshold of text only the smallest one of vision that reaches the share needs to be measured: a walk along the frontier.
For a model in memory, since a walk layer by layer has no images; what its processor made of images and text comes as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moecompress.calibrate.capture import Recorder
from moecompress.errors import UserError
from moecompress.model.experts import is_experts
from moecompress.progress import track
from moecompress.route.calibrate import Seen, hidden, policy_of, skipped
from moecompress.runtime import kinds, seam
from moecompress.runtime.attention import layer_of
from moecompress.runtime.packed import PackedExperts
from moecompress.runtime.skipping import Policy, apply, remove, router_norm

Inputs = Mapping[str, Any]  # what the model is called with: input_ids, pixel_values, …


@dataclass(frozen=True)
class Pair:
    """Thresholds of text and vision, the share of calls that they skip, and what that costs in nats (None: not measured)."""

    text: float
    vision: float
    skipped: float
    kl: float | None = None


def tune_modes(model: PreTrainedModel, inputs: Sequence[Inputs], heldout: Sequence[Inputs], share: float, levels: int = 20
               ) -> tuple[Policy, list[Pair]]:  # fmt: skip
    """The policy modes with two thresholds that skips at least ``share`` of the calls on ``inputs`` at the least KL on
    ``heldout``, and all pairs that were measured. The model is left as it was, waking all experts.

    UserError if the model has no tokens of images, the inputs have none, or no pair of thresholds skips so many.
    """
    remove(model)
    seen = observe_inputs(model, inputs)
    known = [_log_probs(model, one) for one in heldout]
    pairs = []
    for pair in track(frontier(seen, share, levels), "thresholds"):
        apply(model, _policy(seen, pair))
        pairs.append(replace(pair, kl=_mean_kl(model, heldout, known)))
        remove(model)
    if not pairs:
        raise UserError("No thresholds skip that many expert calls", expected="a share from 0 to 1, without 1", got=share)
    return _policy(seen, min(pairs, key=lambda pair: pair.kl or 0.0)), pairs


def frontier(seen: dict[str, Seen], share: float, levels: int) -> list[Pair]:
    """Of thresholds at ``levels`` quantiles of each kind's scores (and zero, which skips nothing): for every one of text the
    smallest of vision with which the share is reached. No forward pass: shares are counted on ``seen``."""
    text, vision = (_grid(seen, kind, levels) for kind in (False, True))

    def found(q: int, p: int) -> float:
        return skipped("modes", seen, dict.fromkeys(seen, text[q]), dict.fromkeys(seen, vision[p]))

    pairs, p = [], levels
    for q in range(levels + 1):
        while p >= 0 and found(q, p) >= share:
            p -= 1
        if p < levels:
            pairs.append(Pair(text[q], vision[p + 1], found(q, p + 1)))
    return pairs


def _grid(seen: dict[str, Seen], vision: bool, levels: int) -> list[float]:
    """levels + 1 thresholds from the one that skips nothing to the one that skips every call of the kind."""
    parts = [(one.importance * one.weights)[one.vision == vision].flatten() for one in seen.values() if one.vision is not None]
    scores = torch.cat(parts)
    if len(scores) == 0:
        raise UserError(f"The inputs have no tokens of {'images' if vision else 'text'}", expected="images and text together",
                        remedy="tune with tune-routing, which has one threshold, or give other inputs")  # fmt: skip
    steps = scores.quantile(torch.linspace(0, 1, levels + 1, dtype=scores.dtype)[1:])
    return [0.0, *steps[:-1].tolist(), 1.01 * float(steps[-1])]


def _policy(seen: dict[str, Seen], pair: Pair) -> Policy:
    return policy_of("modes", seen, dict.fromkeys(seen, pair.text), vision=dict.fromkeys(seen, pair.vision))


@torch.no_grad()
def observe_inputs(model: PreTrainedModel, inputs: Sequence[Inputs]) -> dict[str, Seen]:
    """As `calibrate.observe`, of a whole model: experts module -> what its router gave, and which tokens are of images."""
    if not kinds.placeholders(model):
        raise UserError(f"{type(model).__name__} has no tokens of images or videos", expected="a config with " + ", ".join(kinds.FIELDS),
                        remedy="tune with tune-routing, which has one threshold")  # fmt: skip
    names = experts_of(model)
    told = kinds.watch(model)
    recorders, errors = {name: Recorder() for name in names}, {name: [0.0, 0.0] for name in names}
    vision, keep = [], []
    seam.register()
    with _recording(model, recorders, errors):
        for one in inputs:
            model(**one, use_cache=False)
            ids = one["input_ids"]
            found = told.vision(ids.numel())
            assert found is not None
            vision.append(found)
            keep.append(one.get("attention_mask", torch.ones_like(ids)).reshape(-1).bool())
    kinds.unwatch(model)
    importances = {name: (error / max(energy, 1e-30)) ** 0.5 for name, (error, energy) in errors.items()}
    seen = {}
    for name, recorder in recorders.items():
        capture = recorder.capture(torch.cat(keep))
        module: Any = model.get_submodule(name)
        seen[name] = Seen(capture.weights[capture.keep].float(), module.num_experts, importances[name] / sum(importances.values()),
                          router_norm(model, name), vision=torch.cat(vision)[capture.keep])  # fmt: skip
    return seen


def experts_of(model: PreTrainedModel) -> list[str]:
    """Names of the routed experts, packed or not, of the model's decoder; vision towers may have experts of their own."""
    inside = {id(module) for module in model.get_decoder().modules()}
    return [name for name, module in model.named_modules()
            if id(module) in inside and (is_experts(module) or isinstance(getattr(module, "packed", None), PackedExperts))]  # fmt: skip


@contextmanager
def _recording(model: PreTrainedModel, recorders: dict[str, Recorder], errors: dict[str, list[float]]) -> Iterator[None]:
    """Inside, recorders see the experts' calls; errors add up each layer's ‖h − h'‖² and ‖h‖², h' without its experts."""
    hooks = []
    for name, recorder in recorders.items():
        experts: Any = model.get_submodule(name)
        experts.watcher = recorder
        experts.config._experts_implementation = seam.NAME
        layer = model.get_submodule(layer_of(name))
        hooks.append(layer.register_forward_hook(_without(experts, errors[name]), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name in recorders:
            model.get_submodule(name).__dict__.pop("watcher", None)


def _without(experts: Any, sums: list[float]) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        watcher = experts.__dict__.pop("watcher")
        experts.skipping = lambda _hidden, chosen, weights: (torch.full_like(chosen, -1), weights)
        full, without = (hidden(x).double() for x in (output, layer.forward(*args, **kwargs)))
        del experts.skipping
        experts.watcher = watcher
        sums[0] += float((full - without).square().sum())
        sums[1] += float(full.square().sum())

    return hook


@torch.no_grad()
def _log_probs(model: PreTrainedModel, one: Inputs) -> torch.Tensor:
    return model(**one, use_cache=False).logits.float().log_softmax(-1)


def _mean_kl(model: PreTrainedModel, inputs: Sequence[Inputs], known: Sequence[torch.Tensor]) -> float:
    """Mean over the tokens that are no padding, in nats."""
    values = []
    for one, p in zip(inputs, known, strict=True):
        kl = (p.exp() * (p - _log_probs(model, one))).sum(-1).flatten()
        values.append(kl[one["attention_mask"].reshape(-1).bool()] if "attention_mask" in one else kl)
    return float(torch.cat(values).mean())
