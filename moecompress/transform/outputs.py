"""What a layer's experts compute, alone and on tokens that did not choose them; and their weights as canonical tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from moecompress.calibrate.capture import Capture, Routed, spread
from moecompress.model.experts import ExpertsLayout, parameters_from, projections
from moecompress.model.experts import inner as inner
from moecompress.model.experts import output as output
from moecompress.transform.regroup import DOWN_BIAS, GATE_BIAS, UP_BIAS

#: Tokens that are computed at once.
PART = 4096


def canonical(module: nn.Module, layout: ExpertsLayout) -> dict[str, torch.Tensor]:
    """Views of the experts' matrices {gate, up: [E, m, d], down: [E, d, m]} and biases [E, m] or [E, d] if they have any."""
    weights = projections(module, layout)
    if not getattr(module, "has_bias", False):
        return weights
    if layout.gated:
        both = module.gate_up_proj_bias
        pair = both.chunk(2, dim=1) if layout.concatenated else (both[:, 0::2], both[:, 1::2])
        biases = {GATE_BIAS: pair[0], UP_BIAS: pair[1]}
    else:
        biases = {UP_BIAS: module.up_proj_bias}
    return weights | biases | {DOWN_BIAS: module.down_proj_bias}


def stored(weights: Mapping[str, torch.Tensor], layout: ExpertsLayout) -> dict[str, torch.Tensor]:
    """The inverse of `canonical`: the module's own parameters."""
    parameters = parameters_from(dict(weights), layout)
    if DOWN_BIAS not in weights:
        return parameters
    if layout.gated:
        pair = [weights[GATE_BIAS], weights[UP_BIAS]]
        both = torch.cat(pair, dim=1) if layout.concatenated else torch.stack(pair, dim=2).flatten(1)
        parameters["gate_up_proj_bias"] = both
    else:
        parameters["up_proj_bias"] = weights[UP_BIAS]
    parameters["down_proj_bias"] = weights[DOWN_BIAS]
    return parameters


def output_norms(module: nn.Module, layout: ExpertsLayout, capture: Capture, routed: Routed) -> torch.Tensor:
    """‖F_e(x)‖ of every (token, expert) pair: float32 [S], in the order of ``routed``."""
    norms = [torch.zeros(0)]
    for expert in range(layout.experts):
        for tokens in routed.token[routed.of(expert)].split(PART):
            norms.append(output(module, layout, capture.hidden[tokens], expert).norm(dim=-1))
    return torch.cat(norms)


def mean_outputs(module: nn.Module, layout: ExpertsLayout, x: torch.Tensor) -> torch.Tensor:
    """Mean of F_e over all tokens x [T, d], chosen or not: float32 [E, d]."""
    sums = [sum(output(module, layout, part, e).sum(0) for part in x.split(PART)) for e in range(layout.experts)]
    return torch.stack([torch.as_tensor(one) for one in sums]) / len(x)


def sample(capture: Capture, most: int) -> torch.Tensor:
    """At most ``most`` of the tokens that count, evenly spread: int64 [T]."""
    return spread(capture.keep.nonzero().flatten(), most)


class Given:
    """What the experts of a layer together give for a sample of its tokens, to compare with what they give once changed."""

    def __init__(self, module: nn.Module, capture: Capture):
        self.tokens = sample(capture, PART)
        self.output = self._of(module, capture)

    def error(self, module: nn.Module, capture: Capture) -> float:
        """‖new − old‖ / ‖old‖ of the same tokens; ``capture``: of the changed layer on the same inputs."""
        return float((self._of(module, capture) - self.output).norm() / self.output.norm().clamp_min(1e-30))

    def _of(self, module: nn.Module, capture: Capture) -> torch.Tensor:
        """float64 [T, d], with the capture's choices and weights."""
        return module(*(part[self.tokens] for part in (capture.hidden, capture.chosen, capture.weights))).double()
