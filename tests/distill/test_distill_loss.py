"""The loss against its formula in float64, token by token, and the schedule of a run."""

from __future__ import annotations

import math

import pytest
import torch

from moecompress.distill.loss import cross_entropy, divergence, targets
from moecompress.distill.state import Run
from moecompress.distill.train import Settings, objective, sequences_of
from moecompress.errors import UserError

VOCABULARY = 11


def softmax(row: list[float]) -> list[float]:
    most = max(row)
    parts = [math.exp(x - most) for x in row]
    return [part / math.fsum(parts) for part in parts]


def by_hand(student: list[float], teacher: list[float], top: int) -> float:
    """KL over the teacher's ``top`` tokens and all others as one, in Python's floats (float64)."""
    p, q = softmax(teacher), softmax(student)
    chosen = sorted(range(len(p)), key=lambda i: -p[i])[:top]
    pairs = [(p[i], q[i]) for i in chosen]
    if top < len(p):
        pairs.append((math.fsum(p) - math.fsum(a for a, _ in pairs), math.fsum(q) - math.fsum(b for _, b in pairs)))
    return math.fsum(a * math.log(a / b) for a, b in pairs)


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Of a student and a teacher, [2, 5, V]."""
    drawn = 3 * torch.randn(2, 2, 5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return drawn[0], drawn[1]


@pytest.mark.parametrize(("asked", "top"), [(1, 1), (4, 4), (VOCABULARY - 1, VOCABULARY - 1), (0, VOCABULARY), (99, VOCABULARY)])
def test_divergence_is_the_formula(logits, asked: int, top: int) -> None:
    student, teacher = logits
    got = divergence(student, *targets(teacher, asked))
    assert got.shape == (2, 5)
    wanted = [by_hand(s, t, top) for s, t in zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True)]
    torch.testing.assert_close(got.flatten().double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_the_formula(logits) -> None:
    """Central differences of the float64 formula."""
    student, teacher = logits[0][0, 0], logits[1][0, 0]
    student = student.clone().requires_grad_(True)
    divergence(student, *targets(teacher, 3)).backward()
    row, other, step = student.tolist(), teacher.tolist(), 1e-5
    for i in range(VOCABULARY):
        up, down = ([x + sign * step * (j == i) for j, x in enumerate(row)] for sign in (1, -1))
        assert float(student.grad[i]) == pytest.approx((by_hand(up, other, 3) - by_hand(down, other, 3)) / (2 * step), abs=1e-5)


def test_tokens_that_are_ruled_out_do_no_harm(logits) -> None:
    """Models with a padded vocabulary give its padding −∞."""
    student, teacher = (part[0, 0].clone() for part in logits)
    for row in (student, teacher):
        row[-2:] = -torch.inf
    student.requires_grad_(True)
    for asked, top in ((4, 4), (0, VOCABULARY - 2)):
        got = divergence(student, *targets(teacher, asked))
        assert float(got.detach()) == pytest.approx(by_hand(student[:-2].tolist(), teacher[:-2].tolist(), top), rel=1e-5)
        (gradient,) = torch.autograd.grad(got, student)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("done", "share", "weight"), [(0.0, 1.0, 0.0), (0.2, 0.5, 0.3), (0.5, 0.5, 0.3), (0.9, 0.5, 2.0)])
def test_the_staged_objective(logits, done: float, share: float, weight: float) -> None:
    student, teacher = logits
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    settings = Settings(steps=1, kd_share=share, cross_entropy=weight)
    got = objective(student, ids, *targets(teacher, 4), settings, done)
    rows, others = student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist()
    kl = sum(by_hand(s, t, 4) for s, t in zip(rows, others, strict=True)) / 10
    text = -sum(math.log(softmax(student[b, t].tolist())[int(ids[b, t + 1])]) for b in range(2) for t in range(4)) / 8
    assert float(got) == pytest.approx((kl if done < share else 0.0) + weight * text, rel=1e-5)
    assert float(cross_entropy(student, ids)) == pytest.approx(text, rel=1e-5)


def test_every_pass_over_the_text_sees_all_of_it_once() -> None:
    drawn = [row for step in range(7) for row in sequences_of(step, 6, 21, seed=3)]  # two passes
    assert sorted(drawn[:21]) == sorted(drawn[21:]) == list(range(21))
    assert drawn[:21] != drawn[21:]
    assert sequences_of(5, 6, 21, seed=3) == drawn[30:36]  # a resumed run needs no history


def test_the_learning_rate() -> None:
    settings = Settings(steps=100, rate=2.0, warmup=0.1)
    rates = [settings.rate_at(step / 100) for step in range(101)]
    assert rates[0] > 0 and rates[:11] == sorted(rates[:11]) and rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[100] == pytest.approx(0)
    assert rates[55] == pytest.approx(1.0)  # half of the way down


def test_the_budget_that_ends_first_counts() -> None:
    settings = Settings(steps=10, minutes=1.0)
    assert settings.done(Run(step=5, seconds=6)) == 0.5
    assert settings.done(Run(step=5, seconds=60)) == 1.0


@pytest.mark.parametrize(("given", "complaint"), [
    ({}, "No budget"), ({"minutes": 0.0, "steps": 3}, "No budget"),
    ({"steps": 1, "kd_share": 0.5}, "Nothing would be trained on"),
])  # fmt: skip
def test_settings_that_make_no_sense(given: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Settings(**given)
