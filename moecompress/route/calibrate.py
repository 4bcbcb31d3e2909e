"""From text to thresholds: what the router of every layer gave, and the parameters that skip a wanted share of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moecompress.calibrate.capture import Capture, recording
from moecompress.calibrate.observe import seam_on
from moecompress.errors import UserError
from moecompress.model.walk import OpenModel, Walk
from moecompress.progress import track
from moecompress.runtime.attention import watch
from moecompress.runtime.pruner import Pruner
from moecompress.runtime.skipping import (
    POLICIES,
    RENORMALISE,
    Guard,
    Policy,
    Rule,
    norms,
    router_beside,
    router_logits,
    router_norm,
)
from moecompress.runtime.vectors import Vectors

#: Policies with a threshold a layer, each layer skipping the wanted share; the others have one for the whole model.
BY_LAYER = ("odp", "naee", "adamoe")
#: Policies that decide by more than weights.
SCORED = ("adamoe", "otp")
#: Share of tokens for which adamoe's router must choose the experts of the largest logits; ours are of less rounding.
LARGEST = 0.9
HALVINGS = 40


@dataclass(frozen=True)
class Seen:
    """One layer on T tokens. weights: [T, k] combine weights. importance: of its routed experts, all layers sum to 1.
    router: norm of the router's weight, where one was found. scores: [T, k], what adamoe and otp decide by. guard: which
    tokens are protected; protected: bool [T], those. vision: bool [T], tokens of images or videos."""

    weights: torch.Tensor
    experts: int
    importance: float = 1.0
    router: float | None = None
    scores: torch.Tensor | None = None
    guard: Guard | None = None
    protected: torch.Tensor | None = None
    vision: torch.Tensor | None = None

    def skipped(self, policy: str, threshold: Any) -> torch.Tensor:
        """bool [T, k]. threshold: a number or [T, 1]."""
        found = POLICIES[policy](self.weights, threshold, self.importance, self.scores)
        return found if self.protected is None else found & ~self.protected[:, None]


@torch.no_grad()
def observe(opened: OpenModel, batches: Sequence[torch.Tensor], mask: torch.Tensor, weigh: bool = False, protect: float = 0.0,
            policy: str | None = None, pruners: dict[str, Pruner] | None = None) -> dict[str, Seen]:  # fmt: skip
    """Experts module -> what its router gave, one layer in memory. ``batches``: token ids [B, L]; ``mask``: [N, L] True at
    tokens that count. ``weigh``: measure importances too, which runs every layer of experts twice. ``protect``: share of
    tokens to protect. ``policy``: whose scores to keep (None: none); ``pruners``: those of otp.

    A layer's importance is the relative error of its output without its routed experts, ‖h − h'‖ / ‖h‖: times a weight it
    is about the error of skipping one expert. MoDES has the KL of the final distribution instead, which takes a pass for
    every layer and was worse where both were measured (CHANGELOG).
    """
    seen: dict[str, Seen] = {}
    seam_on(opened)
    watched = watch(opened.model, [moe.module for moe in opened.anatomy.moe.values()]) if protect else {}
    with Walk(opened, batches) as walk:
        for layer in track(walk.layers(), "routing", len(opened.layers)):
            moe = opened.anatomy.moe.get(layer)
            if moe is None:
                outputs = [walk.run(lane) for lane in range(len(batches))]
            else:
                experts: Any = opened.model.get_submodule(moe.module)
                with recording(opened.model.get_submodule(moe.module.rpartition(".")[0]), experts) as recorder:
                    outputs, shown = [], []
                    for lane in range(len(batches)):
                        outputs.append(walk.run(lane))
                        shown.append(watched[moe.module].take() if protect else None)
                capture = recorder.capture(mask)
                keep = capture.keep
                guard, protected = guard_of(capture, shown, protect)
                scores = scores_of(policy, opened.model, moe.module, capture, pruners)
                seen[moe.module] = Seen(
                    capture.weights[keep].float(), moe.layout.experts, _importance(walk, experts, outputs) if weigh else 1.0,
                    router_norm(opened.model, moe.module), None if scores is None else scores[keep], guard,
                    None if protected is None else protected[keep],
                )  # fmt: skip
            if layer < len(opened.layers) - 1:
                walk.hand_on(outputs)
    total = sum(one.importance for one in seen.values())
    return {name: replace(one, importance=one.importance / total) for name, one in seen.items()}


def guard_of(capture: Capture, shown: Sequence[tuple[torch.Tensor, torch.Tensor, bool] | None], protect: float
             ) -> tuple[Guard | None, torch.Tensor | None]:  # fmt: skip
    """The guard under which the share ``protect`` of a layer's tokens is protected, and bool [T], which those are. shown: what
    the layer's attention showed in each micro-batch."""
    if not protect:
        return None, None
    size = norms(capture.hidden)
    parts = [part for part in shown if part is not None]
    by_attention = len(parts) == len(shown) and sum(len(part[0]) for part in parts) == len(size)
    together, alone = (torch.cat([part[i] for part in parts]) * size if by_attention else size for i in (0, 1))
    limits = [float(values[capture.keep].quantile(1 - protect)) for values in (together, alone)]
    return Guard(by="attention" if by_attention else "norm", together=limits[0], alone=limits[1]), together >= limits[0]


