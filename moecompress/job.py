"""What every stage is a function of, and the folders it works in."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moecompress.calibrate.data import TokenBatches, split_heldout, token_batches
from moecompress.calibrate.observe import Calibration
from moecompress.errors import UserError
from moecompress.evaluate.divergence import Trace, trace
from moecompress.kernels import trellis
from moecompress.model.checkpoint import give_name, resolve, write_text
from moecompress.model.skeleton import compute_dtype, load_tokenizer
from moecompress.model.walk import OpenModel
from moecompress.pack.manifest import write_manifest
from moecompress.pack.scheme import Scheme
from moecompress.progress import notice, say
from moecompress.quantize.encode import Settings
from moecompress.recipe import INTEGERS, TRELLIS_AND_WIDE, Recipe
from moecompress.runtime.loading import verify_files
from moecompress.runtime.registration import FORMAT_VERSION
from moecompress.transform.shed import Slicing, slicing

#: Memory for the Hessians and working copies of a chunk of experts, as a share of the largest layer; and at least.
WORKSPACE_SHARE, WORKSPACE_LEAST = 0.125, 64 * 1024**2


@dataclass(frozen=True)
class Job:
    """Everything the stages are functions of.

    folder: the model to work on. original: the job as it was given, where steps of the recipe have changed the model since.
    """

    folder: Path
    recipe: Recipe
    tokens: TokenBatches
    trust_remote_code: bool = False
    text: str = "builtin"
    original: Job | None = None
    opened: OpenModel = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "opened", self.open())

    def open(self) -> OpenModel:
        """A fresh skeleton: compressing changes it, so every pass has its own."""
        return OpenModel(self.folder, compute_dtype(self.folder, self.recipe.compute.dtype), self.trust_remote_code)

    @property
    def given(self) -> Job:
        """The job with the model that everything is measured against, and that bits are counted by."""
        return self.original or self

    def after(self, folder: Path) -> Job:
        """The same job for what a step made of the model."""
        return replace(self, folder=folder, original=self.given)

    @cached_property
    def reference(self) -> Trace:
        """The original on held-out text."""
        return trace(self.open(), self.heldout, "original on held-out text")

    @cached_property
    def slicing(self) -> Slicing:
        """How layers of this model get fewer experts; UserError if they cannot."""
        return slicing(self.opened, self.trust_remote_code)

    @property
    def heldout(self) -> list[torch.Tensor]:
        return list(split_heldout(self.tokens, self.recipe.calibration.heldout)[1].ids.split(1))

    @property
    def calibration(self) -> Calibration:
        used, _ = split_heldout(self.tokens, self.recipe.calibration.heldout)
        workspace = max(WORKSPACE_LEAST, int(WORKSPACE_SHARE * self.opened.anatomy.largest_layer))
        return Calibration(used.ids, used.mask, self.recipe.compute.micro_batch, self.recipe.quantize.hessian,
                           self.recipe.quantize.shrink, workspace, self.text)  # fmt: skip

    @property
    def settings(self) -> Settings:
        q = self.recipe.quantize
        return Settings(q.method, q.damping, q.order, q.refine, q.allow_fallback, q.ternary, self.recipe.compute.seed)

    @property
    def schemes(self) -> list[Scheme]:
        """The recipe's candidates, or what stands for them."""
        candidates, plain = self.recipe.allocate.candidates, self._plain_rounding or self.without_trellis
        chosen = candidates if candidates is not None else INTEGERS if plain else TRELLIS_AND_WIDE
        return [Scheme(c.bits, c.group, c.symmetric, c.code, c.outliers, c.shares) for c in chosen]

    @property
    def without_trellis(self) -> bool:
        """Are integers used for want of the compiled encoder?"""
        return self.recipe.allocate.candidates is None and not self._plain_rounding and not trellis.available()

    @property
    def _plain_rounding(self) -> bool:
        return self.recipe.allocate.allocator == "pmq" or self.recipe.quantize.method == "rtn"

    def fingerprint(self) -> str:
        recipe = self.recipe.without_limits()
        parts = [FORMAT_VERSION, self.opened.checkpoint.fingerprint(), recipe.fingerprint(), self.tokens.fingerprint,
                 str(self.opened.dtype), torch.__version__, torch.get_num_threads()]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def make_job(model: str, recipe: Recipe, trust_remote_code: bool = False, tokens: TokenBatches | None = None) -> Job:
    folder = resolve(model)
    if tokens is None:
        c = recipe.calibration
        tokens = token_batches(load_tokenizer(folder, trust_remote_code), c.text, c.sequences, c.length, c.seed)
    return Job(folder, recipe, tokens, trust_remote_code, recipe.calibration.text)


# --- folders --------------------------------------------------------------------------------------------------------


def refuse_target(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"The output folder {out} is not empty", expected="a new or empty folder",
                        remedy="choose another -o, or remove it first")  # fmt: skip
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK):
        raise UserError(f"Cannot write to {parent}", expected="write permission", remedy="choose another -o")


def work_folder(out: Path) -> Path:
    out = out.absolute()
    return out.with_name(f".{out.name}.moecompress-work")


def open_work(work: Path, fingerprint: str, fresh: bool) -> None:
    """Keep the work of an earlier run only if it was of exactly this job."""
    mark = work / "fingerprint"
    if work.exists():
        if not fresh and mark.exists() and mark.read_text() == fingerprint:
            say("resuming the unfinished run found beside the output folder")
            return
        if not fresh:
            notice("an unfinished run with other inputs was found beside the output folder; starting afresh")
        shutil.rmtree(work)
    work.mkdir(parents=True)
    write_text(mark, fingerprint)


def finish(ready: Path, manifest: dict[str, Any], out: Path) -> None:
    """Hash, verify, and only then give the folder its name."""
    write_manifest(ready, manifest)
    verify_files(ready)
    give_name(ready, out)


def identity(job: Job) -> dict[str, Any]:
    """What a manifest says about the input."""
    given = job.given
    anatomy, checkpoint = given.opened.anatomy, given.opened.checkpoint
    return {
        "model": {"model_type": anatomy.model_type, "architecture": anatomy.architecture,
                  "fingerprint": checkpoint.config.get("_name_or_path") or given.folder.name},
        "calibration": {"text": job.text, "tokens": int(job.calibration.mask.sum()), "fingerprint": job.tokens.fingerprint},
        "compute_dtype": str(job.opened.dtype).removeprefix("torch."),
        "input_bytes": checkpoint.nbytes,
    }  # fmt: skip


def refuse_full_disk(out: Path, needed: int, remedy: str) -> None:
    """Before the long part: can the disk beside ``out`` hold ``needed`` bytes more?"""
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise UserError("The disk is too full", expected=f"{needed:,} bytes free beside {out}", got=f"{free:,}", remedy=remedy)
