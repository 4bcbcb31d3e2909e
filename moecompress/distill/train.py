"""The training loop: a frozen teacher, a student, AdamW, and a look at held-out text every now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecompress.distill.balance import Balance
from moecompress.distill.loss import cross_entropy, divergence, targets
from moecompress.distill.qat import rounding_of
from moecompress.distill.state import Run, Weights, load, save
from moecompress.errors import UserError
from moecompress.evaluate.divergence import Divergence, token_divergence
from moecompress.model.anatomy import Anatomy
from moecompress.progress import share_done

#: Teacher's targets are kept for the next time that their text comes up, up to this many bytes.
KEPT_TARGETS = 1024**3


@dataclass(frozen=True)
class Settings:
    """How to train. ``steps`` or ``minutes`` (or both: whichever ends first) is the budget."""

    steps: int | None = None
    minutes: float | None = None
    #: most likely tokens of the teacher that are told apart from the others; 0: all tokens
    top_logits: int = 64
    #: weight of the next-token cross-entropy beside the KL
    cross_entropy: float = 0.0
    #: share of the run after which the KL term stops (MoS, arXiv:2201.05596: a student too small to follow its teacher
    #: to the end is better left to the text alone)
    kd_share: float = 1.0
    rate: float = 1e-4
    #: share of the run in which the learning rate rises; behind it, it falls to zero along a cosine
    warmup: float = 0.05
    weight_decay: float = 0.0
    #: longest gradient over all trained weights; longer ones are shortened to it; 0: no limit
    clip: float = 1.0
    #: sequences that go through the model together, and how often before the weights move
    batch: int = 4
    accumulate: int = 2
    #: steps between measurements on held-out text; after each the state is saved
    check_every: int = 25
    seed: int = 0
    #: what experts are rounded to while they are trained (see `qat.scheme_of`); None: nothing
    qat: str | None = None
    #: ternary experts: share of a matrix's codes that a step may change; None: as many as rounding changes
    qat_share: float | None = None
    #: weight of the load-balance loss
    balance: float = 0.0

    def __post_init__(self) -> None:
        budgets = [budget for budget in (self.steps, self.minutes) if budget is not None]
        if not budgets or min(budgets) <= 0:
            raise UserError("No budget", expected="a number of steps or minutes", remedy="pass --steps or --minutes")
        if self.kd_share < 1 and self.cross_entropy == 0:
            raise UserError("Nothing would be trained on once the distillation term stops", expected="--cross-entropy above 0",
                            got=f"--kd-share {self.kd_share:g} and no cross-entropy", remedy="pass --cross-entropy 1, or leave out --kd-share")  # fmt: skip

    @property
    def judge(self) -> str:
        """What the best weights have least of on held-out text: KL to the teacher, unless nothing is learnt from it."""
        return "kl_mean" if self.kd_share > 0 else "perplexity"

    def done(self, run: Run) -> float:
        """Share of the budget that is used up; 1 or more: the end."""
        by_step = run.step / self.steps if self.steps is not None else 0.0
        by_time = run.seconds / (60 * self.minutes) if self.minutes is not None else 0.0
        return max(by_step, by_time)

    def rate_at(self, done: float) -> float:
        """The learning rate where the share ``done`` of the budget is used up. It starts at a tenth of its rise, not at zero."""
        if done < self.warmup:
            return self.rate * max(done / self.warmup, 0.1)
        return self.rate * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup))) / 2


class Teacher:
    """A frozen model and what it said of the sequences it has seen.

    Each sequence goes through it alone, so that what it says does not depend on the company.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor, top: int):
        self.model, self.ids, self.top = model, ids, top
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.room = KEPT_TARGETS

    def targets(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """`loss.targets` of the sequences ``rows``: [B, L, k + 1] and [B, L, k]."""
        known, index = zip(*map(self._of, rows), strict=True)
        return torch.stack(known), torch.stack(index)

    @torch.no_grad()
    def _of(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        if row in self.kept:
            return self.kept[row]
        found = targets(self.model(input_ids=self.ids[row : row + 1], use_cache=False).logits[0], self.top)
        size = sum(tensor.nbytes for tensor in found)
        if size <= self.room:
            self.room -= size
            self.kept[row] = found
        return found


def train(student: nn.Module, teacher: nn.Module, dtypes: dict[str, torch.dtype], needed: Sequence[str], ids: torch.Tensor,
          heldout: torch.Tensor, settings: Settings, folder: Path, anatomy: Anatomy | None = None, label: str = "distill"
          ) -> Run:  # fmt: skip
    """Train the parameters named in ``dtypes`` on ids [N, L]; the best weights on ``heldout`` [M, L] are kept in ``folder``.

    dtypes: on disk, by parameter. needed: of these, the ones that must get a gradient. A run that ``folder`` holds is continued.
    Both models stay in evaluation mode: no dropout, and experts are chosen as they will be. anatomy: of the student, needed to
    round or balance its experts.
    Raises UserError if the loss is not finite, or no gradient reaches a parameter of ``needed``.
    """
    accelerator = make_accelerator(settings)
    student, teacher = student.to(accelerator.device).eval(), teacher.to(accelerator.device).eval()
    ids, heldout = ids.to(accelerator.device), heldout.to(accelerator.device)
    teacher.requires_grad_(False)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in dtypes)
    rounding = rounding_of(anatomy, settings.qat, settings.qat_share) if settings.qat is not None and anatomy is not None else None
    balance = Balance(student, anatomy) if settings.balance > 0 and anatomy is not None else None
    weights = Weights(student, dtypes, rounding)
    weights.put()
    # Fused, all of AdamW is one pass over the weights. On a GPU the default is as fast.
    fused = True if accelerator.device.type == "cpu" else None
    optimizer = torch.optim.AdamW(weights.masters.values(), lr=settings.rate, weight_decay=settings.weight_decay, fused=fused)
    run = load(folder, weights, optimizer)
    started = time.monotonic() - (run.seconds if run is not None else 0.0)
    if run is None:
        run = Run(before=summary(measure(student, teacher, heldout)))
        if rounding is not None:  # nothing on disk is rounded yet
            run.best = run.before
        save(folder, run, weights, optimizer)
    asked = Teacher(teacher, ids, settings.top_logits)
    losses: list[float] = []
    with share_done(label) as show:
        while (done := settings.done(run)) < 1:
            rows = sequences_of(run.step, settings.batch * settings.accumulate, len(ids), settings.seed)
            losses.append(_backward(student, asked, rows, settings, done, accelerator, balance))
            if not math.isfinite(losses[-1]):
                raise UserError(f"The loss of step {run.step + 1} is not finite", expected="a number", got=losses[-1],
                                remedy="lower --rate and start over with --fresh, or compute in float32 (--set compute.dtype=float32)")  # fmt: skip
            if run.step == 0:
                _refuse_unreached(weights, needed)
            weights.take_gradients()
            if settings.clip > 0:
                accelerator.clip_grad_norm_(weights.masters.values(), settings.clip)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate_at(done)
            optimizer.step()
            optimizer.zero_grad()  # the memory is for the model's own gradients now
            weights.put()
            run.step += 1
            run.seconds = time.monotonic() - started
            if run.step % settings.check_every == 0 or settings.done(run) >= 1:
                _check(run, measure(student, teacher, heldout), settings.judge, sum(losses) / len(losses))
                losses.clear()
                run.seconds = time.monotonic() - started
                save(folder, run, weights, optimizer)
            show(settings.done(run), _words(run, losses))
    return run


def make_accelerator(settings: Settings) -> Any:
    """accelerate's choice of a device; one process."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=settings.accumulate)
    if accelerator.num_processes > 1:
        raise UserError("distill runs in one process", expected="no launcher", got=f"{accelerator.num_processes} processes",
                        remedy="start it without accelerate launch or torchrun")  # fmt: skip
    return accelerator


def _backward(student: nn.Module, teacher: Teacher, rows: Sequence[int], settings: Settings, done: float,
              accelerator: Any, balance: Balance | None) -> float:  # fmt: skip
    """Gradients of a step's loss into the student's parameters; returns the loss."""
    total = 0.0
    for start in range(0, len(rows), settings.batch):
        some = list(rows[start : start + settings.batch])
        ids = teacher.ids[some]
        logits = student(input_ids=ids, use_cache=False).logits
        known, index = teacher.targets(some) if done < settings.kd_share else (None, None)
        loss = objective(logits, ids, known, index, settings, done)
        if balance is not None:
            loss = loss + settings.balance * balance.take()
        accelerator.backward(loss)  # divides by the number of micro-batches
        total += float(loss.detach()) / settings.accumulate
    return total


def objective(logits: torch.Tensor, ids: torch.Tensor, known: torch.Tensor | None, index: torch.Tensor | None, settings: Settings,
              done: float) -> torch.Tensor:  # fmt: skip
    """Staged distillation (MoS): [done < kd_share] · mean KL + weight · cross-entropy, in nats. known, index: `loss.targets`,
    not needed behind kd_share."""
    loss = logits.new_zeros((), dtype=torch.float32)
    if done < settings.kd_share:
        assert known is not None and index is not None
        loss = loss + divergence(logits, known, index).mean()
    if settings.cross_entropy > 0:
        loss = loss + settings.cross_entropy * cross_entropy(logits, ids)
    return loss


def sequences_of(step: int, count: int, total: int, seed: int) -> list[int]:
    """The ``count`` of ``total`` sequences that a step trains on: every pass over the text has an order of its own."""
    chosen: list[int] = []
    for place in range(step * count, (step + 1) * count):
        epoch, within = divmod(place, total)
        if within == 0 or not chosen:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(seed + epoch))
        chosen.append(int(order[within]))
    return chosen


@torch.no_grad()
def measure(student: nn.Module, teacher: nn.Module, ids: torch.Tensor) -> Divergence:
    """The student beside its teacher on ids [M, L], each by its own forward pass and its own head. KL over all tokens."""
    parts = []
    for one in ids.split(1):
        own, known = (model(input_ids=one, use_cache=False).logits for model in (student, teacher))
        parts.append(token_divergence(own, known, one))
    kl, agree, nll, reference_nll = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Divergence(kl, agree, nll, reference_nll, {})


def summary(found: Divergence) -> dict[str, Any]:
    return {key: value for key, value in found.summary().items() if not key.startswith("router_agreement")}


def _check(run: Run, measured: Divergence, judge: str, loss: float) -> None:
    """Remember what was measured if nothing was better."""
    found = summary(measured)
    run.history.append({"step": run.step, "loss": loss, "kl_mean": found["kl_mean"], judge: found[judge]})
    if found[judge] < (run.best or run.before)[judge]:
        run.best, run.best_step = found, run.step


def _refuse_unreached(weights: Weights, needed: Sequence[str]) -> None:
    for name in needed:
        if weights.own[name].grad is None:
            raise UserError(f"No gradient reaches {name}", expected="experts and routers that take part in every prediction",
                            remedy="this architecture cannot be distilled yet; --train may leave these parameters out")  # fmt: skip


def _words(run: Run, losses: Sequence[float]) -> str:
    """The state of a run for its bar."""
    loss = losses[-1] if losses else run.history[-1]["loss"]
    latest = run.history[-1]["kl_mean"] if run.history else run.before["kl_mean"]
    return f"step {run.step}, loss {loss:.4f}, held-out KL {run.before['kl_mean']:.4f} → {latest:.4f}"
