"""How a family turns router logits into chosen experts and combine weights, read off what it did.

Families differ in score (softmax or sigmoid), bias on the choice, renormalisation and scale. Searching subsets of experts
needs to route again without some of them, so the rule is found among the known ones and proven on the capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from moecompress.calibrate.capture import Capture
from moecompress.errors import UserError

#: The largest part of tokens that may be routed otherwise by the rule than by the model (ties and rounding of logits),
#: and the largest mean error of their weights.
OTHERWISE, WEIGHT_ERROR = 0.02, 0.02


@dataclass(frozen=True)
class Combine:
    """score: "softmax" or "sigmoid" of the logits. bias: [E], added for the choice only. scale: of the weights, at last."""

    score: str
    normalise: bool
    scale: float = 1.0
    bias: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, k: int, without: Sequence[int] = ()) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [T, E] -> chosen int64 [T, k] and weights [T, k], as if the experts ``without`` did not exist."""
        gone = torch.zeros(logits.shape[-1], dtype=torch.bool)
        gone[list(without)] = True
        logits = logits.float().masked_fill(gone, -torch.inf)
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        choice = scores if self.bias is None else scores + self.bias.float()
        chosen = choice.masked_fill(gone, -torch.inf).topk(k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, self.scale * weights


def find_combine(capture: Capture, biases: Sequence[torch.Tensor] = ()) -> Combine:
    """The rule that reproduces a capture's choices and weights. ``biases``: what may be added for the choice, each [E].

    Raises UserError if none of the known rules does.
    """
    logits, k = capture.router_logits, capture.chosen.shape[1]
    if logits is None:
        raise no_logits()
    chosen, order = capture.chosen.sort(-1)
    weights = capture.weights.gather(-1, order).float()
    for score, normalise, bias in product(("softmax", "sigmoid"), (True, False), (None, *biases)):
        ours, own = Combine(score, normalise, 1.0, bias)(logits, k)
        ours, order = ours.sort(-1)
        same = (ours == chosen).all(-1)
        if same.float().mean() < 1 - OTHERWISE:
            continue
        ratio = weights[same] / own.gather(-1, order)[same].clamp_min(1e-12)
        scale = float(ratio.median())
        if float((ratio / scale - 1).abs().mean()) <= WEIGHT_ERROR:
            return Combine(score, normalise, scale, bias)
    raise UserError("This family's router follows no rule that can be applied to fewer experts",
                    expected="softmax or sigmoid scores, the top k of them, renormalised or not, scaled or not",
                    remedy="choose a method that does not route again: reap, ean, frequency")  # fmt: skip


def no_logits() -> UserError:
    return UserError("No router with one logit an expert was found in this family",
                     remedy="choose a method that needs no router logits: reap, ean, frequency, hc-smoe")  # fmt: skip
