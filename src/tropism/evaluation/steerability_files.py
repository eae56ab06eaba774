"""What a sweep over targets leaves in a folder: tables, statistics and pictures.

The three completion files, the distribution statistics and the names of the pictures but for ``steerability`` are those
of conditionme. Targets and rewards are in the reward's own units everywhere.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tropism.evaluation.result_files import (
    BLUE,
    GREY,
    ORANGE,
    as_names,
    csv_table,
    dress,
    new_figure,
    plain_values,
    rendered,
    write_files,
)
from tropism.evaluation.steerability import (
    NEAR,
    DistributionStatistic,
    Floats,
    Samples,
    Steerability,
    TrainingRewards,
    pearson,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepRecord:
    """A sweep, and one more completion of every prompt at a target drawn for it."""

    name: str
    """Of the reward that was asked for."""
    result: Steerability
    samples: Samples
    """Of the sweep."""
    sampled: Samples
    """One of each prompt, at targets drawn uniformly from the training range."""
    training: TrainingRewards

    @property
    def high(self) -> Samples:
        """At the highest target within the training range."""
        return self.samples.at(max(one.target for one in self._inside))

    @property
    def low(self) -> Samples:
        """At the lowest target within the training range."""
        return self.samples.at(min(one.target for one in self._inside))

    @property
    def _inside(self) -> list[Any]:
        return [one for one in self.result.targets if one.in_range and one.count]


def write_sweep(folder: Path, record: SweepRecord) -> list[Path]:
    """Write every table, statistic and picture, over older ones.

    Everything is made before the first file is written, and each appears whole or not at all.

    Returns:
        The files, ``statistics.json`` last.

    Raises:
        StorageError: the folder cannot be written.
        DataError: no completion at the highest, at the lowest or at the drawn targets is scored.
    """
    contents = {
        "steerability.csv": _target_table(record.result),
        "high_reward_completions.csv": _completion_table(record.high),
        "low_reward_completions.csv": _completion_table(record.low),
        "sampled_completions.csv": _completion_table(record.sampled),
    }
    statistics = json.dumps(_statistics(record), ensure_ascii=False, indent=1, allow_nan=False).encode()
    for name, figure in _pictures(record).items():
        for kind in FORMATS:
            contents[f"{name}.{kind}"] = rendered(figure, kind)
    contents["statistics.json"] = statistics
    return write_files(folder, contents)


# Tables and statistics ------------------------------------------------------------------------------------------------


def _target_table(result: Steerability) -> bytes:
    header = ("target", "in_range", "n", "mean_achieved", "low", "high", "std", "median", "mean_kl", "coverage")
    rows = [
        (
            one.target,
            str(one.in_range).lower(),
            one.count,
            *(one.achieved.mean, one.achieved.low, one.achieved.high, one.std, one.median),
            one.sequence_kl.mean,
            one.coverage,
        )
        for one in result.targets
    ]
    return csv_table(header, rows)


def _completion_table(samples: Samples) -> bytes:
    columns = (samples.prompts, samples.completions, samples.targets.tolist(), samples.achieved.tolist())
    return csv_table(("prompt", "completion", "target_reward", "actual_reward"), zip(*columns, strict=True))


def _statistics(record: SweepRecord) -> dict[str, Any]:
    """Every number, and the distributions of the achieved rewards; null where a number is undefined."""
    training = record.training
    return {
        "reward": record.name,
        "training": {
            "min": training.low,
            "max": training.high,
            **{f"pct_{share}": training.quantile(share / 100) for share in (1, 5, 25, 50, 75, 95, 99)},
        },
        "near": NEAR * training.spread,
        **plain_values(record.result),
        "beyond": [{**plain_values(one), "moves_on": one.moves_on} for one in record.result.beyond],
        "distributions": {
            "high": plain_values(DistributionStatistic.of(record.high.achieved)),
            "low": plain_values(DistributionStatistic.of(record.low.achieved)),
            "sampled": plain_values(DistributionStatistic.of(record.sampled.achieved)),
        },
        "sampled_pearson": plain_values(pearson(record.sampled)),
    }


# Pictures -------------------------------------------------------------------------------------------------------------


def _pictures(record: SweepRecord) -> dict[str, Figure]:
    return {
        "steerability": _steerability_picture(record),
        "high_reward_dist": _distribution_picture(record, record.high, "highest", ORANGE),
        "low_reward_dist": _distribution_picture(record, record.low, "lowest", BLUE),
        "correlation": _correlation_picture(record),
    }


def _steerability_picture(record: SweepRecord) -> Figure:
    """Target against achieved reward; under it what there was to learn from."""
    figure = new_figure(6.4, 6.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    known = [one for one in record.result.targets if one.count]
    x = np.array([one.target for one in known])
    mean, low, high = (np.array([getattr(one.achieved, end) for one in known]) for end in ("mean", "low", "high"))
    room = 0.04 * (max(x.max(), record.training.high) - min(x.min(), record.training.low))
    left, right = min(x.min(), record.training.low) - room, max(x.max(), record.training.high) + room
    upper.plot([left, right], [left, right], color=GREY, lw=1, ls="--", label="achieved = asked for")
    upper.fill_between(x, low, high, color=BLUE, alpha=0.2, lw=0, label="95 % interval over prompts")
    upper.plot(x, mean, color=BLUE, lw=2, marker="o", ms=4, label="mean achieved")
    outside = np.array([not one.in_range for one in known])
    if outside.any():
        label = "beyond the training range"
        upper.plot(x[outside], mean[outside], ls="", marker="o", ms=7, mfc="white", mec=BLUE, mew=1.6, label=label)
    every = np.concatenate([mean, low, high, [record.training.low, record.training.high]])
    bottom, top = float(np.nanmin(every)), float(np.nanmax(every))
    upper.set_ylim(bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom))
    dress(upper, title=f"{record.name}: asked for and achieved", x="", y="achieved reward")
    as_names(upper.legend(frameon=False, fontsize=9, loc="upper left"))
    knots = record.training.knots
    share = np.full(len(knots), 100 / len(knots))
    lower.hist(knots, bins=25, range=(record.training.low, record.training.high), weights=share, color=GREY)
    dress(lower, title="", x="target", y="% of training")
    for axis in (upper, lower):
        for begin, end in ((left, record.training.low), (record.training.high, right)):
            axis.axvspan(begin, end, color=GREY, alpha=0.12, lw=0)
    lower.set_xlim(left, right)
    return figure


def _distribution_picture(record: SweepRecord, samples: Samples, which: str, colour: str) -> Figure:
    """Achieved rewards at one target, before the training rewards; both pictures have the same axis."""
    figure = new_figure(6.4, 3.6)
    axis = figure.subplots()
    achieved, knots = samples.achieved[~np.isnan(samples.achieved)], record.training.knots
    every = np.concatenate([_scored(record.high), _scored(record.low), knots])
    edges = np.linspace(every.min(), every.max(), 31).tolist()
    weights = [np.full(len(values), 100 / len(values)) for values in (knots, achieved)]
    axis.hist(knots, edges, weights=weights[0], color=GREY, alpha=0.45, label="training rewards")
    axis.hist(achieved, edges, weights=weights[1], color=colour, alpha=0.7, label=f"achieved, n = {len(achieved)}")
    target = float(samples.targets[0])
    axis.axvline(target, color="black", lw=1.2, ls="--", label=f"target {target:.4g}")
    axis.axvline(float(achieved.mean()), color=colour, lw=2, label=f"mean {achieved.mean():.3g}")
    dress(axis, title=f"{record.name} at the {which} target", x="reward", y="% of completions")
    as_names(axis.legend(frameon=False, fontsize=9))
    return figure


def _correlation_picture(record: SweepRecord) -> Figure:
    """One point per completion at a drawn target, with the line of least squares."""
    figure = new_figure(5.6, 5.2)
    axis = figure.subplots()
    samples = record.sampled
    scored = ~np.isnan(samples.achieved)
    x, y = samples.targets[scored], samples.achieved[scored]
    r = pearson(samples)
    axis.axline((x[0], x[0]), slope=1, color=GREY, lw=1, ls="--", label="achieved = asked for")
    axis.plot(x, y, ls="", marker="o", ms=4, color=BLUE, alpha=max(0.15, min(0.6, 60 / len(x))), mew=0)
    if len(np.unique(x)) > 1:
        slope, intercept = np.polyfit(x, y, 1)
        ends = np.array([x.min(), x.max()])
        axis.plot(ends, intercept + slope * ends, color=ORANGE, lw=2, label=f"least squares, slope {slope:.2f}")
    bounds = f" [{r.low:.2f}, {r.high:.2f}]" if r.known else ""
    shown = f"{r.mean:.2f}{bounds}" if math.isfinite(r.mean) else "undefined: one side is constant"
    dress(axis, title=f"{record.name}: Pearson r = {shown}", x="target", y="achieved reward")
    both = np.concatenate([x, y])
    room = 0.04 * float(np.ptp(both)) or 0.5
    axis.set_xlim(both.min() - room, both.max() + room)
    axis.set_ylim(both.min() - room, both.max() + room)
    axis.set_aspect("equal")
    # Beside the points, not over them.
    as_names(figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9))
    return figure


def _scored(samples: Samples) -> Floats:
    return samples.achieved[~np.isnan(samples.achieved)]
