"""What the evaluation of a reward model leaves in a folder: statistics, tables and the calibration picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tropism.evaluation.comparison_numbers import Calibration, ComparisonNumbers
from tropism.evaluation.comparison_table import ScoredComparison
from tropism.evaluation.comparison_verdict import best_rule, verdict
from tropism.evaluation.result_files import (
    BLUE,
    GREY,
    as_names,
    csv_table,
    dress,
    new_figure,
    plain_values,
    rendered,
    write_files,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIR, BEST = "pairs: the chosen one has the higher score", "all: the highest score is the chosen one"
"""The two calibration curves."""


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord:
    """Held-out comparisons with their scores, and what was measured on them."""

    name: str
    """Of the reward model."""
    result: ComparisonNumbers
    items: Sequence[ScoredComparison]


def write_comparisons(folder: Path, record: ComparisonRecord) -> list[Path]:
    """Write every table, statistic and picture, over older ones.

    Everything is made before the first file is written, and each appears whole or not at all.

    Returns:
        The files, ``statistics.json`` last. There is no calibration where nothing was chosen.

    Raises:
        StorageError: the folder cannot be written.
    """
    contents = {"items.csv": _item_table(record.items)}
    curves = calibration_curves(record.result)
    if curves:
        contents["calibration.csv"] = _calibration_table(curves)
        contents["calibration.png"] = rendered(_calibration_picture(record.name, curves), "png")
    statistics = _statistics(record)
    contents["statistics.json"] = json.dumps(statistics, ensure_ascii=False, indent=1, allow_nan=False).encode()
    return write_files(folder, contents)


def calibration_curves(result: ComparisonNumbers) -> dict[str, Calibration]:
    """The curves that hold any prediction, by what is predicted."""
    curves = {PAIR: result.pair_curve, BEST: result.best_curve}
    return {name: curve for name, curve in curves.items() if curve is not None and curve.count}


def _item_table(items: Sequence[ScoredComparison]) -> bytes:
    """One row per completion."""
    header = (
        *("item", "completion_number", "prompt", "completion", "characters", "score"),
        *("chosen", "predicted", "probability_of_choice", "label", "rating", "weight"),
    )
    rows = [
        (
            *(number, place, item.prompt, text, len(text), item.scores[place]),
            None if item.choice is None else int(item.choice == place),
            None if item.predicted is None else int(item.predicted == place),
            *(item.probability, item.target),
            None if item.ratings is None else item.ratings[place],
            item.weight,
        )
        for number, item in enumerate(items)
        for place, text in enumerate(item.completions)
    ]
    return csv_table(header, rows)


def _calibration_table(curves: dict[str, Calibration]) -> bytes:
    header = ("predicting", "bin_low", "bin_high", "count", "mean_predicted", "observed", "low", "high")
    rows = [
        (name, one.low, one.high, one.count, one.predicted, one.observed.mean, one.observed.low, one.observed.high)
        for name, curve in curves.items()
        for one in curve.bins
    ]
    return csv_table(header, rows)


def _statistics(record: ComparisonRecord) -> dict[str, Any]:
    """Every number, with its interval; null where a number is undefined."""
    rule = best_rule(record.result)
    return {
        "reward_model": record.name,
        **plain_values(record.result),
        "best_rule": None if rule is None else plain_values(rule),
        "verdict": verdict(record.result),
    }


def _calibration_picture(name: str, curves: dict[str, Calibration]) -> Figure:
    """Predicted against observed, with the diagonal; under it how many predictions there were."""
    figure = new_figure(6.4 if len(curves) == 1 else 10.4, 5.6)
    panels = figure.subplots(2, len(curves), squeeze=False, height_ratios=[3, 1], sharex="col")
    for (title, curve), upper, lower in zip(curves.items(), panels[0], panels[1], strict=True):
        low = curve.bins[0].low
        upper.plot([low, 1], [low, 1], color=GREY, lw=1, ls="--", label="as sure as it should be")
        known = [one for one in curve.bins if one.count]
        x, y = np.array([one.predicted for one in known]), np.array([one.observed.mean for one in known])
        ends = np.array([[one.observed.low, one.observed.high] for one in known])
        spread = np.nan_to_num(np.stack([y - ends[:, 0], ends[:, 1] - y])).clip(min=0)
        label = "observed, 95 % over comparisons"
        upper.errorbar(x, y, yerr=spread, color=BLUE, lw=2, marker="o", ms=4, elinewidth=1.2, capsize=3, label=label)
        upper.set_ylim(min(low, float(np.nanmin(ends, initial=low))) - 0.02, 1.02)
        dress(upper, title=title, x="", y="share that came true")
        edges = [one.low for one in curve.bins]
        width = curve.bins[0].high - low
        lower.bar(edges, [one.count for one in curve.bins], width=0.94 * width, align="edge", color=GREY)
        dress(lower, title="", x="predicted probability", y="predictions")
        lower.set_xlim(low - 0.01, 1.01)
    handles, labels = panels[0][0].get_legend_handles_labels()
    as_names(figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9))
    figure.suptitle(f"Calibration of {name}", fontsize=12, x=0.01, ha="left", parse_math=False)
    return figure
