"""What each kind of step of a recipe's ``transform`` does: an opened checkpoint in, an ordinary checkpoint out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moecompress.calibrate.observe import Calibration
from moecompress.compress import Work
from moecompress.model.walk import OpenModel
from moecompress.recipe import DropStep, MergeStep, SlimStep, expert_of
from moecompress.transform.slim import Slimming, slim
from moecompress.transform.stage import Request, transform


def fewer_experts(opened: OpenModel, step: DropStep | MergeStep, seed: int, calibration: Calibration, work: Work,
                  trust_remote_code: bool = False) -> dict[str, Any]:  # fmt: skip
    protected = tuple(expert_of(name) for name in step.protect) if isinstance(step, DropStep) else ()
    request = Request.of(opened, step.method, step.keep, protected, seed)
    return transform(opened, calibration, request, work, trust_remote_code)


def thinner_experts(opened: OpenModel, step: SlimStep, seed: int, calibration: Calibration, work: Work,
                    trust_remote_code: bool = False) -> dict[str, Any]:  # fmt: skip
    request = Slimming.of(opened, step.score, step.width, step.repair, seed=seed)
    return slim(opened, calibration, request, work, trust_remote_code)


#: Kind of step -> the function that writes the checkpoint to ``work.shards``, going on where a killed run stopped, and
#: returns a record with at least ``experts`` (layer -> ``output_error`` and more) and ``tensors`` (name -> fate).
RUN: dict[type, Callable[..., dict[str, Any]]] = {DropStep: fewer_experts, MergeStep: fewer_experts, SlimStep: thinner_experts}
