"""A student and a teacher in, the student with better weights out: the same files, names and dtypes."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moecompress.calibrate.data import split_heldout, token_batches
from moecompress.distill.qat import refuse_share, scheme_of
from moecompress.distill.state import Run, best
from moecompress.distill.train import Settings, make_accelerator, measure, summary, train
from moecompress.errors import UserError
from moecompress.job import Job, finish, identity, open_work, refuse_target, work_folder
from moecompress.model.anatomy import (
    EMBEDDING,
    EXPERT,
    EXPERT_BIAS,
    HEAD,
    IGNORED,
    ROUTER,
    Anatomy,
    refuse_other_tasks,
)
from moecompress.model.checkpoint import INDEX, Checkpoint, copy_companions, resolve, write_shard
from moecompress.model.skeleton import load_tokenizer, stored_names
from moecompress.model.walk import OpenModel
from moecompress.pack.manifest import FOLDER, MANIFEST, read_manifest
from moecompress.progress import notice
from moecompress.recipe import Recipe
from moecompress.runtime.loading import is_packed, load, verify_files

#: --train -> roles; names may be joined by "+". "all" leaves the tables of the vocabulary alone: a student and its teacher are compared through one head.
ROLES = {"experts": (EXPERT, EXPERT_BIAS), "router": (ROUTER,), "all": None}
#: The remedy for a teacher of another kind.
ITS_ORIGIN = "pass the model that the student was made from as --teacher"
#: What is written must measure as it did in training, up to rounding of sums.
SAME = 1e-3


def distill(student: str, teacher: str, out: Path, recipe: Recipe, settings: Settings, what: str = "all", *,
            fresh: bool = False, trust_remote_code: bool = False) -> dict[str, Any]:  # fmt: skip
    """Train ``student``'s weights (``what``: see ROLES) towards ``teacher``; ``out`` appears only when it is complete and verified.

    Returns its manifest and the ``seconds`` it took. Of the recipe, calibration and compute count. If no weights were better on
    held-out text, ``out`` is the student as it came, and the user is told.
    Raises UserError for a packed student, different vocabularies, or parameters that cannot be trained or written.
    """
    refuse_target(out)
    refuse_parts(what, settings)
    folder, source = resolve(student), resolve(teacher)
    refuse_packed(folder)
    verify_files(folder)
    verify_files(source)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    refuse_other_vocabulary(tokenizer, load_tokenizer(source, trust_remote_code))
    c = recipe.calibration
    job = Job(folder, recipe, token_batches(tokenizer, c.text, c.sequences, c.length, c.seed), trust_remote_code, c.text)
    dtypes = trained(job.opened, what)
    known = Checkpoint(source).fingerprint()
    work = work_folder(out)
    open_work(work, hashlib.sha256(f"{job.fingerprint()} {known} {what} {settings}".encode()).hexdigest(), fresh)
    guide = load(source, job.opened.dtype, trust_remote_code)
    refuse_other_tasks(guide)
    run = train_student(job, guide, dtypes, settings, work)
    if run.best_step == 0:
        named = {"kl_mean": "KL", "perplexity": "perplexity"}[settings.judge]
        notice(f"training never brought the {named} on held-out text below {run.before[settings.judge]:.5f}: the result is the student, "
               + ("rounded" if settings.qat else "unchanged"))  # fmt: skip
    ready = work / "out"
    fates = write(job.opened, best(work, run), ready)
    measured = _verify(job, guide, ready, run, settings)
    manifest = {
        **identity(job),
        "total_bytes": sum(shard.stat().st_size for shard in ready.glob("*.safetensors")),
        "method": "distill",
        "train": what,
        "settings": asdict(settings),
        "teacher": source.resolve().name,
        "steps": run.step,
        "best_step": run.best_step,
        "history": run.history,
        "before": run.before,
        "heldout": measured,
        "student": student_record(folder),
        "tensors": fates,
    }
    finish(ready, manifest, out)
    shutil.rmtree(work)
    return manifest | {"seconds": run.seconds}


def trained(opened: OpenModel, what: str) -> dict[str, torch.dtype]:
    """Parameter -> its dtype on disk, for everything that ``what`` trains.

    A parameter that is only a part of its tensor on disk stays as it is; UserError if experts or routers are such.
    """
    parts = [ROLES[part] for part in what.split("+")]
    roles = None if None in parts else {role for part in parts for role in part or ()}
    parameters = dict(opened.model.named_parameters())
    infos = [
        info
        for info in opened.anatomy.tensors
        if info.target in parameters
        and (info.role in roles if roles is not None else info.role not in (EMBEDDING, HEAD, IGNORED))
    ]
    named = stored_names(opened.loader, opened.model, {info.target: parameters[info.target] for info in infos})
    pieces = [info for info in infos if info.name not in named or named[info.name].shape != info.shape]
    for info in pieces:
        if info.role in (EXPERT, EXPERT_BIAS, ROUTER):
            raise UserError(f"{info.name} cannot be written as the checkpoint has it", expected="the names and shapes that "
                            "transformers saves this family with", remedy="load the model with transformers and save_pretrained it first")  # fmt: skip
    kept = {info.target for info in pieces}
    return {info.target: info.dtype for info in infos if info.target not in kept}


def refuse_parts(what: str, settings: Settings) -> None:
    """UserError for parts of a model that do not exist, or experts that are to be rounded but not trained."""
    parts = what.split("+")
    if not set(parts) <= set(ROLES):
        raise UserError("Unknown part of the model", expected=", ".join(ROLES) + ", or several joined by +", got=what,
                        remedy="pass one of them to --train")  # fmt: skip
    if settings.qat is not None:
        refuse_share(scheme_of(settings.qat), settings.qat_share)
        if not {"experts", "all"} & set(parts):
            raise UserError("Experts cannot be rounded without being trained", expected="experts among the trained parts",
                            got=f"--train {what}", remedy="pass --train experts+router or --train all, or leave --qat out")  # fmt: skip


def needed(anatomy: Anatomy, names: dict[str, torch.dtype]) -> list[str]:
    """Which of the parameters ``names`` must get a gradient: matrices of experts and routers. Not biases that only choose."""
    return sorted({i.target for i in anatomy.tensors
                   if i.target in names and i.role in (EXPERT, ROUTER) and len(i.shape) > 1 and min(i.shape) > 1})  # fmt: skip


def on_disk(opened: OpenModel, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters, of those that `trained` names, as the tensors that the checkpoint has of them, in its dtypes."""
    entries = opened.checkpoint.entries
    named = stored_names(opened.loader, opened.model, dict(parameters))
    assert named.keys() == {info.name for info in opened.anatomy.tensors if info.target in parameters}
    assert all(tensor.shape == entries[name].shape for name, tensor in named.items())
    return {name: tensor.to(entries[name].dtype) for name, tensor in named.items()}


