"""Distilling as a step of a recipe: what the steps before left of a model learns to follow the original again.

Between steps that take something away each time, as SlimMoE (arXiv:2506.18349) does: a little, train, a little more, train.
"""

from __future__ import annotations

import gc
from typing import Any

import psutil
import torch

from moecompress.calibrate.data import split_heldout
from moecompress.compress import Work
from moecompress.distill.folder import needed, refuse_parts, train_student, trained, write
from moecompress.distill.state import Run, best
from moecompress.distill.train import Settings, make_accelerator
from moecompress.errors import UserError
from moecompress.evaluate.divergence import compare
from moecompress.job import Job, refuse_full_disk
from moecompress.model.anatomy import EXPERT, EXPERT_BIAS, IGNORED, ROUTER
from moecompress.model.memory import trim
from moecompress.progress import notice
from moecompress.recipe import DistillStep, Recipe
from moecompress.runtime.loading import load

#: Bytes of a trained weight in memory beside the model's own: float32 master, its gradient, AdamW's two moments. And on disk, for
#: going on: all but the gradient twice, as a state is complete before the one before it goes, and the best weights twice.
TRAINED_BYTES, SAVED_BYTES = 16, 28


def settings_of(step: DistillStep, recipe: Recipe) -> Settings:
    """What `moecompress distill` makes of options with these names."""
    options = step.model_dump(exclude={"method", "max_kl", "train"})
    options["batch"] = step.batch or recipe.compute.micro_batch
    return Settings(**options, seed=recipe.compute.seed)


def refuse(job: Job, step: DistillStep, left: float = 1.0) -> None:
    """UserError for what can be known to fail before anything is done. left: share of ``job``'s expert weights that steps
    before this one leave."""
    settings = settings_of(step, job.recipe)
    refuse_parts(step.train, settings)
    job.opened.anatomy.stack  # noqa: B018 - it complains of encoders
    names = trained(job.opened, step.train)
    reached = {i.layer for i in job.opened.anatomy.tensors if i.role == ROUTER and i.target in needed(job.opened.anatomy, names)}
    if "router" in step.train.split("+") and (without := sorted(job.opened.anatomy.moe.keys() - reached)):
        raise UserError(f"Layer {without[0]} has no router that can be trained", expected="a matrix from hidden states to experts",
                        got="experts chosen in another way", remedy="train: experts or all")  # fmt: skip
    refuse_little_memory(job, settings, set(names), left)


def refuse_little_memory(job: Job, settings: Settings, names: set[str], left: float) -> None:
    """Raise UserError unless both models, the state of AdamW and the activations of a batch fit into memory (the accelerator's,
    if there is one)."""
    device = make_accelerator(settings).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    wanted = bytes_needed(job, settings, names, left)
    if wanted > free:
        raise UserError("Both models and the state of their training are too large for a distill step", got=f"{free:,} bytes free",
                        expected=f"about {wanted:,} bytes of memory: {TRAINED_BYTES} for each trained weight beside both models",
                        remedy="train less (train: router or experts), take smaller batches (batch: 1) or shorter text "
                        "(--set calibration.length=256), or leave the step out")  # fmt: skip


def bytes_needed(job: Job, settings: Settings, names: set[str], left: float = 1.0) -> int:
    """About how many bytes training the parameters ``names`` of ``job``'s model takes. left: see `refuse`."""
    anatomy, given, size = job.opened.anatomy, job.given.opened.anatomy, job.opened.dtype.itemsize
    student = trainable = 0.0
    for info in anatomy.tensors:
        weights = torch.Size(info.shape).numel() * (left if info.role in (EXPERT, EXPERT_BIAS) else 1.0)
        student += weights * (info.role != IGNORED)
        trainable += weights * (info.target in names)
    teacher = sum(torch.Size(info.shape).numel() for info in given.tensors if info.role != IGNORED)
    return int(size * (student + teacher) + TRAINED_BYTES * trainable) + settings.batch * job.tokens.ids.shape[1] * _of_a_token(job)


def _of_a_token(job: Job) -> int:
    """Bytes that a backward pass needs for a token: logits with what the loss makes of them, and the inside of every layer."""
    anatomy, size = job.opened.anatomy, job.opened.dtype.itemsize
    layout = next(iter(anatomy.moe.values())).layout
    vocabulary = job.opened.model.get_output_embeddings().weight.shape[0]
    inside = 16 * layout.hidden + (anatomy.top_k or 1) * (4 * layout.width + 4 * layout.hidden)
    return 20 * vocabulary + size * anatomy.num_layers * inside


def distilled(job: Job, step: DistillStep, before: dict[str, Any] | None, work: Work) -> dict[str, Any]:
    """Train ``job``'s model towards the original and write it to ``work.shards``; as it came, if nothing was closer on held-out
    text. A killed run goes on behind its last measurement.

    before: its summary on held-out text against the original (None: not measured yet). Returns the step's record: ``heldout``,
    ``tensors`` (name -> fate) and ``training``.
    """
    refuse(job, step)
    state = SAVED_BYTES * _weights(job, step)
    refuse_full_disk(work.shards.parent, job.opened.checkpoint.nbytes + state, "free space, choose another -o, or train less")
    work.make()
    settings = settings_of(step, job.recipe)
    if before is None:
        before = measured(job, "student")
    if _is_teacher(job, settings):
        notice("the model to distil is still the original: there is nothing to learn from it, and the step does nothing")
        run = Run(before=before)
    else:
        run = _trained(job, step, settings, work)
    kept, after = False, before
    if run.best_step:
        fates = write(job.opened, best(work.state, run), work.shards)
        after = measured(job.after(work.shards), "distill")
        # Rounded experts were compared with rounded ones; what the step before measured was not rounded.
        kept = settings.qat is not None or after[settings.judge] < before[settings.judge]
    if not kept:
        fates, after = write(job.opened, {}, work.shards), before
        if run.step:
            notice("distilling did not bring the model closer to the original on held-out text: its weights stay as they were")
    return {"heldout": after, "tensors": fates, "training": _record(job, step, settings, run) | {"before": before, "after": after, "kept": kept}}


def measured(job: Job, label: str) -> dict[str, Any]:
    """``job``'s model on held-out text, against the original."""
    return compare(job.open(), job.heldout, job.given.reference, f"{label} on held-out text").summary()


def _is_teacher(job: Job, settings: Settings) -> bool:
    return job.original is None and settings.qat is None and settings.judge == "kl_mean"


def _trained(job: Job, step: DistillStep, settings: Settings, work: Work) -> Run:
    guide = load(job.given.folder, job.opened.dtype, job.trust_remote_code)
    run = train_student(job, guide, trained(job.opened, step.train), settings, work.state)
    del guide
    gc.collect()  # hooks and models hold each other
    trim()
    return run


def _record(job: Job, step: DistillStep, settings: Settings, run: Run) -> dict[str, Any]:
    used, _ = split_heldout(job.tokens, job.recipe.calibration.heldout)
    record = {
        "steps": run.step,
        "best_step": run.best_step,
        "seconds": run.seconds,
        "tokens": run.step * settings.batch * settings.accumulate * used.ids.shape[1],
        "weights": _weights(job, step),
        "history": run.history,
        # How far the minutes went is up to the machine, and the learning rate follows the clock.
        "repeatable": step.minutes is None,
    }
    return record | ({"rounded": run.before} if settings.qat is not None else {})


def _weights(job: Job, step: DistillStep) -> int:
    """How many weights the step trains."""
    sizes = {name: parameter.numel() for name, parameter in job.opened.model.named_parameters()}
    return sum(sizes[name] for name in trained(job.opened, step.train))