def scores_of(policy: str | None, model: nn.Module, name: str, capture: Capture, pruners: dict[str, Pruner] | None
              ) -> torch.Tensor | None:  # fmt: skip
    """[T, k] for adamoe and otp. UserError if the family's router is not of the form that adamoe needs."""
    if policy == "otp":
        assert pruners is not None
        return pruners[name](capture.hidden, capture.weights)
    if policy != "adamoe":
        return None
    router = router_beside(model, name)
    top_k = capture.chosen.shape[1]
    logits = None if router is None else router_logits(router, capture.hidden)
    same = 0.0
    if logits is not None:
        best = logits.topk(top_k, dim=-1).indices.sort(-1).values
        same = float((best == capture.chosen.sort(-1).values).all(-1).float().mean())
    if logits is None or same < LARGEST:
        raise UserError(f"adamoe does not fit the router of {type(model).__name__}",
                        expected="a router that chooses the experts of the largest logits, so that null experts can take their places",
                        got="no router with one logit an expert" if logits is None else
                        f"other experts for {1 - same:.0%} of the tokens (biases, groups or hashes choose too, or the router has other inputs) in {name}",
                        remedy="choose odp, top-p or modes, which see only weights")  # fmt: skip
    return logits.gather(-1, capture.chosen)


def _importance(walk: Walk, experts: Any, outputs: list[Any]) -> float:
    experts.skipping = lambda _hidden, chosen, weights: (torch.full_like(chosen, -1), weights)
    error = energy = 0.0
    for lane, output in enumerate(outputs):
        full, without = (hidden(x).double() for x in (output, walk.run(lane)))
        error += float((full - without).square().sum())
        energy += float(full.square().sum())
    del experts.skipping
    return (error / max(energy, 1e-30)) ** 0.5


def hidden(output: Any) -> torch.Tensor:
    """The hidden states in a decoder layer's output."""
    return output[0] if isinstance(output, tuple) else output


def tune(policy: str, seen: dict[str, Seen], share: float, renormalise: bool | None = None,
         pruners: dict[str, Pruner] | None = None) -> Policy:  # fmt: skip
    """The thresholds that skip ``share`` of the (token, expert) pairs in ``seen``: in each layer for those of `BY_LAYER`, of the
    whole model for the others. ``renormalise`` None: as the policy's paper does. ``pruners``: those of otp."""
    if policy not in POLICIES:
        raise UserError(f"Unknown policy {policy!r}", expected=", ".join(POLICIES))
    if policy == "compressed-experts":
        raise UserError("compressed-experts has no threshold to tune", expected="a number of experts (--main)", got=f"a share of {share:g}")
    if not 0 <= share < 1:
        raise UserError("Impossible share of expert calls to skip", expected="0 to 1, without 1", got=share)
    top_k = max(one.weights.shape[1] for one in seen.values())
    if top_k < 2:
        raise UserError("The model wakes one expert per token: there is none to skip", expected="2 or more experts per token", got=top_k)
    groups = [{name: one} for name, one in seen.items()] if policy in BY_LAYER else [seen]
    thresholds: dict[str, float] = {}
    for group in groups:
        thresholds |= dict.fromkeys(group, _threshold(policy, group, share))
    return policy_of(policy, seen, thresholds, renormalise, pruners=pruners)


