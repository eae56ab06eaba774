"""The section of a report that asks whether the reward is being gamed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from tropism.evaluation.charts import LineChart, blocks, pictures
from tropism.evaluation.number_texts import change_text, interval_text
from tropism.evaluation.over_optimisation import OverOptimisation, over_optimisation, planned_by
from tropism.evaluation.page_blocks import list_block, table_block, text_block
from tropism.evaluation.pages import PageSection
from tropism.evaluation.plots import Series
from tropism.evaluation.run_folder import RunData
from tropism.evaluation.statistics import Interval

TITLE = "Training and gold reward since the start"


def over_optimisation_section(run: RunData) -> list[PageSection]:
    """Verdict, chart and table; none where the run has no gold reward beside its own.

    Raises:
        DataError: two evaluations hold different prompts.
    """
    found = over_optimisation(run, planned=planned_by(run))
    if found is None:
        return []
    worrying = found.verdict in ("parted", "fell")
    verdict = list_block([found.sentence], kind="cautions") if worrying else text_block(found.sentence)
    charts = [gold_chart(found)] if len(found.steps) > 1 else []
    header = ["step", "training reward", "gold reward", ""]
    marks = {found.best: "best gold reward"}
    if found.parted is not None:
        marks[found.parted] = "; ".join(filter(None, [marks.get(found.parted, ""), "last before they part"]))
    rows: list[list[str | float | Markup]] = [
        [step, interval_text(proxy), interval_text(gold), marks.get(step, "")]
        for step, proxy, gold in zip(found.steps, found.proxy, found.gold, strict=True)
    ]
    note = (
        f"95 % intervals over {found.prompts} held-out prompts. The verdict compares the last evaluation with the "
        f"best, over the same prompts, and accounts for all {found.comparisons} pairs of evaluations "
        "that the run plans."
    )
    changes = [text for text in (change_text(found.fall), change_text(found.rise)) if text]
    if len(changes) == 2 and found.verdict == "not parted":
        note += (
            f" Since step {found.best} the gold reward changed by {changes[0]}, the training reward by {changes[1]}."
        )
    body = verdict + blocks(charts) + table_block(header, rows, note=note)
    return [PageSection(title="Is the reward being gamed?", body=body, anchor="gold", pictures=pictures(charts))]


def gold_chart(found: OverOptimisation) -> LineChart:
    """Both rewards as changes since the first evaluation, in standard deviations of a completion, so that they share
    an axis; a dashed line stands where they part."""
    proxy = _changes(found, found.proxy, found.spread[0], label="training reward", colour=1)
    gold = _changes(found, found.gold, found.spread[1], label="gold reward", colour=0)
    series = [proxy, gold]
    if found.parted is not None:
        ends = [
            bound[np.isfinite(bound)] for one in series for bound in (one.y, one.low, one.high) if bound is not None
        ]
        values = np.concatenate(ends)
        at = np.array([float(found.parted)] * 2)
        height = np.array([float(values.min()), float(values.max())])
        series.append(Series(x=at, y=height, kind="rule", label=f"they part after step {found.parted}"))
    return LineChart(title=TITLE, name="gold-reward", series=series, x_label="step (changes in standard deviations)")


def _changes(
    found: OverOptimisation, intervals: Sequence[Interval], spread: float, *, label: str, colour: int
) -> Series:
    start = intervals[0].mean

    def scaled(value: float) -> float:
        return (value - start) / spread if math.isfinite(value) else math.nan

    return Series(
        x=np.array(found.steps, dtype=float),
        y=np.array([scaled(one.mean) for one in intervals]),
        low=np.array([scaled(one.low) for one in intervals]),
        high=np.array([scaled(one.high) for one in intervals]),
        kind="eval",
        label=label,
        colour=colour,
        notes=[f"step {step}: {label} {one.mean:.4g}" for step, one in zip(found.steps, intervals, strict=True)],
    )
