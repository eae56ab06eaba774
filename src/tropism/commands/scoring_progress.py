"""How far a command has come that scores and keeps what it scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tropism.commands.console import console, tell


@contextmanager
def scoring_progress(what: str, scored: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere; an interrupt says how to go on.

    Args:
        what: stands before the bar.
        scored: what is counted, such as ``records``.

    Yields:
        What is told of the number that is done and of all.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    out = console(stderr=True)
    live = out.is_terminal and "CI" not in os.environ
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    progress = Progress(*columns, console=out, disable=not live)
    task = progress.add_task(what, total=None)
    reached: tuple[int, int] | None = None

    def show(done: int, total: int) -> None:
        nonlocal reached
        reached = (done, total)
        progress.update(task, completed=done, total=total)

    try:
        with progress:
            yield show
    except KeyboardInterrupt:
        if reached is not None:
            tell(f"{reached[0]} of {reached[1]} {scored} are scored and kept; the same command goes on there")
        raise
