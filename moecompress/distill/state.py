"""A training run on disk: weights and AdamW's moments as safetensors, the position as JSON. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecompress.distill.qat import Rounding
from moecompress.model.checkpoint import read_entry, read_header, write_shard, write_text

RECORD = "state.json"


@dataclass
class Run:
    """Where a training run is. ``before`` and ``best``: summaries on held-out text; ``best`` is None, with no step, as long as
    nothing was better than the student as it came. ``seconds``: spent training and measuring."""

    step: int = 0
    seconds: float = 0.0
    before: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class Weights:
    """The trained weights twice: float32 masters, which the optimizer moves, and the model's own parameters, which hold them
    rounded to the dtype that the checkpoint stores, and before that to a grid if ``rounding`` is given. So training and
    measuring see what will be written."""

    def __init__(self, model: nn.Module, dtypes: Mapping[str, torch.dtype], rounding: Rounding | None = None):
        """``dtypes``: of the trained parameters, by name, on disk."""
        parameters = dict(model.named_parameters())
        self.dtypes, self.rounding = dtypes, rounding
        self.placed = False  # does the model hold rounded values yet?
        self.own = {name: parameters[name] for name in dtypes}
        self.masters = {name: nn.Parameter(p.detach().to(torch.float32, copy=True)) for name, p in self.own.items()}

    def take_gradients(self) -> None:
        """Hand the model's gradients to the masters."""
        for name, parameter in self.own.items():
            self.masters[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def put(self) -> None:
        """Round the masters into the model."""
        for name, value in self._rounded(self.own if self.placed else None):
            self.own[name].copy_(value.to(self.dtypes[name]))
        self.placed = True

    def stored(self) -> dict[str, torch.Tensor]:
        """What would be written, by parameter."""
        held = self.held()
        return {name: held.get(name, value).to(self.dtypes[name]).cpu() for name, value in self._rounded(None)}

    def held(self) -> dict[str, torch.Tensor]:
        """Rounded values that do not follow from the masters alone, by parameter."""
        if self.rounding is None or self.rounding.share is None:
            return {}
        return {name: self.own[name].detach() for name in self.rounding.names}

    def _rounded(self, current: Mapping[str, torch.Tensor] | None) -> Iterable[tuple[str, torch.Tensor]]:
        masters = {name: master.detach() for name, master in self.masters.items()}
        return masters.items() if self.rounding is None else self.rounding(masters, current)


def save(folder: Path, run: Run, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
    """The record comes last and names the files, so a kill leaves the state of this step or of the one before."""
    tensors = {}
    for name, master in weights.masters.items():
        tensors[f"weight.{name}"] = master.detach().cpu()
        for key, value in optimizer.state.get(master, {}).items():
            tensors[f"{key}.{name}"] = value.cpu()
    tensors |= {f"held.{name}": value.cpu() for name, value in weights.held().items()}
    write_shard(_step(folder, run.step), tensors)
    if run.best is not None and run.best_step == run.step:
        write_shard(_best(folder, run.step), weights.stored())
    write_text(folder / RECORD, json.dumps(asdict(run)))
    for path in folder.glob("*.safetensors"):
        if path not in (_step(folder, run.step), _best(folder, run.best_step)):
            path.unlink()


def load(folder: Path, weights: Weights, optimizer: torch.optim.Optimizer) -> Run | None:
    """Continue the run saved in ``folder``; None if there is none."""
    if not (folder / RECORD).exists():
        return None
    run = Run(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    entries = read_header(_step(folder, run.step))
    for name, master in weights.masters.items():
        with torch.no_grad():
            master.copy_(read_entry(entries[f"weight.{name}"]))
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}.{name}" in entries:
                value = read_entry(entries[f"{key}.{name}"])
                optimizer.state[master][key] = value if key == "step" else value.to(master.device)
    held = weights.held()
    if not held:
        weights.put()
    with torch.no_grad():
        for name, value in held.items():
            value.copy_(read_entry(entries[f"held.{name}"]))
    return run


def best(folder: Path, run: Run) -> dict[str, torch.Tensor]:
    """The best weights of a run, by parameter, in the dtype of the checkpoint; empty if the student as it came was best.
    (A student that is trained in rounded form does not come so: then its first state is one of the run.)"""
    if run.best is None:
        return {}
    return {name: read_entry(entry) for name, entry in read_header(_best(folder, run.best_step)).items()}


def _step(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}.safetensors"


def _best(folder: Path, step: int) -> Path:
    return folder / f"best-{step:07d}.safetensors"
