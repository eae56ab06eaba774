"""Reading the folder of a comparison: what its cells wrote, finished, failed or still missing."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tropism.comparing.samples import Samples, read_samples
from tropism.errors import ConfigError, DataError
from tropism.rewards.config import closest

if TYPE_CHECKING:
    from tropism.comparing.frontier import Frontier
    from tropism.comparing.measures import Results

Floats = NDArray[np.float64]

BASE, BEST_OF, BASELINE = "base", "best-of-n", "sft"
VARIANT = "@"
"""Parts the name of a method from the label of one of its settings: ``ppo@kl_coef=0.1``."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method with one seed."""

    folder: Path
    """Where it lies."""
    method: str
    """Its name, with the label of a variant."""
    seed: int
    failure: str | None
    """Why there is no result."""
    facts: Mapping[str, Any]
    """All of ``cell.json``: completions, tokens and seconds spent, chosen settings, the KL's estimator."""
    samples: Samples | None
    """What the method answered; None where it failed."""

    @property
    def run(self) -> Path | None:
        """The run folder of its training; None where nothing was trained."""
        return self.folder / "run" if (self.folder / "run").is_dir() else None

    def number(self, name: str) -> float:
        """A number of ``cell.json``, NaN where it is not there."""
        value = self.facts.get(name)
        return float(value) if isinstance(value, int | float) else math.nan


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """A comparison as it lies on the disk. Cells may be missing: it can be read while it is going on."""

    folder: Path
    """Where it lies."""
    plan: Mapping[str, Any]
    """``compare.yaml``: the resolved recipe and the section ``compare``."""
    notes: Sequence[str]
    """Warnings about the whole comparison, a sentence each."""
    cells: Sequence[Cell]
    """In the order of the plan: the base first, then by method and seed."""
    against: str
    """The method that the others are tested against."""
    missing: Sequence[str] = field(default_factory=tuple)
    """Cells of the plan that are not there yet, such as ``ppo-seed1``."""

    @classmethod
    def read(cls, folder: str | Path, *, against: str | None = None) -> Comparison:
        """Read the folder of a comparison.

        Args:
            folder: that ``tropism compare`` wrote, such as ``runs/compare-stories``.
            against: the method to test the others against; by default that of the plan, else ``sft``, else ``base``.

        Raises:
            DataError: it is no such folder, a file in it is damaged (it is named; a cell whose samples are counts as
                failed instead), or its cells hold different prompts.
            ConfigError: ``against`` is not compared here (the closest is named).
        """
        path = Path(folder)
        _check_folder(path)
        plan = _read_plan(path / "compare.yaml")
        order = [BASE, *_mapping(plan.get("compare")).get("methods", {})]
        cells = _read_cells(path / "cells", order)
        _check_prompts(cells)
        there = {(cell.method, cell.seed) for cell in cells}
        seeds = _mapping(plan.get("compare")).get("seeds", [])
        planned = [(name, seed) for name in order for seed in (seeds if isinstance(seeds, list) else [])]
        return cls(
            folder=path,
            plan=plan,
            notes=_read_notes(path / "notes.json"),
            cells=cells,
            against=_against(against, plan, cells),
            missing=tuple(f"{name}-seed{seed}" for name, seed in planned if (name, seed) not in there),
        )

    @property
    def name(self) -> str:
        """Of the comparison: that of its folder."""
        return self.folder.resolve().name.removeprefix("compare-")

    @cached_property
    def methods(self) -> dict[str, list[Cell]]:
        """The finished cells of each method that has one, in order."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            if cell.samples is not None:
                found.setdefault(cell.method, []).append(cell)
        return found

    @property
    def failed(self) -> list[Cell]:
        """The cells that failed."""
        return [cell for cell in self.cells if cell.failure is not None]

    @cached_property
    def prompts(self) -> list[str]:
        """The held-out prompts, in order; none before the first cell is finished."""
        first = next((cell.samples for cell in self.cells if cell.samples is not None), None)
        return list(first.prompt_texts) if first is not None else []

    def answers(self, method: str) -> list[Samples]:
        """What each finished seed of a method answered."""
        return [cell.samples for cell in self.methods[method] if cell.samples is not None]

    def values(self, method: str, column: str = "rewards") -> Floats:
        """[S, P] mean over the samples of each prompt by each seed of a method, NaN where none is known."""
        return np.stack([samples.by_prompt(column) for samples in self.answers(method)])

    @cached_property
    def results(self) -> Results:
        """Everything measured: per method, per pair, and along the frontier."""
        from tropism.comparing.measures import measure

        return measure(self)

    @cached_property
    def frontier(self) -> Frontier:
        """Reward against KL: over training, over settings, by best of n, and at best."""
        from tropism.comparing.frontier import frontier

        return frontier(self)

    def text(self) -> str:
        """The table as plain text with what has to be known about it, for a terminal 200 characters wide."""
        from tropism.comparing.table import as_text

        return as_text(self)

    def write(self) -> list[Path]:
        """Write the tables, the statistics, the frontier and ``report.html`` into the folder, over older ones.

        Returns:
            The files, ``report.html`` last.

        Raises:
            StorageError: the folder cannot be written.
            DataError: a run folder in it is damaged.
        """
        from tropism.comparing.files import write_results

        return write_results(self)


def is_comparison(folder: str | Path) -> bool:
    """Whether a folder is that of a comparison."""
    path = Path(folder)
    return (path / "compare.yaml").is_file() and not (path / "metrics.jsonl").exists()


def family(method: str) -> str:
    """The method that a variant is one of: ``ppo`` for ``ppo@kl_coef=0.1``."""
    return method.partition(VARIANT)[0]


def is_trained(method: str) -> bool:
    """Whether a seed changes more than what is sampled."""
    return family(method) not in (BASE, BEST_OF)


# The files ------------------------------------------------------------------------------------------------------------


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise DataError(
            f"there is no folder {str(path)!r}; give the folder of a comparison, such as runs/compare-<name>"
        )
    if not is_comparison(path):
        raise DataError(
            f"{str(path)!r} is no folder of a comparison: it has no compare.yaml; give the folder that "
            "tropism compare wrote, such as runs/compare-<name>"
        )


def _read_plan(path: Path) -> Mapping[str, Any]:
    from tropism.safe_yaml import read_yaml

    plan = read_yaml(path)
    section = plan.get("compare")
    if not isinstance(section, Mapping) or not isinstance(section.get("methods", {}), Mapping):
        raise DataError(f"{path}: there is no section compare with methods; the file is damaged")
    return plan


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read_notes(path: Path) -> list[str]:
    if not path.is_file():
        return []
    notes = _json(path)
    if not isinstance(notes, list):
        raise DataError(f"{path}: expected a list of sentences, got {type(notes).__name__}; take the file away")
    return [str(note) for note in notes]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); take the cell's folder away and go on with it") from error


def _read_cells(folder: Path, order: Sequence[str]) -> list[Cell]:
    found = [_read_cell(path.parent) for path in sorted(folder.glob("*/cell.json"))]
    unplanned = sorted({cell.method for cell in found} - set(order))
    places = {name: place for place, name in enumerate([*order, *unplanned])}
    cells = sorted(found, key=lambda cell: (places[cell.method], cell.seed))
    for one, other in itertools.pairwise(cells):
        if (one.method, one.seed) == (other.method, other.seed):
            raise DataError(f"{one.folder} and {other.folder} are the same method and seed; take one of them away")
    return cells


def _read_cell(folder: Path) -> Cell:
    path = folder / "cell.json"
    facts = _json(path)
    method, seed = (facts.get("method"), facts.get("seed")) if isinstance(facts, dict) else (None, None)
    if not isinstance(method, str) or not isinstance(seed, int):
        raise DataError(
            f"{path}: it names no method and seed; take the cell's folder away and go on with the comparison"
        )
    failure = facts.get("failure")
    samples = None
    if failure is None:
        try:
            samples = read_samples(folder / "samples.parquet")
        except DataError as error:
            failure = str(error)
    return Cell(
        folder=folder,
        method=method,
        seed=seed,
        failure=None if failure is None else str(failure),
        facts=facts,
        samples=samples,
    )


def _check_prompts(cells: Sequence[Cell]) -> None:
    first: Cell | None = None
    for cell in cells:
        if cell.samples is None:
            continue
        if first is None or first.samples is None:
            first = cell
        elif cell.samples.prompt_texts != first.samples.prompt_texts:
            raise DataError(
                f"{first.folder} and {cell.folder} answered different held-out prompts, so they cannot be compared; "
                "take the cells of the older prompts away and go on with the comparison"
            )


def _against(wanted: str | None, plan: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    names = list(dict.fromkeys([BASE, *_mapping(plan["compare"]).get("methods", {}), *(cell.method for cell in cells)]))
    asked = wanted if wanted is not None else _mapping(plan["compare"]).get("against")
    if asked is None:
        return BASELINE if BASELINE in names else BASE
    if asked not in names:
        raise ConfigError(f"against: {asked!r} is not compared here. {closest(str(asked), names)}")
    return str(asked)
