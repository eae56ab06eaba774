"""Before and after on the terminal: the table of numbers and pairs of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tropism.commands.console import printable
from tropism.errors import DataError
from tropism.evaluation.sampling_table import sampling_table
from tropism.evaluation.summary import SamplePair, Snapshot, Summary, summary_rows

WIDE = 105
"""Columns from which a number and its interval stand on one line."""
MOST_CHARACTERS = 2000
"""Of one prompt or completion."""


def show_summary(out: Console, summary: Summary, *, before: str = "before", after: str = "after") -> None:
    """The numbers, and what to keep in mind before believing them."""
    columns = [before, after, "change"] if summary.after else [before]
    table = Table(title=f"{summary.before.prompts} held-out prompts, 95 % intervals", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    between = " " if out.width >= WIDE else "\n"
    for label, *texts in summary_rows(summary):
        values = [text.replace(" [", f"{between}[") for text in texts]
        table.add_row(printable(label), *values[: len(columns)])
    out.print(table)
    if summary.after:
        for caution in summary.cautions:
            out.print(Text.assemble(("note: ", "yellow"), printable(caution)))


def show_sampling(out: Console, models: Mapping[str, Snapshot | None]) -> None:
    """One table of every model under every way to sample; nothing where there is one way.

    Args:
        models: what was measured of each, by its name.
    """
    found = {name: sampling_table(one) for name, one in models.items() if one is not None and one.settings}
    if not found:
        return
    table = Table(title="the same prompts under changed sampling, 95 % intervals", title_justify="left")
    table.add_column("")
    columns = list(dict.fromkeys(label for labels, _ in found.values() for label in labels))
    for label in columns:
        table.add_column(printable(label), justify="right")
    for name, (labels, rows) in found.items():
        for label, values in rows:
            by_label = dict(zip(labels, values, strict=True))
            table.add_row(printable(f"{label}, {name}"), *(by_label.get(column, "") for column in columns))
    out.print(table)


def show_parting(out: Console, folder: Path) -> None:
    """Whether training and gold reward of a run part; nothing where it has no gold reward."""
    from tropism.evaluation.over_optimisation import over_optimisation, planned_by
    from tropism.evaluation.run_folder import RunData

    try:
        run = RunData.read(folder)
        found = over_optimisation(run, planned=planned_by(run))
    except DataError as error:  # of a run that is done: what it has made is there all the same
        out.print(Text.assemble(("note: ", "yellow"), printable(str(error))), soft_wrap=True)
        return
    if found is not None:
        style = {"parted": "bold yellow", "fell": "bold yellow"}.get(found.verdict, "")
        out.print(Text.assemble(("gold:   ", style), printable(found.sentence)), soft_wrap=True)


def show_pairs(out: Console, pairs: Sequence[SamplePair]) -> None:
    """Completions of the same prompts before and after."""
    for pair in pairs:
        out.print(Text(f"\n{_short(pair.prompt)}", "bold"))
        for label, text, reward in (
            ("before", pair.before, pair.reward_before),
            ("after", pair.after, pair.reward_after),
        ):
            score = f"{reward:+.2f}" if math.isfinite(reward) else "unscored"
            line = Text.assemble((f"{label:<7}{score:>6}  ", "dim"), _short(" ".join(text.split())))
            out.print(Padding(line, (0, 0, 0, 2)))


def _short(text: str) -> str:
    """The text for reading on a terminal, cut where it is very long."""
    cut = len(text) > MOST_CHARACTERS
    return printable(text[:MOST_CHARACTERS]) + (f" ... (cut here: {len(text)} characters)" if cut else "")
