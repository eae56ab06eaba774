"""One training run of a trial: started as a process of its own, watched through its metrics, and what came of it.

A process for each run means that all memory is free again between two trials, on every device, and that a run which is
killed takes nothing with it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tropism.errors import DataError, StorageError
from tropism.evaluation.run_folder import RunData, is_finite
from tropism.evaluation.statistics import bootstrap_interval
from tropism.redaction import redact
from tropism.storage import append_whole, write_whole, writing
from tropism.training.checkpoint import newest_complete
from tropism.training.interrupt import Interrupted
from tropism.training.run_lock import RunLock

POLL = 0.25
"""Seconds between two looks at a run's metrics."""
LONGEST_REASON = 500

Watch = Callable[[int, float], bool]
"""Called with a step and the metric at it, in order; returns whether the run is to be stopped."""
CHILD = "tropism.sweeps.child"
"""The module that a run's process begins with."""


class Halt:
    """Asks processes that other threads wait for to save and end; the second time to end at once."""

    def __init__(self) -> None:
        self.asked = 0
        """How often."""

    def __call__(self) -> None:
        self.asked += 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run, as plain values, which can be sent to another machine that sees the same files."""

    run: str
    """The run folder; a run that was interrupted there goes on."""
    recipe: str
    """Text of the recipe."""
    recipe_path: str
    """Where it is written."""
    log: str
    """File for what the run prints."""
    working_directory: str
    """To which relative paths in the recipe are relative."""
    options: tuple[str, ...] = ()
    """Of ``tropism train``."""
    metric: str
    mode: Literal["max", "min"] = "max"
    take: Literal["last", "best"] = "last"
    child: tuple[str, ...] = (CHILD,)
    """Module of the process, and the arguments that stand before those of ``tropism``."""
    environment: tuple[tuple[str, str], ...] = ()
    """Further variables of its environment."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What came of a run."""

    value: float | None = None
    """The metric; None where there is none."""
    interval: tuple[float, float] | None = None
    """95 % interval of the metric over held-out prompts, where it is a mean over them."""
    reason: str | None = None
    """Why there is no value."""
    there_are: tuple[str, ...] | None = None
    """The metrics there are, where the one asked for is not among them."""
    stopped: bool = False
    """Whether ``Watch`` stopped it."""
    seconds: float = 0.0
    """That it took, this time."""


def execute(job: Job, watch: Watch | None = None, *, halt: Halt | None = None) -> Ended:
    """Train, or go on, in a process of its own.

    Args:
        halt: where this is not the main thread, which alone hears signals: what tells of them.

    Raises:
        Interrupted, KeyboardInterrupt: after a signal; the run has saved what it had.
        StorageError: another process uses the run folder, or something cannot be written.
    """
    began = time.monotonic()
    folder, log = Path(job.run), Path(job.log)
    command = [*_command(job, folder), *job.options]
    write_whole(Path(job.recipe_path), redact(job.recipe).encode())
    append_whole(log, f"$ tropism {' '.join(command)}\n".encode())
    size = log.stat().st_size
    follower = _Follower(folder / "metrics.jsonl", job.metric)
    code = _run(command, job, follower, watch, halt)
    seconds = time.monotonic() - began
    if follower.lacking is not None:
        return Ended(there_are=follower.lacking, seconds=seconds, reason=f"the run has no metric {job.metric}")
    if follower.stopped and code != 0:  # or it was through already
        return Ended(stopped=True, seconds=seconds)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):  # to all processes of a job, or to this one alone
        raise Interrupted(code - 128)
    if code != 0:
        return Ended(reason=reason_in(log, size, code), seconds=seconds)
    return outcome(job, seconds=seconds)


def outcome(job: Job, *, seconds: float = 0.0) -> Ended:
    """What a run that has ended came to."""
    try:
        data = RunData.read(job.run)
    except DataError as error:
        return Ended(reason=f"its folder cannot be read: {error}", seconds=seconds)
    rows = [(row.get("step", 0), row[job.metric]) for row in data.metrics if job.metric in row]
    if not rows:
        names = tuple(sorted({name for row in data.metrics for name in row if "/" in name}))
        return Ended(there_are=names, reason=f"the run has no metric {job.metric}", seconds=seconds)
    if job.take == "best":
        later = [row for row in rows if row[0] > 0 and is_finite(row[1])]
        sign = 1 if job.mode == "max" else -1
        rows = [max(later, key=lambda row: sign * row[1])] if later else rows
    step, value = rows[-1]
    if not is_finite(value):
        return Ended(reason=f"{job.metric} is no finite number at the end", seconds=seconds)
    return Ended(value=float(value), interval=_interval(data, job.metric, step), seconds=seconds)


