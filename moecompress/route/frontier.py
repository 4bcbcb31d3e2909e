"""How much may be skipped for how much harm: policies of growing shares, each measured on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from moecompress.errors import UserError
from moecompress.evaluate.divergence import Trace, compare
from moecompress.evaluate.report import decoding
from moecompress.model.walk import OpenModel
from moecompress.progress import track
from moecompress.route.calibrate import Seen, most_share, tune
from moecompress.runtime.loading import load
from moecompress.runtime.pruner import Pruner
from moecompress.runtime.skipping import Policy, apply, remove

#: Shares that a search for the largest harmless one tries in this order, until one does too much harm; and how often it
#: then halves the way back to the last one that did not.
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
HALVINGS = 3
#: How many tokens one policy decodes before the next has its turn, and how many turns each has.
TURN_TOKENS, SPEED_TURNS = 4, 16


@dataclass(frozen=True)
class Point:
    """A policy; the share of expert calls that it skips on held-out text, and what that costs (`Divergence.summary`)."""

    policy: Policy
    skipped: float
    divergence: dict[str, Any]

    @property
    def kl(self) -> float:
        return self.divergence["kl_mean"]

    def row(self) -> dict[str, Any]:
        keys = ("kl_mean", "kl_interval_95", "top1_agreement")
        return {"skipped": self.skipped, "calibration_skipped": self.policy.skip} | {key: self.divergence[key] for key in keys}


@dataclass(frozen=True)
class Bench:
    """Where points are measured. opened: a fresh model that wakes all experts. known: what it is compared with, on the
    token ids ``batches``, each [B, L]."""

    opened: Callable[[], OpenModel]
    batches: Sequence[torch.Tensor]
    known: Trace

    def measure(self, policy: Policy) -> Point:
        routed = self.opened()
        apply(routed.model, policy)
        counts = counting(routed.model)
        divergence = compare(routed, self.batches, self.known, f"{policy.policy}, {policy.skip:.1%} skipped").summary()
        return Point(policy, sum(skipped for skipped, _ in counts) / sum(calls for _, calls in counts), divergence)


def by_share(bench: Bench, policy: str, seen: dict[str, Seen], share: float, renormalise: bool | None = None,
             pruners: dict[str, Pruner] | None = None) -> tuple[Point, list[Point]]:  # fmt: skip
    """The policy that skips ``share``, and the way there."""
    points = [bench.measure(tune(policy, seen, part, renormalise, pruners)) for part in ((share / 2, share) if share else (share,))]
    return points[-1], points


def by_harm(bench: Bench, policy: str, seen: dict[str, Seen], max_kl: float, renormalise: bool | None = None,
            pruners: dict[str, Pruner] | None = None) -> tuple[Point, list[Point]]:  # fmt: skip
    """The policy that skips most of those measured that cost at most ``max_kl`` nats, and all of them, by share skipped.

    UserError if even the smallest share that skips anything costs more.
    """
    most = most_share(policy, seen)
    points: list[Point] = []

    def harmless(share: float) -> bool:
        points.append(bench.measure(tune(policy, seen, share, renormalise, pruners)))
        return points[-1].kl <= max_kl

    low = 0.0
    for share in (*(s for s in SHARES if s < most), most):
        if not harmless(share):
            for _ in range(HALVINGS):
                middle = (low + share) / 2
                low, share = (middle, share) if harmless(middle) else (low, middle)
            break
        low = share
    points.sort(key=lambda point: point.policy.skip)
    good = [point for point in points if point.kl <= max_kl]
    if not good or good[-1].skipped == 0:
        worst = next((point for point in points if point.kl > max_kl), points[-1])
        raise UserError(f"{policy} cannot stay within that KL", expected=f"at most {max_kl:g} nats on held-out text",
                        got=f"{worst.kl:.4g} nats with {worst.skipped:.1%} of the expert calls skipped",
                        remedy="allow more (--max-kl), or choose another policy")  # fmt: skip
    return good[-1], points


def counting(model: nn.Module) -> list[tuple[int, int]]:
    """A list that grows by (skipped pairs, all pairs) with every call of experts that skip."""
    counts: list[tuple[int, int]] = []

    for module in model.modules():
        if "skipping" in module.__dict__:
            module.__dict__["skipping"].counts = counts
    return counts


def speeds(folder: Path, policies: Sequence[Policy], ids: torch.Tensor, trust_remote_code: bool = False) -> list[float]:
    """Tokens per second of the folder's model waking all experts, and with each policy, in turns: a machine that others use is not
    always as fast. ids: [L], the prompt."""
    model = load(folder, trust_remote_code=trust_remote_code)
    runs = [decoding(model, ids) for _ in range(len(policies) + 1)]
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in track(range(SPEED_TURNS), "decode speed"):
        for policy, run, found in zip([None, *policies], runs, seconds, strict=True):
            if policy is None:
                remove(model)
            else:
                apply(model, policy)
            found.append(sum(islice(run, TURN_TOKENS)))
    return [TURN_TOKENS / median(found) for found in seconds]
