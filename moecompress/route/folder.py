"""A checkpoint in, the same checkpoint with a routing policy out: tune, measure on held-out text, write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecompress.calibrate.data import TokenBatches, split_heldout, token_batches
from moecompress.evaluate.divergence import compare, trace
from moecompress.model.checkpoint import INDEX, Checkpoint, copy_companions, give_name, resolve, write_text
from moecompress.model.skeleton import compute_dtype, load_tokenizer
from moecompress.model.walk import OpenModel
from moecompress.pack.manifest import FOLDER, MANIFEST, read_manifest
from moecompress.pipeline import finish, refuse_target, work_folder
from moecompress.route.calibrate import observe, tune
from moecompress.runtime.loading import prepare, verify_files
from moecompress.runtime.skipping import KEY, Policy, apply


def route(model: str, output: Path, policy: str, share: float, text: str = "builtin", sequences: int = 32, length: int = 512,
          heldout: int = 8, renormalise: bool | None = None, reference: str | None = None, dtype: str = "auto",
          trust_remote_code: bool = False, tokens: TokenBatches | None = None) -> dict[str, Any]:  # fmt: skip
    """See `moecompress route --help`. ``tokens``: instead of ``text``. KL is of ``reference`` (the model itself, waking all
    experts, if None) ‖ model, in nats."""
    refuse_target(output)
    folder = resolve(model)
    verify_files(folder)
    original = folder if reference is None else resolve(reference)
    if tokens is None:
        tokens = token_batches(load_tokenizer(folder, trust_remote_code), text, sequences, length)
    used, unseen = split_heldout(tokens, heldout)
    precision = compute_dtype(original, dtype)

    def opened(where: Path) -> OpenModel:
        return OpenModel(where, precision, trust_remote_code, prepare=prepare(where, skipping=False))

    tuned = tune(policy, observe(opened(folder), used.ids.split(1), used.mask, weigh=policy == "modes"), share, renormalise)
    batches = list(unseen.ids.split(1))
    known = trace(opened(original), batches, "all experts on held-out text")
    measured: dict[str, Any] = {}
    if reference is not None:
        measured["before"] = compare(opened(folder), batches, known, "before").summary()
    routed = opened(folder)
    apply(routed.model, tuned)
    counts = counting(routed.model)
    measured["after"] = compare(routed, batches, known, "skipping").summary()
    measured["skipped"] = sum(skipped for skipped, _ in counts) / sum(calls for _, calls in counts)
    write(folder, output, tuned, measured)
    return {"output": str(output), "policy": policy, "renormalise": tuned.renormalise, "calibration_skipped": tuned.skip,
            **measured, "thresholds": {name: rule.threshold for name, rule in tuned.layers.items()}}  # fmt: skip


def counting(model: nn.Module) -> list[tuple[int, int]]:
    """A list that grows by (skipped pairs, all pairs) with every call of experts that skip."""
    counts: list[tuple[int, int]] = []

    def counted(skip: Callable, chosen: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, new = skip(chosen, weights)
        counts.append((int((left < 0).sum()), left.numel()))
        return left, new

    for module in model.modules():
        if "skipping" in module.__dict__:
            module.__dict__["skipping"] = partial(counted, module.__dict__["skipping"])
    return counts


def write(folder: Path, output: Path, policy: Policy, measured: dict[str, Any]) -> None:
    """The same files, with ``policy`` in config.json; shards are hard links where the file system allows them."""
    checkpoint = Checkpoint(folder)
    work = work_folder(output)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for shard in {entry.file for entry in checkpoint.entries.values()}:
        link(shard, work / shard.name)
    copy_companions(folder, work)
    if (folder / INDEX).exists():
        shutil.copyfile(folder / INDEX, work / INDEX)
    if (folder / FOLDER).is_dir():
        shutil.copytree(folder / FOLDER, work / FOLDER)
    write_text(work / "config.json", json.dumps(checkpoint.config | {KEY: policy.model_dump()}, indent=2))
    if (folder / FOLDER / MANIFEST).exists():
        finish(work, read_manifest(folder) | {"routing": measured}, output)
        return
    give_name(work, output)


def link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
