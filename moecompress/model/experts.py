"""One view of routed experts for every family: gate, up and down as [experts, out, in].

Families store them transposed or not, gate and up concatenated or interleaved, with or without a gate. The flags that
transformers' `use_experts_implementation` sets on every experts module say which; nothing here asks for a class name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from moecompress.errors import UserError

#: Sentinel for "not part of any experts module".
GATE, UP, DOWN = "gate", "up", "down"


@dataclass(frozen=True)
class ExpertsLayout:
    """How an experts module stores its weights. E experts, hidden size d, expert width m."""

    experts: int
    hidden: int
    width: int
    transposed: bool  # parameters are [E, in, out] instead of [E, out, in]
    concatenated: bool  # gate and up are halves of gate_up_proj, else they alternate
    gated: bool

    @property
    def projections(self) -> tuple[str, ...]:
        return (GATE, UP, DOWN) if self.gated else (UP, DOWN)

    def shape(self, projection: str, width: int = 0) -> tuple[int, int]:
        """(out, in) of one expert's matrix; ``width``: of an expert that is left with so many neurons (0: all)."""
        width = width or self.width
        return (self.hidden, width) if projection == DOWN else (width, self.hidden)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the module's weight parameters."""
        return ("gate_up_proj", "down_proj") if self.gated else ("up_proj", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """Experts are recognised by structure: 3-D weights behind transformers' experts interface."""
    down = module._parameters.get("down_proj")
    up = module._parameters.get("gate_up_proj", module._parameters.get("up_proj"))
    return hasattr(module, "is_transposed") and down is not None and up is not None and down.ndim == up.ndim == 3


def layout_of(module: nn.Module) -> ExpertsLayout:
    down = module.down_proj
    experts, hidden, width = down.shape
    if module.is_transposed:
        hidden, width = width, hidden
    return ExpertsLayout(experts, hidden, width, bool(module.is_transposed), bool(module.is_concatenated), bool(module.has_gate))


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if is_experts(module))


def routers(block: nn.Module, experts: nn.Module) -> list[nn.Module]:
    """The modules beside the experts that own a weight [E, d]: routers, by structure (at most one)."""
    found = [
        module
        for module in block.modules()
        if module is not experts
        and (weight := module._parameters.get("weight")) is not None
        and weight.ndim == 2
        and weight.shape[0] == experts.num_experts
    ]
    return found[:1]


def resolve(model: nn.Module, name: str) -> str:
    """The module's name in this model: the text model of a multimodal checkpoint lacks one step of the path."""
    parts = name.split(".")
    for skipped in (None, *range(len(parts))):
        found = ".".join(part for step, part in enumerate(parts) if step != skipped)
        with contextlib.suppress(AttributeError):
            model.get_submodule(found)
            return found
    raise UserError(f"config.json names a module {name} that the model does not have",
                    remedy="config.json was changed or belongs to another model: copy the folder again")  # fmt: skip


def projections(module: nn.Module | SimpleNamespace, layout: ExpertsLayout) -> dict[str, torch.Tensor]:
    """Views of the module's weights as {gate, up: [E, m, d], down: [E, d, m]}."""
    down = module.down_proj.transpose(1, 2) if layout.transposed else module.down_proj
    if not layout.gated:
        up = module.up_proj.transpose(1, 2) if layout.transposed else module.up_proj
        return {UP: up, DOWN: down}
    both = module.gate_up_proj.transpose(1, 2) if layout.transposed else module.gate_up_proj  # (E, 2m, d)
    if layout.concatenated:
        gate, up = both.chunk(2, dim=1)
    else:
        gate, up = both[:, 0::2], both[:, 1::2]
    return {GATE: gate, UP: up, DOWN: down}


def parameters_from(weights: dict[str, torch.Tensor], layout: ExpertsLayout) -> dict[str, torch.Tensor]:
    """The inverse of `projections`: the module's own parameters."""
    down = weights[DOWN]
    if layout.gated:
        if layout.concatenated:
            up = torch.cat([weights[GATE], weights[UP]], dim=1)
        else:
            up = torch.stack([weights[GATE], weights[UP]], dim=2).flatten(1, 2)
    else:
        up = weights[UP]
    pair = (up.transpose(1, 2), down.transpose(1, 2)) if layout.transposed else (up, down)
    return {name: tensor.contiguous() for name, tensor in zip(layout.parameters, pair, strict=True)}


def activate(module: nn.Module, layout: ExpertsLayout, gate: torch.Tensor | None, up: torch.Tensor,
             expert: torch.Tensor | int) -> torch.Tensor:  # fmt: skip
    """From pre-activations [S, m] to what enters down_proj [S, m], by the module's own activation and biases.

    ``expert``: index [S] of the expert that each row belongs to (or one index for all), used for the biases.
    """
    if gate is None:
        both = up
    elif layout.concatenated:
        both = torch.cat([gate, up], dim=-1)
    else:
        both = torch.stack([gate, up], dim=-1).flatten(-2)
    if getattr(module, "has_bias", False):
        bias = module.gate_up_proj_bias if layout.gated else module.up_proj_bias
        both = both + bias[expert].to(both.dtype)
    return module._apply_gate(both) if layout.gated else module.act_fn(both)


def inner(module: nn.Module, layout: ExpertsLayout, x: torch.Tensor, expert: int) -> torch.Tensor:
    """What enters down: x [T, d] -> float32 [T, m], by the module's own activation and biases."""
    weights = projections(module, layout)
    gate = x.float() @ weights[GATE][expert].float().T if layout.gated else None
    return activate(module, layout, gate, x.float() @ weights[UP][expert].float().T, expert).float()


def output(module: nn.Module, layout: ExpertsLayout, x: torch.Tensor, expert: int) -> torch.Tensor:
    """F_e(x), without combine weight: x [T, d] -> float32 [T, d]."""
    result = inner(module, layout, x, expert) @ projections(module, layout)[DOWN][expert].float().T
    if getattr(module, "has_bias", False):
        result = result + module.down_proj_bias[expert].float()
    return result
