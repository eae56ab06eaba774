"""The tasks of a comparison, some at once: each waits for what it needs, and the failure of one loses none of the
others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from tropism.errors import TropismError
from tropism.sweeps.work import Halt

POLL = 0.5
"""Seconds between two moments at which the main thread hears signals."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something to do in a process of its own, which a thread waits for."""

    name: str
    act: Callable[[], None]
    """Raises TropismError where it fails."""
    needs: str | None = None
    """The name of a task that has to be through."""
    lost: Callable[[str], None] = lambda reason: None
    """Called where it fails, or what it needs has, with the reason."""


def run_tasks(tasks: Sequence[Task], *, processes: int, halt: Halt) -> dict[str, str]:
    """Do all of them, in order where they may, so many at once.

    Returns:
        The reason of each that failed.

    Raises:
        KeyboardInterrupt: after a signal; the tasks that were going on have saved what they had.
    """
    waiting, failed, done = list(tasks), dict[str, str](), set[str]()
    going: dict[Future[None], Task] = {}
    names = {task.name for task in tasks}
    with ThreadPoolExecutor(max_workers=processes) as threads:
        try:
            while waiting or going:
                for task in list(waiting):
                    if task.needs in failed:
                        waiting.remove(task)
                        failed[task.name] = failed[task.needs]
                        task.lost(failed[task.name])
                    elif len(going) < processes and (task.needs in done or task.needs not in names):
                        waiting.remove(task)
                        going[threads.submit(task.act)] = task
                ended, _ = wait(going, timeout=POLL, return_when=FIRST_COMPLETED)
                for future in ended:
                    _take(future, going.pop(future), failed, done)
        except BaseException:
            _save_all(going, halt)
            raise
    return failed


def _take(future: Future[None], task: Task, failed: dict[str, str], done: set[str]) -> None:
    """What came of a task; an interruption goes on."""
    try:
        future.result()
    except Exception as error:
        failed[task.name] = str(error) if isinstance(error, TropismError) else f"{type(error).__name__}: {error}"
        task.lost(failed[task.name])
        return
    done.add(task.name)


def fail(reason: str) -> None:
    """The act of a task of which is known before that it cannot be done."""
    raise TropismError(reason)


def _save_all(going: dict[Future[None], Task], halt: Halt) -> None:
    """Ask the processes to save and wait for them; another signal ends them at once."""
    halt()
    while True:
        try:
            wait(going)
            return
        except KeyboardInterrupt:
            halt()
