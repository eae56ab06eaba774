"""Writing a run folder: recipe, metrics, rollouts, evaluations, environment. Only the first process writes.

Every file but the logs appears under its name only when it is whole; a log never ends in a part of a line.

recipe.yaml                 resolved
environment.json            versions, device, threads
metrics.jsonl               one object per collect, update and evaluation; equal for equal runs
timings.jsonl               seconds and rates, which are not
warnings.jsonl              step and message
rollouts/step-000001.parquet, evaluations/step-000000.parquet
checkpoints/, best/, model/, report.html
profile/trace.json.gz, profile/table.txt
.lock, .lock-owner.json     while a run writes
"""

from __future__ import annotations

import json
import math
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tropism import __version__
from tropism.errors import ConfigError, StorageError
from tropism.redaction import redact, redact_values
from tropism.storage import append_whole, flush, write_whole, writing
from tropism.training.checkpoint import MANIFEST, list_checkpoints, sweep
from tropism.training.run_lock import LOCK_FILES, RunLock
from tropism.types import RewardBatch, RewardInputs

LOGS = ("metrics.jsonl", "timings.jsonl", "warnings.jsonl")
_FOLDERS = ("rollouts", "evaluations", "checkpoints")
_TABLE = re.compile(r"step-(\d{6,})\.parquet")
_UNFINISHED = re.compile(
    r"step-\d{6,}\.writing|\.(recipe\.yaml|environment\.json)\.writing|\.report-\d+\.html|\.model\.[0-9a-f]{8}\.new"
)
_REPLACED_MODEL = re.compile(r"\.model\.[0-9a-f]{8}\.old")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class RunFolder:
    """The folder of one run. Nothing is written before ``create``.

    Args:
        path: created if missing.
        resume: whether a folder that already holds a run is meant to be gone on with.

    Raises:
        ConfigError: the folder exists and holds something, and ``resume`` is false; or its name cannot be one.
        StorageError: another run is using it.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path, self.resume = path, resume
        if not str(path).isprintable():
            raise ConfigError(f"{str(path)!r} cannot be the name of a run folder: it has characters that do not print")
        self._lock: RunLock | None = RunLock(path)
        try:
            if path.is_dir():
                self._lock.check()  # first: nobody shall be told to delete what a run is writing
            self._check()
        except OSError as error:
            raise ConfigError(f"{path} cannot be a run folder: {error.strerror or error}") from error
        self._seen = self._checkpoints()

    def _check(self) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; choose another run folder")
        if self.resume and not (path / "recipe.yaml").is_file():
            raise ConfigError(f"there is no run to resume in {path}")
        if not self.resume and path.is_dir() and not all(_is_of_no_run(entry) for entry in path.iterdir()):
            raise ConfigError(
                f"{path} already holds a run; choose another name, go on with it (--resume), or delete it first"
            )

    def _checkpoints(self) -> list[tuple[str, int]]:
        """Name and time of every checkpoint, by which a run that goes on in the meantime is noticed."""
        manifests = [path / MANIFEST for path in list_checkpoints(self.path / "checkpoints")]
        return [(path.parent.name, path.stat().st_mtime_ns) for path in manifests if path.is_file()]

    def create(self) -> None:
        """Make the folder, which only its owner may look into, lock it, and sweep up what a killed run left behind.

        Raises:
            ConfigError: a run has been written there since this object was made.
            StorageError: it cannot be written, or another run is using it.
        """
        assert self._lock is not None
        with writing(self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire()
            try:
                self._check()
                if self._checkpoints() != self._seen:
                    raise StorageError(
                        f"another run has gone on in {self.path} since this one looked for its newest checkpoint; "
                        "start again"
                    )
                for name in _FOLDERS:
                    (self.path / name).mkdir(exist_ok=True)
                self._sweep()
            except BaseException:
                self._lock.release()
                raise

    def release(self) -> None:
        """Let other runs use the folder; nothing may be written after that."""
        if self._lock is not None:
            self._lock.release()

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The folder that the first process has opened, for the others."""
        folder = cls.__new__(cls)
        folder.path, folder._lock = path, None
        return folder

    def _sweep(self) -> None:
        """Delete what interrupted writing left; names that this library does not write are not touched."""
        for folder in (self.path / "rollouts", self.path / "evaluations", self.path):
            for entry in list(folder.iterdir()):
                if entry.is_symlink() or not _UNFINISHED.fullmatch(entry.name):
                    continue
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for entry in list(self.path.iterdir()):
            if _REPLACED_MODEL.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
                # Between two renames the older model has no other name.
                shutil.rmtree(entry) if (self.path / "model").exists() else entry.rename(self.path / "model")
        sweep(self.path)
        sweep(self.path / "checkpoints")

    def write_recipe(self, text: str) -> None:
        write_whole(self.path / "recipe.yaml", redact(text).encode("utf-8"))

    def write_environment(self, facts: Mapping[str, Any]) -> None:
        names = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
        versions = {"tropism": __version__, **{name: metadata.version(name) for name in names}}
        environment = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "versions": versions,
            **facts,
        }
        write_whole(self.path / "environment.json", json.dumps(redact_values(environment), indent=1).encode())

    def append(self, log: str, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, timings.jsonl or warnings.jsonl; numbers that JSON does not know become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        append_whole(self.path / log, (json.dumps(redact_values(clean)) + "\n").encode())

    def log_sizes(self) -> dict[str, int]:
        """Bytes of each log, for a checkpoint."""
        return {log: (self.path / log).stat().st_size if (self.path / log).exists() else 0 for log in LOGS}

    def cut_back(self, sizes: Mapping[str, Any], *, collected: int, evaluated: int) -> list[str]:
        """Forget what was written after the checkpoint that is resumed from.

        Args:
            sizes: bytes of each log at the time.
            collected, evaluated: the last steps whose rollouts and evaluation had been written.

        Returns:
            One sentence for each log that lacks lines, and so is not what it was; it is never filled up.
        """
        messages = []
        for log in LOGS:
            wanted = int(sizes.get(log, 0))
            with writing(self.path / log):
                left = _cut(self.path / log, wanted)
            if left != wanted:
                messages.append(
                    f"{log} lacks lines from before the checkpoint: it was {wanted} bytes long then, and only {left} "
                    "of those are there. The run goes on; the log stays without them"
                )
        for name, last in (("rollouts", collected), ("evaluations", evaluated)):
            for path in list((self.path / name).iterdir()):
                if (match := _TABLE.fullmatch(path.name)) and int(match.group(1)) > last:
                    with writing(path):
                        path.unlink()
        return messages

    def write_rollouts(self, step: int, inputs: RewardInputs, rewards: RewardBatch, columns: Mapping[str, Any]) -> None:
        """``rollouts/step-N.parquet``: what was sampled, and what each reward term saw and said."""
        terms = {f"reward/{name}": _null_for_nan(values.tolist()) for name, values in rewards.terms.items()}
        table = {
            "prompt": [as_text(p) for p in inputs.prompts],
            "completion": [as_text(c) for c in inputs.completions],
            "completion_ids": inputs.completion_ids,
            "finish_reason": list(inputs.finish_reasons),
            **{f"column/{as_text(k)}": _column([_flat(v) for v in values]) for k, values in inputs.columns.items()},
            "reward": _scored(rewards),
            **terms,
            **{f"tokens/{name}": values for name, values in rewards.token_terms.items()},
            **{f"error/{name}": _column(reasons) for name, reasons in rewards.errors.items()},
            **columns,
            **{f"extra/{name}": _column(values) for name, values in rewards.extras.items()},
        }
        _write_parquet(self.path / "rollouts" / f"step-{step:06d}.parquet", table)

    def write_evaluation(self, step: int, table: Mapping[str, Sequence[Any]]) -> None:
        """``evaluations/step-N.parquet``: one row per held-out prompt and completion."""
        _write_parquet(self.path / "evaluations" / f"step-{step:06d}.parquet", table)


def flush_logs(folder: Path) -> None:
    """Wait until the logs of a run folder are on the disk, as they must be before a checkpoint that knows their sizes.

    Raises:
        StorageError: they cannot be written.
    """
    for log in LOGS:
        if (folder / log).exists():
            with writing(folder / log):
                flush(folder / log)


def _is_of_no_run(path: Path) -> bool:
    """Whether something in a run folder is all the same if no run ever began: a lock, or a folder without content."""
    return path.name in LOCK_FILES or (path.name in _FOLDERS and path.is_dir() and not any(path.iterdir()))


def as_text(value: Any) -> str:
    """Text as it is, chat messages as JSON; lone surrogates, which files cannot hold, as U+FFFD."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return _LONE_SURROGATE.sub("\ufffd", text)


def _scored(rewards: RewardBatch) -> list[float | None]:
    pairs = zip(rewards.totals.tolist(), rewards.scored.tolist(), strict=True)
    return [value if scored else None for value, scored in pairs]


def _null_for_nan(values: Sequence[float]) -> list[float | None]:
    """Where a term gave no reward there is none, which is not the number NaN."""
    return [None if math.isnan(value) else value for value in values]


def _flat(value: Any) -> Any:
    """A value of the data as a cell: what has parts as JSON."""
    try:
        return as_text(value) if isinstance(value, (list, tuple, Mapping)) else value
    except (RecursionError, ValueError, TypeError):
        return _described(value)


def _column(values: Sequence[Any]) -> list[float | None] | list[str | None]:
    """A column of one type: numbers where all values are, text otherwise; None stays None in both."""
    if all(value is None or isinstance(value, (int, float)) for value in values):
        with suppress(OverflowError):  # a whole number beyond every float: the column is text then
            return [None if value is None else float(value) for value in values]
    texts = (value if value is None or isinstance(value, str) else _described(value) for value in values)
    return [None if text is None else redact(as_text(text)) for text in texts]


def _described(value: Any) -> str:
    """Any value as text; a log entry that has none (thousands of digits, hopeless nesting) does not end a run."""
    try:
        return str(value)
    except Exception as error:
        return f"({type(value).__name__} without text: {type(error).__name__})"


def _write_parquet(path: Path, table: Mapping[str, Any]) -> None:
    columns = pa.table(dict(table))
    temporary = path.with_suffix(".writing")
    with writing(path, needed=columns.nbytes):
        try:
            pq.write_table(columns, temporary)
            flush(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _cut(path: Path, size: int) -> int:
    """Cut a log to at most ``size`` bytes and to whole lines; returns the bytes that are left."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        size = min(size, path.stat().st_size)
        file.truncate(size)
        file.seek(max(0, size - 1))
        if size and file.read(1) != b"\n":
            file.seek(0)
            size = file.read().rfind(b"\n") + 1
            file.truncate(size)
    return size
