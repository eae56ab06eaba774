"""Pictures of a run: inline SVG for the report, coloured by the page's style sheet, and one PNG for other pages.

The SVG carries class names and no colours, so that it follows the page into the dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from tropism.errors import DataError
from tropism.evaluation.run_folder import Evaluation, RunData
from tropism.evaluation.statistics import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

Column = Literal["rewards", "lengths", "sequence_kl"]
"""A column of numbers in an evaluation."""

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 38
MOST_POINTS = 300
"""A curve with more points is drawn as the means of this many bins."""
SMOOTHED_FROM = 30
"""A training curve with at least this many points is drawn with a moving average."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line or set of points of a chart."""

    x: Floats
    """[K]"""
    y: Floats
    """[K]"""
    kind: Literal["raw", "train", "eval", "rule"]
    """``raw``: a faint line; ``train``: a line; ``eval``: joined points with whiskers; ``rule``: a dashed line to
    compare with. The style sheet's class too."""
    low: Floats | None = None
    """[K] lower end of each whisker, NaN where unknown."""
    high: Floats | None = None
    """[K] upper end of each whisker, NaN where unknown."""
    notes: Sequence[str] = ()
    """[K] what a point says when it is pointed at."""


Panel = tuple[str, list[Series], Series | None]
"""Title, curve of training, and points of evaluation, of which one may be missing."""


@dataclass(frozen=True)
class _Frame:
    """The plotting area: data ranges and their mapping to pixels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 2)


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
        notes=[f"step {step:g}: {interval.mean:.4g}" for step, interval in zip(steps, intervals, strict=True)],
    )


def training_curve(steps: Floats, values: Floats) -> list[Series]:
    """A metric over training: the line itself, or faint with its moving average where it has many points."""
    x, y = _thinned(steps, values)
    if len(y) < SMOOTHED_FROM:
        return [Series(x=x, y=y, kind="train")] if len(y) else []
    return [Series(x=x, y=y, kind="raw"), Series(x=x, y=_moving_average(y, max(3, len(y) // 15)), kind="train")]


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str = "step", limit: float | None = None, zero: bool = False
) -> str:
    """Lines and points over training as an SVG element.

    Args:
        series: at least one, with at least one point in all.
        title: what the chart shows, for those who cannot see it.
        x_label: what is along the axis.
        limit: a value that the chart marks and whose excess it shades; always within the range shown.
        zero: whether 0 belongs to the range shown.

    Returns:
        ``<svg>`` text; everything in it is escaped.

    Raises:
        ValueError: there is no point to draw.
    """
    xs = np.concatenate([one.x for one in series]) if series else np.array([])
    ys = [np.concatenate([one.y, *(bound for bound in (one.low, one.high) if bound is not None)]) for one in series]
    values = np.concatenate(ys) if ys else np.array([])
    values = values[np.isfinite(values)]
    if not len(xs) or not len(values):
        raise ValueError(f"the chart {title!r} has no point to draw")
    marks = [value for value in (limit, 0.0 if zero else None) if value is not None]
    frame = _Frame(_padded(xs, 0.0), _padded(np.append(values, marks), 0.06))
    svg = _canvas(title)
    if limit is not None:
        _draw_limit(svg, frame, limit)
    _draw_axes(svg, frame, x_label)
    for one in series:
        _draw_series(svg, frame, one)
    return ElementTree.tostring(svg, encoding="unicode")


def histogram(before: Floats, after: Floats, *, title: str, x_label: str, bins: int = 20) -> str:
    """Two distributions over shared bins as an SVG element: share of the values per bin.

    Args:
        before: [N] finite or NaN values (NaN left out).
        after: [M] the same.
        title: what the chart shows, for those who cannot see it.
        x_label: what the values are.
        bins: number of bins.

    Raises:
        ValueError: one side has no value.
    """
    first, second = before[np.isfinite(before)], after[np.isfinite(after)]
    if not len(first) or not len(second):
        raise ValueError(f"the chart {title!r} has no values on one side")
    x_range = _padded(np.concatenate([first, second]), 0.0)
    edges = np.linspace(*x_range, bins + 1)
    shares = [np.histogram(values, edges)[0] / len(values) for values in (first, second)]
    frame = _Frame(x_range, (0.0, float(max(share.max() for share in shares)) * 1.05))
    svg = _canvas(title)
    _draw_axes(svg, frame, x_label, percent=True)
    for name, share in zip(("before", "after"), shares, strict=True):
        for low, high, height in zip(edges[:-1], edges[1:], share, strict=True):
            if height:
                x, y = frame.x(low) + 0.5, frame.y(height)
                width, tall = frame.x(high) - x - 0.5, frame.y(0.0) - y
                _add(svg, "rect", class_=f"bar {name}", x=x, y=y, width=width, height=tall)
    return ElementTree.tostring(svg, encoding="unicode")


def meter(value: float, *, limit: float, level: str, title: str) -> str:
    """A horizontal bar that shows a value against its limit, as an SVG element; ``level`` is its class."""
    width, height = 300.0, 10.0
    full = max(2 * limit, value)
    svg = ElementTree.Element("svg", {"viewBox": f"0 0 {width:g} {height + 16:g}", "role": "img", "class": "meter"})
    _add(svg, "title", text=title)
    _add(svg, "rect", class_="track", x=0, y=0, width=width, height=height, rx=5)
    _add(
        svg,
        "rect",
        class_=f"fill {level}",
        x=0,
        y=0,
        width=max(0.0, min(1.0, value / full)) * width,
        height=height,
        rx=5,
    )
    mark = limit / full * width
    _add(svg, "line", class_="limit", x1=mark, x2=mark, y1=-1, y2=height + 3)
    _add(svg, "text", class_="tick", x=mark, y=height + 14, text_anchor="middle", text=f"{limit:g}")
    return ElementTree.tostring(svg, encoding="unicode")


def reward_kl_picture(folder: str | Path, path: str | Path) -> Path:
    """Draw reward and sequence KL over training, side by side, as a PNG.

    Args:
        folder: a run folder.
        path: the picture to write (over what is there); its folder must exist.

    Returns:
        ``path``.

    Raises:
        DataError: it is no run folder, or it holds neither metrics nor evaluations to draw.
    """
    run = RunData.read(folder)
    panels: list[Panel] = [
        ("Reward", training_curve(*run.series("reward/mean")), evaluation_means(run, "rewards")),
        (
            "Sequence KL to the reference (nats)",
            training_curve(*run.series("policy/sequence_kl")),
            evaluation_means(run, "sequence_kl"),
        ),
    ]
    if not any(lines or points for _, lines, points in panels):
        raise DataError(f"{str(folder)!r} holds no reward or KL yet; draw it after the first evaluation")
    return panels_picture(panels, path)


def panels_picture(panels: Sequence[Panel], path: str | Path) -> Path:
    """Draw at least one panel, side by side, as a PNG over what is there; its folder must exist."""
    import matplotlib.figure  # here, so that importing the package stays fast

    figure = matplotlib.figure.Figure(figsize=(4.5 * len(panels), 3.3), dpi=160, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines, points) in zip(axes, panels, strict=True):
        _draw_panel(axis, lines, points)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=9)
    figure.savefig(Path(path), format="png", facecolor="white")
    return Path(path)


def _draw_panel(axis: Axes, lines: Sequence[Series], points: Series | None) -> None:
    for line in lines:
        if line.kind == "raw":
            axis.plot(line.x, line.y, color="#3b7dd8", alpha=0.3, lw=1)
        else:
            axis.plot(line.x, line.y, color="#3b7dd8", lw=2, label="training rollouts")
    if points is None:
        return
    if points.low is None or points.high is None:
        axis.plot(points.x, points.y, color="#d9622b", marker="o", ms=4, lw=1.2, label="held-out data")
    else:
        spread = np.nan_to_num(np.stack([points.y - points.low, points.high - points.y])).clip(min=0)
        style: dict[str, Any] = {"color": "#d9622b", "marker": "o", "ms": 4, "lw": 1.2, "capsize": 3}
        axis.errorbar(points.x, points.y, yerr=spread, label="held-out prompts, 95 %", **style)


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


def _padded(values: Floats, share: float) -> tuple[float, float]:
    """The range of the values with some room, never empty."""
    low, high = float(values.min()), float(values.max())
    if high == low:
        room = 0.5 if low == 0 else abs(low) / 10
        return low - room, high + room
    room = share * (high - low)
    return (low if low == 0 else low - room), high + room


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within the range, at most ``most`` + 1 of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [0.0 if index == 0 else index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick_text(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"


def _canvas(title: str) -> ElementTree.Element:
    svg = ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "class": "chart"})
    _add(svg, "title", text=title)
    return svg


def _add(parent: ElementTree.Element, tag: str, *, text: str = "", **attributes: object) -> ElementTree.Element:
    """A child element; ``class_`` becomes ``class`` and ``text_anchor`` becomes ``text-anchor``."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    values = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in attributes.items()}
    element = ElementTree.SubElement(parent, tag, {names[name]: value for name, value in values.items()})
    element.text = text or None
    return element


