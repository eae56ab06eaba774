"""What one cell of a comparison answered: a row per held-out prompt and sample, as NumPy and Python values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tropism.errors import DataError
from tropism.evaluation.run_folder import LARGEST

Floats = NDArray[np.float64]

_COLUMNS = ("prompt_index", "prompt", "completion", "reward", "length", "finish_reason", "sequence_kl", "base_logprob")
_MEND = "take the cell's folder away and go on with the comparison"


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """N completions of P held-out prompts, in the order of the prompts. All columns have N entries."""

    prompt_index: NDArray[np.int64]
    """[N] 0 to P - 1."""
    prompts: Sequence[str]
    completions: Sequence[str]
    rewards: Floats
    """[N] NaN where unscored."""
    lengths: Floats
    """[N] completion tokens."""
    finish_reasons: Sequence[str]
    sequence_kl: Floats
    """[N] nats: log p - log p_base of the completion (k1); NaN where there is none."""
    base_logprob: Floats
    """[N] nats: log p_base of the completion, untempered; NaN where not measured."""
    terms: Mapping[str, Floats]
    """Raw value of each reward term, [N] each, NaN where it had no opinion."""
    metrics: Mapping[str, Floats]
    """Metrics of the recipe, [N] each."""

    def __len__(self) -> int:
        return len(self.completions)

    @cached_property
    def prompt_texts(self) -> tuple[str, ...]:
        """[P] each prompt once."""
        texts = dict(zip(self.prompt_index.tolist(), self.prompts, strict=True))
        return tuple(texts[index] for index in sorted(texts))

    def by_prompt(self, column: str = "rewards") -> Floats:
        """[P] mean over the samples of each prompt that have a value, NaN where none has."""
        return self.means(getattr(self, column))

    def means(self, values: Floats) -> Floats:
        """The same of any [N] values."""
        known = np.isfinite(values)
        places, prompts = self.prompt_index[known], len(self.prompt_texts)
        count = np.bincount(places, minlength=prompts)
        total = np.bincount(places, weights=values[known], minlength=prompts)
        means: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return means

    def of_prompt(self, index: int) -> NDArray[np.int64]:
        """The rows of one prompt."""
        return np.flatnonzero(self.prompt_index == index)


def read_samples(path: Path) -> Samples:
    """Read ``samples.parquet`` of a cell.

    Raises:
        DataError: it is missing or damaged, which the message says.
    """
    import pyarrow  # here, so that importing the package stays fast
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"{path} is missing, though its cell.json says that the cell is done; {_MEND}")
    try:
        columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file; {_MEND}") from error
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise DataError(f"{path}: the column {missing[0]!r} is missing; it has {sorted(columns)}; {_MEND}")
    if not columns["prompt"]:
        raise DataError(f"{path} has no rows; {_MEND}")

    def floats(name: str) -> Floats:
        return _floats(columns[name], f"{path}: the column {name!r:.80}")

    def named(prefix: str) -> dict[str, Floats]:
        return {name.removeprefix(prefix): floats(name) for name in columns if name.startswith(prefix)}

    return Samples(
        prompt_index=_indices(columns["prompt_index"], columns["prompt"], str(path)),
        prompts=[str(value) for value in columns["prompt"]],
        completions=[str(value) for value in columns["completion"]],
        rewards=floats("reward"),
        lengths=floats("length"),
        finish_reasons=[str(value) for value in columns["finish_reason"]],
        sequence_kl=floats("sequence_kl"),
        base_logprob=floats("base_logprob"),
        terms=named("reward/"),
        metrics=named("metric/"),
    )


def _indices(values: Sequence[Any], prompts: Sequence[Any], where: str) -> NDArray[np.int64]:
    """[N] the prompt of every row, 0 to P - 1 without a gap, each with one text."""
    if not all(isinstance(value, int) for value in values):
        raise DataError(f"{where}: prompt_index holds something else than whole numbers; {_MEND}")
    if sorted(set(values)) != list(range(len(set(values)))):
        raise DataError(f"{where}: prompt_index does not count from 0 without a gap; {_MEND}")
    if len(set(zip(values, prompts, strict=True))) != len(set(values)):
        raise DataError(f"{where}: rows with the same prompt_index have different prompts; {_MEND}")
    return np.array(values, dtype=np.int64)


def _floats(values: Sequence[Any], where: str) -> Floats:
    for value in values:
        if value is not None and not isinstance(value, int | float):
            raise DataError(f"{where} holds {type(value).__name__}, where numbers belong; {_MEND}")
    floats = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    floats[np.abs(floats) > LARGEST] = np.nan
    return floats
