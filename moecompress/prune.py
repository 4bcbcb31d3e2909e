"""The steps of a recipe's ``transform``, those that take away and those that train: run one after the other before anything is
quantized, measured, guarded, recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moecompress.compress import Work
from moecompress.distill.step import distilled, refuse
from moecompress.errors import UserError
from moecompress.evaluate.divergence import compare
from moecompress.job import Job, finish, identity, open_work, refuse_full_disk, refuse_target, work_folder
from moecompress.model.checkpoint import write_text
from moecompress.pack.manifest import FOLDER, fates_through
from moecompress.progress import say
from moecompress.recipe import DistillStep, SlimStep
from moecompress.transform.steps import RUN


def prune(job: Job, out: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Only the steps: ``out``, an ordinary checkpoint, appears only when it is complete and verified. Returns its manifest.

    Of the recipe, transform, calibration and compute count.
    """
    if not job.recipe.transform:
        raise UserError("Nothing to do", expected="a recipe with transform steps", got="none")
    refuse_target(out)
    work = work_folder(out)
    open_work(work, job.fingerprint(), fresh)
    smaller, steps = transformed(job, work)
    ready = smaller.folder
    records = ready / FOLDER
    records.mkdir(exist_ok=True)
    write_text(records / "recipe.yaml", job.recipe.to_yaml())
    manifest = {
        **identity(job),
        "total_bytes": steps[-1]["total_bytes"],
        "expert_weights": job.opened.anatomy.expert_weights,
        "heldout": steps[-1]["heldout"],
        **account(job, steps),
    }
    finish(ready, manifest, out)
    shutil.rmtree(work)
    return manifest


def transformed(job: Job, work: Path) -> tuple[Job, list[dict[str, Any]]]:
    """The job for what the recipe's steps leave of its model, and a record of each step.

    A step's result is an ordinary checkpoint in ``work``, kept until the next step is done with it. Finished steps, and
    finished layers of a killed one, are not done again. UserError where a step moved the model further than it may.
    """
    records: list[dict[str, Any]] = []
    look_ahead(job, work)
    for number, step in enumerate(job.recipe.transform):
        folder, last = (work / f"step-{n}" for n in (number, number - 1))
        done = folder / "record.json"
        if not done.exists():
            before = records[-1]["heldout"] if records else None
            record = run(job.after(last / "out") if number else job, step, folder, before)
            write_text(done, json.dumps(record))
        records.append(json.loads(done.read_text()))
        shutil.rmtree(folder / "state", ignore_errors=True)
        shutil.rmtree(last / "out", ignore_errors=True)
        refuse_jump(f"Step {number + 1} of transform ({step.method})", records[-1], step.max_kl)
    return (job.after(folder / "out") if records else job), records


def look_ahead(job: Job, work: Path) -> None:
    """UserError for what training later on will complain of, before the first step."""
    layout = next(iter(job.opened.anatomy.moe.values())).layout
    experts, width = float(layout.experts), float(layout.width)
    for number, step in enumerate(job.recipe.transform):
        if isinstance(step, DistillStep):
            if not (work / f"step-{number}" / "record.json").exists():
                refuse(job, step, experts * width / (layout.experts * layout.width))
        elif isinstance(step, SlimStep):
            width = step.width * width if step.width < 1 else step.width
        else:
            experts = step.keep * experts if step.keep < 1 else step.keep


def run(job: Job, step: Any, folder: Path, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """One step on ``job``'s model: the checkpoint goes to ``folder``/out, and is measured against the original.

    before: what the step before it measured."""
    refuse_full_disk(folder, job.opened.checkpoint.nbytes, "free space, or choose another -o")
    work = Work(folder / "out", folder / "state")
    done = distilled(job, step, before, work) if isinstance(step, DistillStep) else reshaped(job, step, work)
    say(words(step.method, done))
    return {
        "step": step.model_dump(mode="json", exclude={"max_kl"}),
        "total_bytes": sum(shard.stat().st_size for shard in work.shards.glob("*.safetensors")),
        "expert_weights_left": job.after(work.shards).opened.anatomy.expert_weights,
        **done,
    }


def reshaped(job: Job, step: Any, work: Work) -> dict[str, Any]:
    """A step that makes the experts fewer or smaller."""
    done = RUN[type(step)](job.open(), step, job.recipe.compute.seed, job.calibration, work, job.trust_remote_code)
    smaller = job.after(work.shards)
    return {"heldout": compare(smaller.opened, job.heldout, job.given.reference, f"{step.method} on held-out text").summary(), **done}


def words(method: str, record: Mapping[str, Any]) -> str:
    kl = f"{method}: KL {record['heldout']['kl_mean']:.5f} nats to the original on held-out text"
    if "training" in record:
        made = record["training"]
        return f"{kl} (before: {made['before']['kl_mean']:.5f}) after {made['steps']} steps in {made['seconds']:.0f} s" + (
            "" if made["kept"] else ", undone")  # fmt: skip
    layer, error = worst_layer(record)
    return f"{kl}; most changed is layer {layer}, whose experts' output is off by {error:.1%}"


def worst_layer(record: Mapping[str, Any]) -> tuple[int, float]:
    """The layer whose experts' output a step changed most, and by how much of its norm. (Training has no such record.)"""
    errors = {int(layer): one["output_error"] for layer, one in record["experts"].items()}
    layer = max(errors, key=errors.__getitem__)
    return layer, errors[layer]


def refuse_jump(what: str, record: Mapping[str, Any], limit: float | None) -> None:
    kl = record["heldout"]["kl_mean"]
    if limit is None or kl <= limit:
        return
    if "training" in record:
        found, failed = "after training", "left the model too far from the original"
        remedy = "train longer or with another rate, change less in the steps before it"
    else:
        layer, error = worst_layer(record)
        found, failed = f"most changed is layer {layer}, whose experts' output is off by {error:.1%}", "changed the model too much"
        remedy = "change less, protect experts of that layer, choose another method"
    raise UserError(f"{what} {failed}", expected=f"at most {limit:g} nats of KL to the original on held-out text "
                    "(max_kl of the step)", got=f"{kl:.4g} nats; {found}",
                    remedy=f"{remedy} or text more like the model's use; with a larger max_kl, or null, the same command goes on "
                    "from here")  # fmt: skip


def account(job: Job, steps: list[dict[str, Any]], last: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """What a manifest says about the steps, and the fate of the original's tensors through them and the ``last`` stage."""
    return {
        "steps": without_fates(steps),
        "tensors": fates_through(job.given.opened.anatomy, [step["tensors"] for step in steps], last),
    }


def without_fates(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in step.items() if key != "tensors"} for step in steps]