def _draw_axes(svg: ElementTree.Element, frame: _Frame, x_label: str, *, percent: bool = False) -> None:
    bottom = HEIGHT - BOTTOM
    for value in _ticks(*frame.y_range, 5):
        label = f"{100 * value:.4g} %" if percent else _tick_text(value)
        _add(svg, "line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=frame.y(value), y2=frame.y(value))
        _add(svg, "text", class_="tick", x=LEFT - 6, y=frame.y(value) + 4, text_anchor="end", text=label)
    for value in _ticks(*frame.x_range, 6):
        _add(svg, "line", class_="axis", x1=frame.x(value), x2=frame.x(value), y1=bottom, y2=bottom + 4)
        _add(svg, "text", class_="tick", x=frame.x(value), y=bottom + 17, text_anchor="middle", text=_tick_text(value))
    _add(svg, "line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom)
    _add(svg, "text", class_="tick", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle", text=x_label)


def _draw_limit(svg: ElementTree.Element, frame: _Frame, limit: float) -> None:
    y = frame.y(limit)
    _add(svg, "rect", class_="beyond", x=LEFT, width=WIDTH - LEFT - RIGHT, y=TOP, height=max(0.0, y - TOP))
    _add(svg, "line", class_="limit", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y)


def _draw_series(svg: ElementTree.Element, frame: _Frame, one: Series) -> None:
    points = [(frame.x(x), frame.y(y)) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]
    _add(svg, "polyline", class_=f"curve {one.kind}", points=" ".join(f"{x:g},{y:g}" for x, y in points))
    if one.kind != "eval" and len(points) > 1:
        return
    if one.low is not None and one.high is not None:
        for x, low, high in zip(one.x, one.low, one.high, strict=True):
            if math.isfinite(low) and math.isfinite(high):
                _add(svg, "line", class_="whisker", x1=frame.x(x), x2=frame.x(x), y1=frame.y(low), y2=frame.y(high))
    for index, (x, y) in enumerate(points):
        dot = _add(svg, "circle", class_=f"dot {one.kind}", cx=x, cy=y, r=3.5)
        if one.notes:
            _add(dot, "title", text=one.notes[index])
