"""What policies that learn have in common: the model as it is, and its distance to itself while its experts are asked otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecompress.errors import UserError
from moecompress.model.experts import parameters_from
from moecompress.runtime import seam
from moecompress.runtime.loading import load
from moecompress.runtime.packed import PackedExperts, PackedLinear
from moecompress.runtime.skipping import remove


def frozen(folder: Path, device: torch.device, dtype: torch.dtype | str, trust_remote_code: bool) -> nn.Module:
    """The model in ``folder``, packed or not, waking all experts, unpacked and not to be trained."""
    model = load(folder, dtype, trust_remote_code)
    remove(model)
    unpack(model)
    return model.to(device).requires_grad_(False)


def distance(model: nn.Module, skipping: Mapping[str, Callable], ids: torch.Tensor) -> torch.Tensor:
    """KL in nats a token of the model ‖ with these in the place of its modules' `Skipper`s, on ids [B, L]."""
    with torch.no_grad():
        known = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    with asking(model, skipping):
        own = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    return (known.exp() * (known - own)).sum(-1).mean()


@contextmanager
def asking(model: nn.Module, skipping: Mapping[str, Callable]) -> Iterator[None]:
    """Inside, experts modules ask these, by name."""
    seam.register()
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in skipping}
    for name, module in modules.items():
        module.skipping = skipping[name]
        module.config._experts_implementation = seam.NAME
    try:
        yield
    finally:
        for module in modules.values():
            del module.skipping


def refuse_infinite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(f"The loss of step {step + 1} is not finite", expected="a number", got=loss,
                        remedy="compute in float32 (--dtype float32)")  # fmt: skip


def unpack(model: nn.Module) -> None:
    """Packed experts and linear layers become ordinary ones, through which gradients flow."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for name, module in list(model.named_modules()):
        packed = getattr(module, "packed", None)
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=dtype)
            linear.weight = nn.Parameter(module.packed.dequantized(dtype)[0], requires_grad=False)
            linear.bias = module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
        elif isinstance(packed, PackedExperts):
            weights = {p: packed.dequantized(p, dtype) for p in packed.layout.projections}
            del module.packed
            for key, value in parameters_from(weights, packed.layout).items():
                setattr(module, key, nn.Parameter(value, requires_grad=False))
