"""Progress bars and notices. Everything goes to stderr, so that stdout stays machine-readable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

console = Console(stderr=True, highlight=False)


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` under a progress bar; in a pipe or a log the bar is one line when it ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=False) as bar:
        yield from bar.track(items, description=label, total=total)


@contextmanager
def share_done(label: str) -> Iterator[Callable[[float, str], None]]:
    """A bar for work that has no items: the function it gives takes the share done, 0 to 1, and how it goes in words."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
               TimeElapsedColumn(), TextColumn("{task.fields[words]}"))  # fmt: skip
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task(label, total=1.0, words="")
        yield lambda done, words: bar.update(task, completed=min(done, 1.0), words=words)


def notice(message: str) -> None:
    """Tell the user something they should know and did not ask for."""
    console.print(f"[yellow]note:[/yellow] {message}")


def say(message: str) -> None:
    console.print(message)
