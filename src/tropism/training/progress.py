"""Progress of a run on the terminal; quiet where there is none."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressDisplay(Protocol):
    """What a run tells about itself while it goes on."""

    def step(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def say(self, message: str) -> None: ...
    def stage(self, name: str) -> None: ...
    def scoring(self, done: int, total: int) -> None: ...


class Quiet:
    """Says warnings on standard error, nothing else."""

    def step(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def stage(self, name: str) -> None: ...
    def scoring(self, done: int, total: int) -> None: ...

    def say(self, message: str) -> None:
        Console(stderr=True).print(message, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Live:
    """A bar with step, reward, KL, tokens per second and time left."""

    SHOWN = (
        ("reward/mean", "reward {:.3f}"),
        ("loss/nll", "loss {:.3f}"),
        ("loss/choice", "loss {:.3f}"),
        ("eval/accuracy", "held-out accuracy {:.3f}"),
        ("policy/sequence_kl", "KL {:.2f}"),
        ("throughput/tokens_per_second", "{:.0f} tok/s"),
    )

    @classmethod
    def text(cls, numbers: Mapping[str, float]) -> str:
        """The numbers that are there; no speed of steps that sample nothing."""
        shown = {name: value for name, value in numbers.items() if value or not name.startswith("throughput/")}
        return "  ".join(text.format(shown[name]) for name, text in cls.SHOWN if name in shown)

    def __init__(self, progress: Progress, task: int) -> None:
        self.progress = progress
        self.task = task
        self.scoring_task: int | None = None

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        self.progress.update(self.task, completed=step, numbers=self.text(numbers))  # type: ignore[arg-type]

    def stage(self, name: str) -> None:
        self.progress.update(self.task, description=name)  # type: ignore[arg-type]

    def scoring(self, done: int, total: int) -> None:
        """A second bar while a slow reward works; it goes when all is done."""
        if self.scoring_task is None:
            self.scoring_task = self.progress.add_task("scoring", total=total, numbers="")
        self.progress.update(self.scoring_task, completed=done)  # type: ignore[arg-type]
        if done == total:
            self.progress.remove_task(self.scoring_task)  # type: ignore[arg-type]
            self.scoring_task = None

    def say(self, message: str) -> None:
        self.progress.console.print(message, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Lines:
    """A line now and then, for terminals that cannot redraw and for logs."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total = console, total
        self.last = self.last_scored = 0.0

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self.last >= 10 or step == self.total:
            self.last = now
            self.console.print(f"step {step}/{self.total}  {Live.text(numbers)}", highlight=False)

    def stage(self, name: str) -> None: ...

    def scoring(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last_scored >= 10:
            self.last_scored = now
            self.console.print(f"scored {done}/{total}", highlight=False)

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def show_progress(total: int, *, done: int, wanted: bool | None, main: bool) -> Iterator[ProgressDisplay]:
    """A display for a run of ``total`` steps of which ``done`` are done.

    Args:
        wanted: None shows a bar on a terminal and nothing elsewhere (CI, pipes); True shows lines there; False nothing.
    """
    console = Console(stderr=True)
    live = console.is_terminal and "CI" not in os.environ
    if not main or wanted is False or (wanted is None and not live):
        yield Quiet()
    elif not live:
        yield Lines(console, total)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            yield Live(progress, progress.add_task("training", total=total, completed=done, numbers=""))
