"""Charts of a comparison: the frontier, rewards over training, and distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from tropism.comparing.frontier import Frontier, FrontierLine, FrontierPoint
from tropism.comparing.results import BASE, Comparison, family
from tropism.evaluation.chart_colours import LIGHT, is_dashed, marker
from tropism.evaluation.page_blocks import chart_block
from tropism.evaluation.plots import Series, interval_chart, legend, line_chart
from tropism.evaluation.result_files import GREY, as_names, dress, new_figure, rendered
from tropism.evaluation.statistics import Interval

Floats = NDArray[np.float64]

LAST_COLOUR = 15
"""Of the base model and of the exact optimum, which are no methods."""
QUANTILES = 60
"""Points of a curve of a distribution."""


def colours_of(comparison: Comparison) -> dict[str, int]:
    """A colour for every method, variants of a method included; the same on all charts."""
    names = [name for name in comparison.methods if name != BASE]
    return {**{name: place % LAST_COLOUR for place, name in enumerate(names)}, BASE: LAST_COLOUR}


@dataclass(frozen=True, kw_only=True)
class MethodsChart:
    """Lines and points of all methods; in the picture their names stand beside them, not over them."""

    title: str
    name: str
    series: Sequence[Series]
    x_label: str

    def block(self) -> Markup:
        """The figure for a page."""
        svg = line_chart(self.series, title=self.title, x_label=self.x_label)
        return chart_block(self.title, svg, legend=legend(self.series))

    def picture(self) -> bytes:
        """The PNG file."""
        figure = new_figure(7.4, 4.2)
        axis = figure.subplots()
        for one in self.series:
            colour = GREY if one.colour is None else LIGHT[one.colour % len(LIGHT)]
            dashed = one.kind == "rule" or (one.colour is not None and is_dashed(one.colour))
            style: dict[str, Any] = {"color": colour, "lw": 1.4, "ls": "--" if dashed else "-", "ms": 5, "capsize": 2}
            if one.kind in ("eval", "points"):
                style["marker"] = marker(one.colour or 0)
            if one.kind == "points":
                style["ls"] = "none"
            across, along = _reach(one.x, one.x_low, one.x_high), _reach(one.y, one.low, one.high)
            axis.errorbar(one.x, one.y, xerr=across, yerr=along, label=one.label or "_", **style)
        dress(axis, title=self.title, x=self.x_label, y="")
        as_names(figure.legend(loc="outside right upper", frameon=False, fontsize=9))
        return rendered(figure, "png")


def _reach(middle: Floats, low: Floats | None, high: Floats | None) -> Floats | None:
    """[2, K] distances to both ends, 0 where an end is unknown."""
    if low is None or high is None:
        return None
    reach: Floats = np.nan_to_num(np.stack([middle - low, high - middle])).clip(min=0)
    return reach


def frontier_chart(found: Frontier, colours: Mapping[str, int]) -> MethodsChart | None:
    """Reward against KL, or None where no KL was measured."""
    series = [*_exact(found), *_best_of(found)]
    for line in found.over_training:
        if len(line.points) > 1 and line.name in colours:
            series.append(_path(line, colours[line.name]))
    for line in found.over_settings:
        series.append(_line(line, colours.get(line.name, _first_of(line.name, colours))))
    for name, (kl, reward) in found.ends.items():
        if math.isfinite(reward.mean):
            series.append(_end(name, kl, reward, colours.get(name, LAST_COLOUR)))
    if not series:
        return None
    return MethodsChart(
        title="Held-out reward against KL to the base",
        name="frontier",
        series=series,
        x_label="sequence KL (nats)",
    )


def _first_of(method: str, colours: Mapping[str, int]) -> int:
    return next((number for name, number in colours.items() if family(name) == method), LAST_COLOUR)


def _xy(points: Sequence[FrontierPoint]) -> tuple[Floats, Floats]:
    return np.array([point.kl for point in points]), np.array([point.reward for point in points])


def _exact(found: Frontier) -> list[Series]:
    if not found.exact:
        return []
    points = sorted(found.exact, key=lambda point: point.kl)
    x, y = np.array([point.kl for point in points]), np.array([point.reward for point in points])
    return [Series(x=x, y=y, kind="train", label="exact optimum", colour=LAST_COLOUR)]


def _best_of(found: Frontier) -> list[Series]:
    if found.best_of is None:
        return []
    x, y = _xy(found.best_of.points)
    return [Series(x=x, y=y, kind="rule", label="best of n of the base, at the bound")]


def _path(line: FrontierLine, colour: int) -> Series:
    x, y = _xy(line.points)
    notes = [f"{line.name}, step {point.step}: {point.reward:.4g} at {point.kl:.3g} nats" for point in line.points]
    return Series(x=x, y=y, kind="train", colour=colour, notes=notes)


def _line(line: FrontierLine, colour: int) -> Series:
    x, y = _xy(line.points)
    return Series(x=x, y=y, kind="train", colour=colour)


def _end(name: str, kl: Interval, reward: Interval, colour: int) -> Series:
    def one(value: float) -> Floats:
        return np.array([value])

    return Series(
        x=one(kl.mean),
        y=one(reward.mean),
        kind="points",
        low=one(reward.low),
        high=one(reward.high),
        x_low=one(kl.low),
        x_high=one(kl.high),
        notes=[f"{name}: {reward.mean:.4g} at {kl.mean:.3g} nats"],
        label=name,
        colour=colour,
    )


def training_chart(lines: Sequence[FrontierLine], colours: Mapping[str, int]) -> MethodsChart | None:
    """Held-out reward over training, in shares of each method's own; None where it was measured but once."""
    series = []
    for line in lines:
        if len(line.points) > 1 and line.name in colours:
            x = np.array([100 * point.share for point in line.points])
            y = np.array([point.reward for point in line.points])
            notes = [f"{line.name}, step {point.step}: {point.reward:.4g}" for point in line.points]
            series.append(Series(x=x, y=y, kind="eval", notes=notes, label=line.name, colour=colours[line.name]))
    if not series:
        return None
    return MethodsChart(
        title="Held-out reward over training, mean over seeds",
        name="reward-over-training",
        series=series,
        x_label="training done (%)",
    )


