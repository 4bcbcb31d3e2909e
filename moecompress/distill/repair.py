"""Router repair: a compressed model's routers learn to follow the original's predictions again. Nothing else moves, and no
byte is added. (GEMQ, arXiv:2605.23078, tunes routers on the text's next tokens; here it is the original's distribution.)"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import nn

from moecompress.calibrate.data import split_heldout
from moecompress.distill.folder import on_disk, trained
from moecompress.distill.state import best
from moecompress.distill.train import Settings, train
from moecompress.errors import UserError
from moecompress.evaluate.divergence import head_replaced, trace
from moecompress.job import Job
from moecompress.model.checkpoint import TensorEntry, read_entry, read_header, write_shard
from moecompress.model.memory import recomputing
from moecompress.route.folder import link
from moecompress.runtime.loading import load

HIDDEN = "original.safetensors"


class Original(nn.Module):
    """What the original says of sequences it was run on before, from the inputs of its head: it need not be in memory.

    The head, and what comes behind it, is that of the ``student``: compression leaves it as it was.
    """

    def __init__(self, student: nn.Module, known: dict[str, TensorEntry]):
        """``known``: by `name_of` a sequence, hidden states [L, d] on disk."""
        super().__init__()
        self.student = (student,)  # not a part of this module
        self.known = known

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits [B, L, V]. The student runs along, as only it knows what it does around its head."""
        (student,) = self.student
        hidden = torch.stack([read_entry(self.known[name_of(ids)]) for ids in input_ids]).to(input_ids.device)
        with head_replaced(student, lambda x, forward: forward(hidden.to(x.dtype))):
            return SimpleNamespace(logits=student(input_ids=input_ids, use_cache=use_cache).logits)


def name_of(ids: torch.Tensor) -> str:
    """A name for a sequence of token ids [L]."""
    return hashlib.sha256(ids.cpu().long().numpy().tobytes()).hexdigest()


def settings_of(job: Job) -> Settings:
    """One sequence at a time: of the memory of a step, logits are the largest part."""
    wish, compute = job.recipe.repair, job.recipe.compute
    return Settings(steps=wish.steps, rate=wish.rate, batch=1, accumulate=wish.batch, check_every=max(1, wish.steps // 8), seed=compute.seed)


def repair_routers(job: Job, ready: Path, work: Path) -> tuple[Path | None, dict[str, Any]]:
    """Train the routers of the packed folder ``ready``; a folder inside ``work`` with the best of them and otherwise the same
    files, or None if nothing was better on held-out text; and what was done.

    A killed run goes on from its last measurement. The packed model must fit into memory.
    """
    work.mkdir(parents=True, exist_ok=True)
    used, unseen = split_heldout(job.tokens, job.recipe.calibration.heldout)
    dtypes = trained(job.opened, "router")
    known = remember(job, [used.ids, unseen.ids], work)
    student = load(ready, job.opened.dtype, job.trust_remote_code)
    settings = settings_of(job)
    state = work / "training"
    state.mkdir(exist_ok=True)
    layers: Any = student.get_submodule(job.opened.anatomy.stack)
    with recomputing(layers):
        run = train(student, Original(student, known), dtypes, (), used.ids, unseen.ids, settings, state, label="repair")
    record = {"trained": sorted(dtypes), "weights": sum(p.numel() for n, p in student.named_parameters() if n in dtypes),
              "steps": run.step, "best_step": run.best_step, "rate": settings.rate, "history": run.history}  # fmt: skip
    if run.best is None:
        return None, record
    changed = on_disk(job.opened, best(state, run))
    return write(ready, changed, work / "out"), record


def refuse_little_memory(job: Job, packed_bytes: int) -> None:
    """Raise UserError unless the packed model and the logits of a sequence with their gradients fit into memory."""
    vocabulary = job.opened.model.get_output_embeddings().weight.shape[0]
    wanted = packed_bytes + 20 * job.tokens.ids.shape[1] * vocabulary + 2 * job.opened.anatomy.largest_layer
    free = psutil.virtual_memory().available
    if wanted > free:
        raise UserError("The compressed model is too large for --repair router", expected=f"about {wanted:,} bytes of memory: all packed weights at once",
                        got=f"{free:,} bytes free", remedy="leave the repair out, or use shorter text (--set calibration.length=256)")  # fmt: skip


def remember(job: Job, texts: Iterable[torch.Tensor], work: Path) -> dict[str, TensorEntry]:
    """Run the original, a layer at a time, and keep on disk what its head is given for every sequence of ids [N, L]."""
    path = work / HIDDEN
    if not path.exists():
        batches = [batch for ids in texts for batch in ids.split(job.recipe.compute.micro_batch)]
        hidden = trace(job.given.open(), batches, "original, for the repair").hidden
        found = {name_of(ids): row for batch, rows in zip(batches, hidden, strict=True) for ids, row in zip(batch, rows, strict=True)}
        write_shard(path, found)
    return read_header(path)


def write(ready: Path, changed: dict[str, torch.Tensor], out: Path) -> Path:
    """The files of ``ready`` with ``changed`` tensors in them; shards without any are the same files."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ready, out, ignore=shutil.ignore_patterns("*.safetensors"))
    left = set(changed)
    for shard in sorted(ready.glob("*.safetensors")):
        entries = read_header(shard)
        here = left & set(entries)
        if not here:
            link(shard, out / shard.name)
            continue
        tensors = {name: changed[name] if name in here else read_entry(entry) for name, entry in entries.items()}
        assert all(tensors[name].dtype == entries[name].dtype and tensors[name].shape == entries[name].shape for name in here)
        write_shard(out / shard.name, tensors)
        left -= here
    assert not left, f"tensors that no shard has: {sorted(left)}"
    return out
