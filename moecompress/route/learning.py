"""What policies that learn have in common: the model as it is, its distance to itself while its experts are asked otherwise, and the
loop that makes it small."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from moecompress.errors import UserError
from moecompress.model.experts import parameters_from
from moecompress.progress import share_done
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


class Learner(Protocol):
    """What is trained, a module for every layer, and what its loss is."""

    modules: nn.ModuleList

    def loss(self, ids: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(what to make small, the `distance` in it), on ids [B, L]."""

    def words(self) -> str:
        """What there is to say of the last step but its distance."""


class Schedule(Protocol):
    """How long and how fast; batch: sequences a step."""

    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def seed(self) -> int: ...
    def rate_at(self, step: int) -> float: ...


Learning = TypeVar("Learning", bound=Learner)


def train(folder: Path, make: Callable[[nn.Module], Learning], ids: torch.Tensor, schedule: Schedule, label: str,
          dtype: torch.dtype | str = "auto", trust_remote_code: bool = False) -> tuple[Learning, list[float]]:  # fmt: skip
    """Train what ``make`` makes for the model in ``folder``, packed or not, on token ids [N, L]; returns it, and the distance of each
    step. The whole model is in memory with its experts unpacked. UserError if the distance is not finite."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no")
    learner = make(frozen(folder, accelerator.device, dtype, trust_remote_code))
    optimizer = torch.optim.AdamW(learner.modules.parameters(), lr=schedule.rate_at(0), weight_decay=0.0)
    learner.modules, optimizer = accelerator.prepare(learner.modules, optimizer)
    distances: list[float] = []
    with torch.random.fork_rng(devices=[]), share_done(label) as show:
        torch.manual_seed(schedule.seed)
        for step in range(schedule.steps):
            rows = torch.randperm(len(ids))[: schedule.batch]
            loss, apart = learner.loss(ids[rows].to(accelerator.device), step)
            distances.append(float(apart.detach()))
            refuse_infinite(distances[-1], step)
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at(step)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            show((step + 1) / schedule.steps, f"step {step + 1}, KL {distances[-1]:.4f}{learner.words()}")
    learner.modules = accelerator.unwrap_model(learner.modules).cpu().requires_grad_(False)
    return learner, distances


def mean_of_tenth(values: Sequence[float], last: bool = True) -> float:
    """The mean over the last tenth of the steps, or over the first."""
    few = max(1, len(values) // 10)
    return sum(values[-few:] if last else values[:few]) / few


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
