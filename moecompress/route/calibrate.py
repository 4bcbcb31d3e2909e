"""From text to thresholds: what the router of every layer gave, and the parameters that skip a wanted share of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moecompress.calibrate.capture import recording
from moecompress.calibrate.observe import seam_on
from moecompress.errors import UserError
from moecompress.model.walk import OpenModel, Walk
from moecompress.progress import track
from moecompress.runtime.skipping import POLICIES, RENORMALISE, Policy, Rule, router_norm

#: Policies with a threshold a layer, each layer skipping the wanted share; the others have one for the whole model.
BY_LAYER = ("odp", "naee")
HALVINGS = 40


@dataclass(frozen=True)
class Seen:
    """One layer on T tokens. weights: [T, k] combine weights. importance: of its routed experts, all layers sum to 1.
    router: norm of the router's weight, where one was found."""

    weights: torch.Tensor
    experts: int
    importance: float = 1.0
    router: float | None = None


@torch.no_grad()
def observe(opened: OpenModel, batches: Sequence[torch.Tensor], mask: torch.Tensor, weigh: bool = False) -> dict[str, Seen]:
    """Experts module -> what its router gave, one layer in memory. ``batches``: token ids [B, L]; ``mask``: [N, L] True at
    tokens that count. ``weigh``: measure importances too, which runs every layer of experts twice.

    A layer's importance is the relative error of its output without its routed experts, ‖h − h'‖ / ‖h‖: times a weight it
    is about the error of skipping one expert. MoDES has the KL of the final distribution instead, which takes a pass for
    every layer and was worse where both were measured (CHANGELOG).
    """
    seen: dict[str, Seen] = {}
    seam_on(opened)
    with Walk(opened, batches) as walk:
        for layer in track(walk.layers(), "routing", len(opened.layers)):
            moe = opened.anatomy.moe.get(layer)
            if moe is None:
                outputs = [walk.run(lane) for lane in range(len(batches))]
            else:
                experts: Any = opened.model.get_submodule(moe.module)
                with recording(opened.model.get_submodule(moe.module.rpartition(".")[0]), experts) as recorder:
                    outputs = [walk.run(lane) for lane in range(len(batches))]
                capture = recorder.capture(mask)
                importance = _importance(walk, experts, outputs) if weigh else 1.0
                seen[moe.module] = Seen(capture.weights[capture.keep].float(), moe.layout.experts, importance,
                                        router_norm(opened.model, moe.module))  # fmt: skip
            if layer < len(opened.layers) - 1:
                walk.hand_on(outputs)
    total = sum(one.importance for one in seen.values())
    return {name: replace(one, importance=one.importance / total) for name, one in seen.items()}


def _importance(walk: Walk, experts: Any, outputs: list[Any]) -> float:
    experts.skipping = lambda chosen, weights: (torch.full_like(chosen, -1), weights)
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


def tune(policy: str, seen: dict[str, Seen], share: float, renormalise: bool | None = None) -> Policy:
    """The thresholds that skip ``share`` of the (token, expert) pairs in ``seen``: in each layer for odp and naee, of the
    whole model for top-p and modes. ``renormalise`` None: as the policy's paper does."""
    if policy not in POLICIES:
        raise UserError(f"Unknown policy {policy!r}", expected=", ".join(POLICIES))
    if not 0 <= share < 1:
        raise UserError("Impossible share of expert calls to skip", expected="0 to 1, without 1", got=share)
    top_k = max(one.weights.shape[1] for one in seen.values())
    if top_k < 2:
        raise UserError("The model wakes one expert per token: there is none to skip", expected="2 or more experts per token", got=top_k)
    groups = [{name: one} for name, one in seen.items()] if policy in BY_LAYER else [seen]
    thresholds: dict[str, float] = {}
    for group in groups:
        thresholds |= dict.fromkeys(group, _threshold(policy, group, share))
    rules = {
        name: Rule(threshold=thresholds[name], importance=one.importance if policy == "modes" else 1.0, experts=one.experts,
                   router=one.router)
        for name, one in seen.items()
    }  # fmt: skip
    return Policy.model_validate({
        "policy": policy, "renormalise": RENORMALISE[policy] if renormalise is None else renormalise, "top_k": top_k,
        "skip": skipped(policy, seen, thresholds), "layers": rules,
    })  # fmt: skip


def skipped(policy: str, seen: dict[str, Seen], thresholds: dict[str, float]) -> float:
    """Share of all pairs that the thresholds skip."""
    count = sum(int(POLICIES[policy](one.weights, thresholds[name], one.importance).sum()) for name, one in seen.items())
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
