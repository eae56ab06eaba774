"""Attributions in files: which pieces of a text drove a number, as ``attribution/sample-<n>.json`` of a run has it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tropism.errors import DataError
from tropism.evaluation.result_files import plain_values, write_files

Part = Literal["prompt", "completion", "special"]
FOLDER = "attribution"
MOST_FILES = 100
"""Of a run; a report shows no more."""
_NAME = re.compile(r"sample-(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """How much each piece of a text contributed to one number."""

    of: Literal["completion", "reward"]
    what: str
    """The number in words: ``log-prob of the completion``, or ``reward vader``."""
    method: str
    """``gradient_x_input``, ``integrated_gradients`` or ``occlusion``."""
    pieces: tuple[str, ...]
    """[P] the tokens or words, as text that reads on when it is joined; a special token by its name."""
    parts: tuple[Part, ...]
    """[P] where each piece stands."""
    scores: tuple[float, ...]
    """[P] in ``unit``: above 0 where a piece raises the number. NaN where a text without it is unscored."""
    value: float
    """The number itself."""
    unit: Literal["nats", "reward"]
    baseline: float | None = None
    """Integrated gradients: the number at the baseline. The scores add up to ``value - baseline``."""
    gap: float | None = None
    """Integrated gradients: by how much they miss it."""
    rows: tuple[str, ...] | None = None
    """[T] tokens of the completion, where each was attributed by itself."""
    matrix: tuple[tuple[float, ...], ...] | None = None
    """[T, P] scores of each of them; ``scores`` are the sums over T."""

    def __post_init__(self) -> None:
        if not len(self.pieces) == len(self.parts) == len(self.scores):
            raise ValueError(f"{len(self.pieces)} pieces, {len(self.parts)} parts and {len(self.scores)} scores")


@dataclass(frozen=True, kw_only=True)
class AttributedSample:
    """One completion of a run and what was attributed of it."""

    label: str
    """Why it was chosen, such as ``Largest gain``."""
    step: int
    """Of the evaluation that the completion is from."""
    prompt: str
    completion: str
    reward: float
    """NaN where unscored."""
    maps: tuple[Attribution, ...]


def write_samples(folder: Path, samples: Sequence[AttributedSample]) -> list[Path]:
    """Write samples into ``attribution/`` of a run folder, in place of those that are there.

    Raises:
        StorageError: the folder cannot be written.
    """
    contents = {
        f"sample-{number}.json": json.dumps(plain_values(sample), indent=1, ensure_ascii=False).encode(
            "utf-8", errors="replace"
        )
        for number, sample in enumerate(samples, start=1)
    }
    written = write_files(folder / FOLDER, contents)
    for path in _files(folder / FOLDER):
        if path.name not in contents:
            path.unlink()
    return written


def read_samples(folder: Path) -> list[AttributedSample]:
    """The samples of a run folder, in order; none where nothing was attributed.

    Raises:
        DataError: a file is damaged; it is named.
    """
    return [_read(path) for path in _files(folder / FOLDER)[:MOST_FILES]]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _read(path: Path) -> AttributedSample:
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
        maps = tuple(_attribution(one) for one in mapping.pop("maps"))
        return AttributedSample(
            maps=maps,
            label=str(mapping["label"]),
            step=int(mapping["step"]),
            prompt=str(mapping["prompt"]),
            completion=str(mapping["completion"]),
            reward=_number(mapping["reward"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is no attribution of a sample ({error}); write it anew: tropism attribute RUN --samples 3"
        ) from error


def _attribution(mapping: Mapping[str, Any]) -> Attribution:
    known = {field.name for field in fields(Attribution)}
    values = {name: value for name, value in mapping.items() if name in known}
    matrix, rows = values.get("matrix"), values.get("rows")
    made = Attribution(
        **values
        | {
            "pieces": tuple(map(str, values["pieces"])),
            "parts": tuple(part if part in get_args(Part) else "special" for part in values["parts"]),
            "scores": tuple(map(_number, values["scores"])),
            "value": _number(values["value"]),
            "rows": None if rows is None else tuple(map(str, rows)),
            "matrix": None if matrix is None else tuple(tuple(map(_number, row)) for row in matrix),
        }
    )
    return replace(made, what=str(made.what), method=str(made.method))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
