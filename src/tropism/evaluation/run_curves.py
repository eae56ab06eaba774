"""What a run measured, as series that can be drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tropism.evaluation.plots import Series
from tropism.evaluation.run_folder import Evaluation, RunData
from tropism.evaluation.statistics import bootstrap_interval

Floats = NDArray[np.float64]

Column = Literal["rewards", "lengths", "sequence_kl"]
"""A column of numbers in an evaluation."""

MOST_POINTS = 300
"""A curve with more points is drawn as the means of this many bins."""
TRAINING, HELD_OUT = "training", "held-out, 95 %"
"""What legends call the two."""
SMOOTHED_FROM = 30
"""A training curve with at least this many points is drawn with a moving average."""


def evaluation_means(run: RunData, column: Column) -> Series | None:
    """Mean and interval of a column at every evaluation in which it was measured, or None if it never was."""
    return _means(run, lambda evaluation: getattr(evaluation, column))


def term_means(run: RunData, name: str) -> Series | None:
    """The same of a term of the reward."""
    return _means(run, lambda evaluation: evaluation.terms.get(name, np.empty(0)))


def _means(run: RunData, values_of: Callable[[Evaluation], Floats]) -> Series | None:
    steps, intervals = [], []
    for evaluation in run.evaluations:
        values = values_of(evaluation)
        values = values[np.isfinite(values)]
        if len(values):
            steps.append(float(evaluation.step))
            intervals.append(bootstrap_interval(values, resamples=2000))
    if not steps:
        return None
    return Series(
        x=np.array(steps),
        y=np.array([interval.mean for interval in intervals]),
        low=np.array([interval.low for interval in intervals]),
        high=np.array([interval.high for interval in intervals]),
        kind="eval",
        label=HELD_OUT,
        notes=[f"step {step:g}: {interval.mean:.4g}" for step, interval in zip(steps, intervals, strict=True)],
    )


def training_curve(steps: Floats, values: Floats, *, label: str = TRAINING) -> list[Series]:
    """A metric over training: the line itself, or faint with its moving average where it has many points."""
    x, y = _thinned(steps, values)
    if len(y) < SMOOTHED_FROM:
        return [Series(x=x, y=y, kind="train", label=label)] if len(y) else []
    smooth = _moving_average(y, max(3, len(y) // 15))
    return [Series(x=x, y=y, kind="raw"), Series(x=x, y=smooth, kind="train", label=label)]


def _thinned(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    if len(x) <= MOST_POINTS:
        return x, y
    parts = zip(np.array_split(x, MOST_POINTS), np.array_split(y, MOST_POINTS), strict=True)
    means = np.array([[part_x.mean(), part_y.mean()] for part_x, part_y in parts])
    return means[:, 0], means[:, 1]


def _moving_average(values: Floats, window: int) -> Floats:
    """Centred moving average; the window shrinks at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(0, index - window // 2), np.minimum(len(values), index + window // 2 + 1)
    averages: Floats = (sums[stop] - sums[start]) / (stop - start)
    return averages