def write(opened: OpenModel, parameters: dict[str, torch.Tensor], ready: Path) -> dict[str, dict[str, Any]]:
    """The student's files with new ``parameters``; returns each tensor's fate."""
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    checkpoint = opened.checkpoint
    new = on_disk(opened, parameters) if parameters else {}
    fates: dict[str, dict[str, Any]] = {}
    for shard in sorted({entry.file for entry in checkpoint.entries.values()}):
        tensors = {}
        for name in [name for name, entry in checkpoint.entries.items() if entry.file == shard]:
            old = checkpoint.read(name)
            tensors[name] = new.get(name, old)
            changed = name in new and not torch.equal(tensors[name], old)
            fates[name] = {"bytes": old.nbytes, "fate": "trained" if changed else "kept"}
        write_shard(ready / shard.name, tensors)
    for info in opened.anatomy.tensors:
        fates[info.name]["role"] = info.role
    folder = checkpoint.folder
    for name in ("config.json", INDEX):
        if (folder / name).exists():
            shutil.copyfile(folder / name, ready / name)
    copy_companions(folder, ready)
    (ready / FOLDER).mkdir()
    return fates


def student_record(folder: Path) -> dict[str, Any] | None:
    """How the student was made, if we made it: its manifest without hashes and fates."""
    if not (folder / FOLDER / MANIFEST).exists():
        return None
    return {key: value for key, value in read_manifest(folder).items() if key not in ("files", "tensors")}


def refuse_packed(folder: Path) -> None:
    if is_packed(folder):
        raise UserError("The student is already quantized", expected="an ordinary checkpoint, as prune writes it",
                        got="packed weights, which cannot be trained", remedy="distil first, then quantize the result")  # fmt: skip


def refuse_other_vocabulary(student: Any, teacher: Any) -> None:
    """Logits are compared token by token."""
    own, other = student.get_vocab(), teacher.get_vocab()
    if own != other:
        differing = len(own.items() ^ other.items())
        raise UserError("Student and teacher have different vocabularies", expected=f"the student's {len(own):,} tokens with the same numbers",
                        got=f"{len(other):,} tokens, {differing:,} of either without a counterpart", remedy=ITS_ORIGIN)  # fmt: skip


def train_student(job: Job, guide: Any, dtypes: dict[str, torch.dtype], settings: Settings, work: Path) -> Run:
    """Train the parameters ``dtypes`` of ``job``'s model towards the model ``guide``, on the job's text; see `train`."""
    model = load(job.folder, job.opened.dtype, job.trust_remote_code)
    if model.config.get_text_config().vocab_size != guide.config.get_text_config().vocab_size:
        raise UserError("Student and teacher have heads of different sizes", expected=model.config.get_text_config().vocab_size,
                        got=guide.config.get_text_config().vocab_size, remedy=ITS_ORIGIN)  # fmt: skip
    used, unseen = split_heldout(job.tokens, job.recipe.calibration.heldout)
    return train(model, guide, dtypes, needed(job.opened.anatomy, dtypes), used.ids, unseen.ids, settings, work,
                 job.opened.anatomy)  # fmt: skip


def _verify(job: Job, guide: Any, ready: Path, run: Run, settings: Settings) -> dict[str, Any]:
    """Load what was written and measure it again: it must be what training measured."""
    device = make_accelerator(settings).device
    unseen = split_heldout(job.tokens, job.recipe.calibration.heldout)[1].ids.to(device)
    again = summary(measure(load(ready, job.opened.dtype, job.trust_remote_code).to(device), guide.to(device), unseen))
    expected = (run.best or run.before)["kl_mean"]
    if abs(again["kl_mean"] - expected) > SAME * max(expected, 1e-3):
        raise UserError("What was written does not compute what was measured in training", expected=f"KL {expected:.6f}",
                        got=f"{again['kl_mean']:.6f}", remedy="this is a bug: please report it with the name of the model")  # fmt: skip
    return again