def policy_of(policy: str, seen: dict[str, Seen], thresholds: dict[str, float], renormalise: bool | None = None,
              vision: dict[str, float] | None = None, pruners: Mapping[str, Pruner | Vectors] | None = None) -> Policy:  # fmt: skip
    """A policy of known thresholds by layer. ``vision``: those of tokens of images, if others."""
    rules = {
        name: Rule(threshold=thresholds[name], importance=one.importance if policy == "modes" else 1.0, experts=one.experts,
                   router=one.router, guard=one.guard, vision=None if vision is None else vision[name])
        for name, one in seen.items()
    }  # fmt: skip
    found = Policy.model_validate({
        "policy": policy, "renormalise": RENORMALISE[policy] if renormalise is None else renormalise,
        "top_k": max(one.weights.shape[1] for one in seen.values()), "skip": skipped(policy, seen, thresholds, vision), "layers": rules,
    })  # fmt: skip
    return found.with_pruners(pruners) if pruners is not None else found


def skipped(policy: str, seen: dict[str, Seen], thresholds: dict[str, float], vision: dict[str, float] | None = None) -> float:
    """Share of all pairs that the thresholds skip."""
    count = 0
    for name, one in seen.items():
        threshold: Any = thresholds[name]
        if vision is not None and one.vision is not None:
            threshold = torch.where(one.vision, vision[name], threshold)[:, None]
        count += int(one.skipped(policy, threshold).sum())
    return count / sum(one.weights.numel() for one in seen.values())


def most_share(policy: str, seen: dict[str, Seen]) -> float:
    """The largest share that `tune` can skip."""
    groups = [{name: one} for name, one in seen.items()] if policy in BY_LAYER else [seen]
    return min(skipped(policy, group, dict.fromkeys(group, _ends(policy, group)[1])) for group in groups)


def _ends(policy: str, seen: dict[str, Seen]) -> tuple[float, float]:
    """The thresholds that skip nothing, and as much as the policy can."""
    if policy == "top-p":
        return 1.0, 0.0
    if policy == "modes":
        return 0.0, 1.01 * max(one.importance * float(one.weights.max()) for one in seen.values())
    if policy in SCORED:
        low, high = (float(end(torch.stack([end(one.scores) for one in seen.values() if one.scores is not None]))) for end in (torch.min, torch.max))
        return (low - 1, high + 1) if policy == "adamoe" else (low - high - 1, high - low + 1)
    return 0.0, 1.0


def _threshold(policy: str, seen: dict[str, Seen], share: float) -> float:
    none, most = _ends(policy, seen)

    def found(threshold: float) -> float:
        return skipped(policy, seen, dict.fromkeys(seen, threshold))

    if found(most) < share:
        alone = policy in BY_LAYER
        where = next(iter(seen)) if alone else "the model"
        raise UserError(f"{policy} cannot skip that many expert calls", expected=f"at most {found(most):.1%} in {where}",
                        got=f"{share:.1%}", remedy="ask for a smaller share, or "
                        + ("choose top-p or modes, which take more from other layers" if alone else "choose another policy"))  # fmt: skip
    return _bisect(found, share, none, most)


def _bisect(found: Callable[[float], float], share: float, none: float, most: float) -> float:
    """Of a share that grows from ``none`` to ``most``: where it is nearest to ``share``; at ties it may jump over it."""
    for _ in range(HALVINGS):
        middle = (none + most) / 2
        if found(middle) < share:
            none = middle
        else:
            most = middle
    return none if share - found(none) <= found(most) - share else most