def distribution_chart(comparison: Comparison, colours: Mapping[str, int]) -> MethodsChart | None:
    """Which share of its completions gets at most which reward, per method."""
    series = []
    for name in comparison.methods:
        rewards = np.concatenate([samples.rewards for samples in comparison.answers(name)])
        rewards = rewards[np.isfinite(rewards)]
        if len(rewards):
            shares = np.linspace(0.0, 1.0, min(QUANTILES, max(2, len(rewards))))
            series.append(
                Series(
                    x=np.quantile(rewards, shares),
                    y=100 * shares,
                    kind="train",
                    label=name,
                    colour=colours.get(name, LAST_COLOUR),
                )
            )
    if not series:
        return None
    return MethodsChart(
        title="Completions (%) with at most this reward", name="distributions", series=series, x_label="reward"
    )


@dataclass(frozen=True, kw_only=True)
class RewardChart:
    """Mean rewards with their intervals below each other."""

    comparison: Comparison
    colours: Mapping[str, int]
    title: str = "Held-out reward and its 95 % interval"
    name: str = "rewards"

    def block(self) -> Markup:
        """The figure for a page."""
        rows = [(row.name, row.reward, self.colours.get(row.name)) for row in self.comparison.results.rows]
        svg = interval_chart(rows, title=self.title, x_label="reward", rule=self._base)
        return chart_block(self.title, svg, legend=[("rule", "base model")] if self._base is not None else [])

    @property
    def _base(self) -> float | None:
        return next((row.reward.mean for row in self.comparison.results.rows if row.name == BASE), None)

    def picture(self) -> bytes:
        """The PNG file."""
        rows = [row for row in self.comparison.results.rows if math.isfinite(row.reward.mean)]
        figure = new_figure(5.4, 1.0 + 0.34 * len(rows))
        axis = figure.subplots()
        for place, row in enumerate(rows):
            number = self.colours.get(row.name)
            colour = GREY if number is None else LIGHT[number % len(LIGHT)]
            mean, ends = row.reward.mean, (row.reward.low, row.reward.high)
            spread = [[abs(mean - end) if math.isfinite(end) else 0.0] for end in ends]
            axis.errorbar([mean], [place], xerr=spread, color=colour, marker="o", ms=5, capsize=3, ls="none")
        axis.set_yticks(range(len(rows)), [row.name for row in rows])
        axis.invert_yaxis()
        if self._base is not None:
            axis.axvline(self._base, color=GREY, lw=1.2, ls="--")
        dress(axis, title=self.title, x="reward", y="")
        return rendered(figure, "png")
