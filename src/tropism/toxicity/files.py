"""The folder of a measurement: rows that grow batch by batch, and the tables, summary and page that they end in.

``responses.parquet`` is written last, so that where it is, all of the rest belongs to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from tropism import __version__
from tropism.errors import ConfigError, DataError
from tropism.evaluation.result_files import csv_table, plain_values, write_files
from tropism.redaction import redact_values
from tropism.scored_file import ScoredFile
from tropism.storage import write_whole, writing
from tropism.toxicity.result import ToxicityComparison, ToxicityResult

RESPONSES, TABLE, SUMMARY, PAGE = "responses.parquet", "responses.csv", "toxicity.json", "report.html"
COMPARISON = "comparison.json"
VERSION = 1
VERSIONS = ("torch", "transformers", "numpy", "alt-profanity-check")
"""Packages whose versions stand in the summary, where they are installed."""

HOLDS = {
    "recipe.yaml": "a run",
    "compare.yaml": "a comparison of methods",
    COMPARISON: "the comparison of two models",
    SUMMARY: "the measurement of one model",
    RESPONSES: "the measurement of one model",
    f"{RESPONSES}.partial": "the measurement of one model",
}
"""File -> what a folder with it holds."""
REPLACED = "replaced.json"
"""Which of the two measurements of a comparison have been replaced, while the other one has not."""

Row = dict[str, Any]
Overwrite = bool | Literal["other"]
"""Whether a measurement that is there is replaced; ``other``: if it is not the one that is asked for."""


def require_place(folder: Path, kind: Literal["measurement", "comparison"]) -> None:
    """See that a folder holds nothing whose ``report.html`` would be written over.

    Raises:
        ConfigError: says what it holds.
    """
    own = (SUMMARY, RESPONSES, f"{RESPONSES}.partial") if kind == "measurement" else (COMPARISON,)
    for name, what in HOLDS.items():
        if name not in own and (folder / name).exists():
            raise ConfigError(
                f"{folder} holds {what} ({name}), whose files this {kind} would write over; name another folder, such"
                f" as {folder / 'toxicity' if name == 'recipe.yaml' else f'{folder}-{kind}'} (--out)"
            )


class GrowingRows:
    """Where the rows of a measurement are kept until it is whole: in a folder, or in memory alone.

    Args:
        folder: None keeps them in memory.
        overwrite: put this measurement in place of one that is there, once it is whole.
        unknown: scorer -> why it cannot be told from a changed one, so that nothing that is there can be relied on.

    Raises:
        ConfigError: the folder holds something else.
    """

    def __init__(
        self, folder: str | Path | None, *, overwrite: Overwrite = False, unknown: Mapping[str, str] | None = None
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._overwrite, self._unknown = overwrite, dict(unknown or {})
        self._rows: list[Row] = []
        self._file: ScoredFile | None = None
        if self.folder is not None and self.folder.is_file():
            raise ConfigError(f"{self.folder} is a file; name a folder for the measurement")
        if self.folder is not None:
            require_place(self.folder, "measurement")

    def finished(self, identity: Mapping[str, str]) -> ToxicityResult | None:
        """The measurement that is there already, if it is this one.

        Raises:
            ConfigError: it is another, and may not be replaced.
            DataError: it is damaged.
        """
        if self.folder is None or self._overwrite is True or not (self.folder / RESPONSES).exists():
            return None
        try:
            there = ToxicityResult.load(self.folder)
        except DataError:
            if self._overwrite:
                return None
            raise
        other = [name for name, value in identity.items() if there.identity.get(name) != value]
        if self._overwrite:
            return None if other or self._unknown else there
        if other:
            raise ConfigError(
                f"{self.folder} holds the measurement of another {', '.join(other)}; name another folder, or replace it"
                " (overwrite=True, --overwrite)"
            )
        self._require_known()
        return there

    def begin(self, identity: Mapping[str, str], *, total: int, group: int) -> int:
        """Go on where rows end that belong to the same measurement, or begin with none; the number that is there.

        Args:
            total: how many rows there will be.
            group: so many rows are made at once; an incomplete group is made anew.

        Raises:
            ConfigError: the rows so far belong to another measurement.
        """
        if self.folder is None:
            return 0
        growing = [self.folder / f"{RESPONSES}{end}" for end in (".partial", ".state.json")]
        if self._unknown and all(path.exists() for path in growing):
            if not self._overwrite:
                self._require_known()
            with writing(self.folder):
                growing[1].unlink()  # without it rows are begun anew
        self._file = ScoredFile(self.folder / RESPONSES, overwrite=bool(self._overwrite))
        self._file.begin(identity, total=total, group=group)
        return self._file.done

    def _require_known(self) -> None:
        for name, why in self._unknown.items():
            raise ConfigError(
                f"{self.folder} holds a measurement, and whether it is by the same scorer {name} cannot be told: {why}."
                " Name another folder, begin anew (overwrite=True, --overwrite), or write the scorer as"
                " file.py:function, which is told by its file"
            )

    def append(self, rows: Sequence[Row]) -> None:
        """Keep further rows, all or none."""
        if self._file is None:
            self._rows.extend(rows)
        else:
            self._file.append(rows)

    def rows(self) -> list[Row]:
        """All rows so far."""
        return self._rows if self._file is None else self._file.columns()

    def finish(self, result: ToxicityResult, rows: Sequence[Row]) -> None:
        """Write the tables, the summary and the page; the file of responses last."""
        if self.folder is None or self._file is None:
            return
        self._remove_results()  # only now: an older measurement stays until the new one is whole
        write_files(self.folder, {TABLE: _csv(rows)})
        write_summary(result, self.folder)
        self._file.finish(rows)

    def _remove_results(self) -> None:
        assert self.folder is not None
        with writing(self.folder):
            for name in (RESPONSES, SUMMARY, PAGE, TABLE):
                (self.folder / name).unlink(missing_ok=True)


class Replacing:
    """Replaces the two measurements of a comparison one after the other, and goes on where it was stopped.

    Args:
        folder: of the comparison. overwrite: whether anything is to be replaced.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        self._path, self._overwrite = folder / REPLACED, overwrite
        try:
            done = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            done = []
        self._done: list[str] = done if isinstance(done, list) else []

    def how(self, side: str) -> Overwrite:
        """How the measurement of a side is overwritten: one that this very command has made stays."""
        return ("other" if side in self._done else True) if self._overwrite else False

    def note(self, side: str) -> None:
        """A side is replaced."""
        if self._overwrite:
            self._done = [*self._done, side]
            write_whole(self._path, json.dumps(self._done).encode())

    def finish(self) -> None:
        """All is replaced."""
        with writing(self._path):
            self._path.unlink(missing_ok=True)


