"""Reading a run folder: what training wrote, as plain Python and NumPy values.

A run in progress is readable: a file that is not there yet is empty here, and a last line of ``metrics.jsonl`` that
is still being written is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tropism.errors import DataError
from tropism.evaluation.comparison_table import ScoredComparison, comparisons_in, is_comparison_table

if TYPE_CHECKING:
    from tropism.judgements import Kind

_EVALUATION_FILE = re.compile(r"step-(\d+)\.parquet")
LARGEST = 1e100
"""Numbers beyond count as infinite: sums and squares of them would be."""
_MOST_ROWS = 1_000_000
_MOST_BYTES = 2**30
_LONGEST_NAME = 200
_COLUMNS = ("prompt", "completion", "reward", "length", "sequence_kl", "finish_reason")
_OTHER = "completion@"
"""Begins the name of a column with the completions under changed sampling."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation on the N held-out prompts. All columns have N entries, in the order of the prompts."""

    step: int
    """Step after which the policy was evaluated; 0 is the model before training."""
    prompts: list[str]
    completions: list[str]
    rewards: NDArray[np.float64]
    """[N] NaN where unscored."""
    lengths: NDArray[np.float64]
    """[N] completion tokens."""
    sequence_kl: NDArray[np.float64]
    """[N] nats: sum over completion tokens of the log-ratio to the reference (k1); NaN where not measured."""
    finish_reasons: list[str]
    terms: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """Raw value of each reward term, [N] each, NaN where it had no opinion."""
    metrics: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """Metrics of the user, [N] each, NaN where there is no value."""
    settings: Mapping[str, Evaluation] = field(default_factory=dict)
    """The same prompts completed under changed sampling, by its label: ``temperature=0.7``."""

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class ComparisonStep:
    """One evaluation of a reward model on held-out comparisons."""

    step: int
    """Step after which it was evaluated; 0 is the model before training."""
    kind: Kind
    items: list[ScoredComparison]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run folder holds."""

    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Lines of ``metrics.jsonl`` in order, then those of ``timings.jsonl``."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """Of completions, ordered by step."""
    comparisons: list[ComparisonStep] = field(default_factory=list)
    """Evaluations of a reward model, ordered by step."""
    recipe: str = ""
    """Text of ``recipe.yaml``."""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """Lines of ``warnings.jsonl``: step and message."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """``environment.json``: versions, device, threads."""
    reward_model: Mapping[str, Any] = field(default_factory=dict)
    """``model/reward_model.json``: what a trained reward model reads, and its scale."""
    skipped: list[str] = field(default_factory=list)
    """One sentence for each evaluation file that could not be read."""

    @classmethod
    def read(cls, folder: str | Path) -> RunData:
        """Read a run folder, finished or in progress.

        Args:
            folder: the folder that training wrote, such as ``runs/warm``.

        Returns:
            Everything in it but the weights and the rollouts.

        Raises:
            DataError: it is no run folder, or a file in it is malformed (the file and line are named).
        """
        path = Path(folder)
        _check_run_folder(path)
        evaluations, comparisons, skipped = _read_evaluations(path / "evaluations")
        return cls(
            folder=path,
            metrics=_read_lines(path / "metrics.jsonl") + _read_lines(path / "timings.jsonl"),
            evaluations=evaluations,
            comparisons=comparisons,
            recipe=_read_text(path / "recipe.yaml"),
            warnings=_read_lines(path / "warnings.jsonl"),
            environment=_read_object(path / "environment.json"),
            reward_model=_read_object(path / "model" / "reward_model.json"),
            skipped=skipped,
        )

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint: the last ``best/step`` that the metrics record, if any."""
        recorded = [line["best/step"] for line in self.metrics if is_finite(line.get("best/step"))]
        return int(recorded[-1]) if recorded else None

    def names(self, kinds: Sequence[str] = ("update", "collect")) -> list[str]:
        """Names of the metrics (those with a slash) that lines of these kinds hold, in alphabetical order."""
        lines = (line for line in self.metrics if line.get("kind") in kinds)
        every = {name for line in lines for name, value in line.items() if "/" in name and is_finite(value)}
        return sorted(name for name in every if len(name) <= _LONGEST_NAME)

    def series(
        self, name: str, kinds: Sequence[str] = ("update", "collect")
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """One metric over training: steps and values, [K] each.

        The values of several updates of one step are averaged; missing and non-finite values are left out.
        """
        by_step: dict[float, list[float]] = {}
        for line in self.metrics:
            if line.get("kind") in kinds and is_finite(line.get("step")) and is_finite(line.get(name)):
                by_step.setdefault(float(line["step"]), []).append(float(line[name]))
        steps = sorted(by_step)
        return np.array(steps, dtype=float), np.array([np.mean(by_step[step]) for step in steps], dtype=float)


def is_finite(value: object) -> bool:
    """Whether a value of a metrics file is a number that can be drawn and averaged."""
    return isinstance(value, int | float) and abs(value) <= LARGEST


def _check_run_folder(path: Path) -> None:
    if not path.exists():
        raise DataError(f"there is no folder {str(path)!r}; give the folder of a run, such as runs/<name>")
    if not path.is_dir():
        raise DataError(f"{str(path)!r} is a file; give the folder of a run, such as runs/<name>")
    if not any((path / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "evaluations")):
        raise DataError(
            f"{str(path)!r} is no run folder: it has no recipe.yaml, metrics.jsonl or evaluations/; "
            "give the folder that training wrote, such as runs/<name>"
        )


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_object(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    if not text.strip():
        return {}
    return _parse(text, str(path))


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a last line without its line break that does not parse is still being written."""
    text = _read_text(path)
    lines = text.split("\n")
    objects = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            objects.append(_parse(line, f"{path}, line {number}"))
        except DataError:
            if number < len(lines):
                raise
    return objects


def _read_evaluations(folder: Path) -> tuple[list[Evaluation], list[ComparisonStep], list[str]]:
    if not folder.is_dir():
        return [], [], []
    found = [(match, path) for path in folder.iterdir() if (match := _EVALUATION_FILE.fullmatch(path.name))]
    evaluations: list[Evaluation] = []
    comparisons: list[ComparisonStep] = []
    skipped: list[str] = []
    for step, path in sorted((int(match.group(1)), path) for match, path in found):
        columns = _read_parquet(path)
        if columns is None:
            skipped.append(f"{folder.name}/{path.name} is no readable Parquet file (cut off, or still being written).")
        elif is_comparison_table(columns):
            kind, items = comparisons_in(columns, str(path))
            comparisons.append(ComparisonStep(step=step, kind=kind, items=items))
        else:
            evaluations.append(evaluation_in(step, columns, str(path)))
    return evaluations, comparisons, skipped


def _read_parquet(path: Path) -> dict[str, list[Any]] | None:
    """The columns of a Parquet file, or None if it is not a whole one."""
    import pyarrow  # here, so that importing the package stays fast
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"{path}: no regular file; take it away")
    try:
        metadata = pyarrow.parquet.read_metadata(path)
        size = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        if metadata.num_rows > _MOST_ROWS or size > _MOST_BYTES:
            raise DataError(
                f"{path}: {metadata.num_rows:,} rows in {size:,} bytes, more than any evaluation has; it is "
                "damaged, or no evaluation"
            )
        columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError):
        return None
    return columns


def evaluation_in(step: int, columns: Mapping[str, list[Any]], where: str) -> Evaluation:
    """The evaluation that a table holds; columns that end with ``@label`` are those of changed sampling.

    Raises:
        DataError: a column is missing, or holds something else than numbers.
    """
    labels = [name.removeprefix(_OTHER) for name in columns if name.startswith(_OTHER)]
    settings: dict[str, Evaluation] = {}
    own = dict(columns)
    for label in labels:
        of_label = {name: own.pop(name) for name in list(own) if name.endswith(f"@{label}")}
        named = {name.removesuffix(f"@{label}"): values for name, values in of_label.items()}
        settings[label[:_LONGEST_NAME]] = _evaluation(step, {**named, "prompt": columns.get("prompt", [])}, where)
    return replace(_evaluation(step, own, where), settings=settings)


def _evaluation(step: int, columns: Mapping[str, list[Any]], where: str) -> Evaluation:
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise DataError(f"{where}: the column {missing[0]!r} is missing; it has {sorted(columns)}")

    def floats(name: str) -> NDArray[np.float64]:
        return _floats(columns[name], f"{where}: the column {name!r:.80}")

    def named(family: str) -> dict[str, NDArray[np.float64]]:
        return {name.removeprefix(family): floats(name) for name in columns if name.startswith(family)}

    return Evaluation(
        step=step,
        prompts=[str(value) for value in columns["prompt"]],
        completions=[str(value) for value in columns["completion"]],
        rewards=floats("reward"),
        lengths=floats("length"),
        sequence_kl=floats("sequence_kl"),
        finish_reasons=[str(value)[:_LONGEST_NAME] for value in columns["finish_reason"]],
        terms=named("reward/"),
        metrics=named("metric/"),
    )


def _floats(values: Sequence[Any], where: str) -> NDArray[np.float64]:
    """[N] floats; a null is NaN."""
    for value in values:
        if value is not None and not isinstance(value, int | float):
            raise DataError(f"{where} holds {type(value).__name__}, where numbers belong")
    floats = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    floats[np.abs(floats) > LARGEST] *= np.inf
    return floats