def _interval(data: RunData, metric: str, step: int) -> tuple[float, float] | None:
    """Of a metric that is a mean over held-out prompts: its bootstrap interval over them.

    What follows an @ in the metric's name is the changed sampling that it was measured under.
    """
    evaluation = next((one for one in data.evaluations if one.step == step), None)
    name, _, label = metric.partition("@")
    if evaluation is not None and label:
        evaluation = evaluation.settings.get(label)
    if evaluation is None:
        return None
    columns = {
        **{f"eval/{own}": values for own, values in evaluation.metrics.items()},
        **{f"eval/reward/{term}": values for term, values in evaluation.terms.items()},
        "eval/reward": evaluation.rewards,
        "eval/length_mean": evaluation.lengths,
        "eval/sequence_kl": evaluation.sequence_kl,
    }
    values = columns.get(name)
    if values is None or not any(map(math.isfinite, values)):
        return None
    interval = bootstrap_interval(values)
    return (interval.low, interval.high) if interval.known else None


# ---- the process -----------------------------------------------------------------------------------------------------


def _command(job: Job, folder: Path) -> list[str]:
    """Start, or go on; what a run left that was killed before its first checkpoint is deleted."""
    if not folder.exists():
        return ["train", job.recipe_path]
    with writing(folder):
        RunLock(folder).check()
        if newest_complete(folder / "checkpoints", hashes=False)[0] is not None:
            return ["train", "--resume", str(folder)]
        shutil.rmtree(folder)
    return ["train", job.recipe_path]


def _run(command: list[str], job: Job, follower: _Follower, watch: Watch | None, halt: Halt | None) -> int:
    """The exit code of the process, negative where a signal ended it."""

    def look(running: bool) -> bool:
        if running:
            return follower.look(watch)
        return follower.look(None if watch is None else lambda step, value: watch(step, value) and False)

    child, environment = [*job.child, *command], dict(job.environment)
    return run_process(child, Path(job.log), job.working_directory, environment, look=look, halt=halt)


def run_process(
    child: list[str],
    log: Path,
    working_directory: str,
    environment: Mapping[str, str],
    *,
    look: Callable[[bool], bool] = lambda running: False,
    halt: Halt | None = None,
) -> int:
    """Run a module that ends with this process, and wait for it.

    Args:
        child: module and arguments. log: takes what it prints.
        look: called time and again, told whether the process runs; returns whether it is to be stopped.
        halt: as of ``execute``.

    Returns:
        The exit code of the process, negative where a signal ended it.
    """
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *child],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=working_directory,
            # Ctrl-C on a terminal goes to a whole group: a run that hears it twice ends without saving.
            start_new_session=True,
            env={**os.environ, "COLUMNS": "200", **environment},
        )
    try:
        while process.poll() is None:
            if halt is not None and halt.asked:
                raise Interrupted(signal.SIGINT)
            if look(True):
                break
            time.sleep(POLL)
        else:
            look(False)
            return process.returncode
        process.terminate()
        return process.wait()
    except BaseException:
        _let_it_save(process, halt)
        raise
    finally:
        assert process.stdin is not None
        process.stdin.close()


def _let_it_save(process: subprocess.Popen[bytes], halt: Halt | None) -> None:
    """Ask a run to save and end, and wait for it; a second signal ends it at once."""
    try:
        process.terminate()
        while halt is not None and process.poll() is None and halt.asked < 2:
            time.sleep(POLL)
        if halt is not None and process.poll() is None:
            process.kill()
        process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


def reason_in(log: Path, begin: int, code: int) -> str:
    """Why a run failed: its error message, or the last line that it printed."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    if code < 0:
        name = signal.Signals(-code).name
        return f"the run was killed ({name})" + ("; out of memory?" if name == "SIGKILL" else "")
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = (errors or lines or [f"exit code {code}"])[-1]
    reason = redact(reason)
    return reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 3] + "..."


class _Follower:
    """Reads ``metrics.jsonl`` while it grows, and tells of each step's value of a metric."""

    def __init__(self, path: Path, metric: str) -> None:
        self.path, self.metric = path, metric
        self.read = 0
        """Bytes that have been read."""
        self.told = 0
        """The last step that ``Watch`` was told of; of step 0, before training, it is told nothing."""
        self.stopped = False
        self.lacking: tuple[str, ...] | None = None
        """The metrics of the first evaluation, where the one asked for should be among them and is not."""

    def look(self, watch: Watch | None) -> bool:
        """Take up what was written since; returns whether the run is to be stopped."""
        for row in self._rows():
            step, value = row.get("step", 0), row.get(self.metric)
            if row.get("kind") == "evaluation" and self.metric.startswith("eval/") and self.metric not in row:
                self.lacking = tuple(sorted(name for name in row if "/" in name))
                return True
            if watch is not None and isinstance(value, int | float) and is_finite(value) and step > self.told:
                self.told = step
                if watch(step, float(value)):
                    self.stopped = True
                    return True
        return False

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        """Whole new lines; a file that a resumed run has cut back is read anew."""
        try:
            with self.path.open("rb") as file:
                self.read = 0 if os.fstat(file.fileno()).st_size < self.read else self.read
                file.seek(self.read)
                new = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error.strerror}") from error
        whole = new[: new.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the middle of a line, after a cut and more in between
                continue
            if isinstance(row, dict):
                yield row
