"""Writing a run folder: recipe, metrics, rollouts, evaluations, environment. Only the first process writes.

recipe.yaml                 resolved
environment.json            versions, device, threads
metrics.jsonl               one object per collect, update and evaluation; equal for equal runs
timings.jsonl               seconds and rates, which are not
warnings.jsonl              step and message
rollouts/step-000001.parquet, evaluations/step-000000.parquet
checkpoints/, best/, model/, report.html
profile/trace.json.gz, profile/table.txt
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tropism import __version__
from tropism.errors import ConfigError
from tropism.types import RewardBatch, RewardInputs

LOGS = ("metrics.jsonl", "timings.jsonl", "warnings.jsonl")


class RunFolder:
    """The folder of one run.

    Args:
        path: created if missing.
        resume: whether a folder that already holds a run is meant to be gone on with.

    Raises:
        ConfigError: the folder exists and holds something, and ``resume`` is false; or it cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; choose another run folder")
        if path.is_dir() and any(path.iterdir()) and not resume:
            raise ConfigError(
                f"{path} already holds a run; choose another name, go on with it (--resume), or delete it first"
            )
        if resume and not (path / "recipe.yaml").is_file():
            raise ConfigError(f"there is no run to resume in {path}")

    def create(self) -> None:
        """Make the folder and those inside it.

        Raises:
            ConfigError: it cannot be written.
        """
        path = self.path
        try:
            for name in ("rollouts", "evaluations", "checkpoints"):
                (path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the run folder {path} cannot be created: {error.strerror or error}") from error

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The folder that the first process has opened, for the others."""
        folder = cls.__new__(cls)
        folder.path = path
        return folder

    def write_recipe(self, text: str) -> None:
        (self.path / "recipe.yaml").write_text(text, encoding="utf-8")

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
        (self.path / "environment.json").write_text(json.dumps(environment, indent=1))

    def append(self, log: str, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, timings.jsonl or warnings.jsonl; numbers that JSON does not know become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with (self.path / log).open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def log_sizes(self) -> dict[str, int]:
        """Bytes of each log, for a checkpoint."""
        return {log: (self.path / log).stat().st_size if (self.path / log).exists() else 0 for log in LOGS}

    def cut_logs(self, sizes: Mapping[str, int]) -> None:
        """Forget what was logged after the checkpoint that is resumed from."""
        for log, size in sizes.items():
            if (self.path / log).exists():
                os.truncate(self.path / log, size)

    def write_rollouts(self, step: int, inputs: RewardInputs, rewards: RewardBatch, columns: Mapping[str, Any]) -> None:
        """``rollouts/step-N.parquet``: what was sampled, and what each reward term saw and said."""
        terms = {f"reward/{name}": values.tolist() for name, values in rewards.terms.items()}
        table = {
            "prompt": [as_text(p) for p in inputs.prompts],
            "completion": [as_text(c) for c in inputs.completions],
            "completion_ids": inputs.completion_ids,
            "finish_reason": list(inputs.finish_reasons),
            "reward": _scored(rewards),
            **terms,
            **columns,
            **{f"extra/{name}": _column(values) for name, values in rewards.extras.items()},
        }
        _write_parquet(self.path / "rollouts" / f"step-{step:06d}.parquet", table)

    def write_evaluation(self, step: int, table: Mapping[str, Sequence[Any]]) -> None:
        """``evaluations/step-N.parquet``: one row per held-out prompt and completion."""
        _write_parquet(self.path / "evaluations" / f"step-{step:06d}.parquet", table)


def as_text(value: Any) -> str:
    """Text as it is, chat messages as JSON; lone surrogates, which files cannot hold, as U+FFFD."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode("utf-8")


def _scored(rewards: RewardBatch) -> list[float]:
    pairs = zip(rewards.totals.tolist(), rewards.scored.tolist(), strict=True)
    return [value if scored else math.nan for value, scored in pairs]


def _column(values: Sequence[Any]) -> list[float | None] | list[str | None]:
    """A column of one type: numbers where all values are, text otherwise; None stays None in both."""
    if all(value is None or isinstance(value, (int, float)) for value in values):
        return [None if value is None else float(value) for value in values]
    return [None if value is None else as_text(value if isinstance(value, str) else str(value)) for value in values]


def _write_parquet(path: Path, table: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".writing")
    pq.write_table(pa.table(dict(table)), temporary)
    temporary.replace(path)