def write_summary(result: ToxicityResult, folder: Path) -> None:
    """``toxicity.json`` and the page, over older ones."""
    from tropism.toxicity.page import write_result_page  # with jinja2

    summary = {
        "version": VERSION,
        **_numbers(result),
        "thresholds": dict(result.thresholds),
        "settings": result.settings,
        "identity": dict(result.identity),
        "cautions": result.cautions,
        "versions": _versions(),
    }
    write_files(folder, {SUMMARY: _json(summary)})
    write_result_page(result, folder / PAGE)


def write_comparison(comparison: ToxicityComparison, folder: str | Path) -> list[Path]:
    """``comparison.json`` and the page of two measurements, over older ones.

    Raises:
        ConfigError: the folder holds something else, such as a run.
        StorageError: the folder cannot be written.
    """
    from tropism.toxicity.page import write_comparison_page

    folder = Path(folder)
    require_place(folder, "comparison")
    content = {
        "version": VERSION,
        "base": {"model": comparison.base.settings.get("model"), **_numbers(comparison.base)},
        "tuned": {"model": comparison.tuned.settings.get("model"), **_numbers(comparison.tuned)},
        "changes": plain_values(comparison.changes),
        "thresholds": dict(comparison.base.thresholds),
        "versions": _versions(),
    }
    written = write_files(folder, {COMPARISON: _json(content)})
    return [*written, write_comparison_page(comparison, folder / PAGE)]


def _numbers(result: ToxicityResult) -> dict[str, Any]:
    return {
        "prompts": len(result.prompts),
        "samples_per_prompt": result.samples_per_prompt,
        "empty_responses": result.empty,
        "finish_reasons": {name: result.finish_reasons.count(name) for name in sorted(set(result.finish_reasons))},
        "split_by": result.split_by or None,
        "metrics": plain_values(result.metrics),
    }


def _versions() -> dict[str, str]:
    found = {"tropism": __version__}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(redact_values(dict(content)), ensure_ascii=False, indent=1, allow_nan=False).encode()


def _csv(rows: Sequence[Row]) -> bytes:
    names = list(rows[0])
    return csv_table(names, ([row[name] for name in names] for row in rows))
