"""Charts as SVG elements that a page's style sheet colours.

The SVG carries class names and no colours, so that it follows the page into the dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from tropism.evaluation.chart_colours import SHAPES, colour_classes, marker
from tropism.evaluation.statistics import Interval

Floats = NDArray[np.float64]

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 44
LONGEST_NAME = 18
"""Letters of a name beside a row."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line or set of points of a chart."""

    x: Floats
    """[K]"""
    y: Floats
    """[K]"""
    kind: Literal["raw", "train", "eval", "points", "rule"]
    """``raw``: a faint line; ``train``: a line; ``eval``: joined points with whiskers; ``points``: the same without
    the line; ``rule``: a dashed line to compare with. The style sheet's class too."""
    low: Floats | None = None
    """[K] lower end of each whisker, NaN where unknown."""
    high: Floats | None = None
    """[K] upper end of each whisker, NaN where unknown."""
    x_low: Floats | None = None
    """[K] left end of each whisker along the axis, NaN where unknown."""
    x_high: Floats | None = None
    """[K] right end of each whisker along the axis, NaN where unknown."""
    notes: Sequence[str] = ()
    """[K] what a point says when it is pointed at."""
    label: str = ""
    """What the legend calls it."""
    colour: int | None = None
    """0 to 15: a colour and marker of its own, as ``chart_colours`` numbers them; None: those of its kind."""

    @property
    def classes(self) -> str:
        """The style sheet's classes of its line and points."""
        return self.kind if self.colour is None else f"{self.kind} {colour_classes(self.colour)}"


def legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Key and text of each series that has a label, as ``pages.chart_block`` takes them."""
    keys = [one.kind if one.colour is None else f"c{one.colour}" for one in series]
    return [(key, one.label) for key, one in zip(keys, series, strict=True) if one.label]


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
    xs, values = (_finite(series, names) for names in (("x", "x_low", "x_high"), ("y", "low", "high")))
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


def _finite(series: Sequence[Series], names: tuple[str, str, str]) -> Floats:
    """Every finite number of these fields."""
    fields = [getattr(one, name) for one in series for name in names]
    values = np.concatenate([field for field in fields if field is not None]) if fields else np.array([])
    finite: Floats = values[np.isfinite(values)]
    return finite


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
    edges = histogram_edges(np.concatenate([first, second]), bins)
    shares = [np.histogram(values, edges)[0] / len(values) for values in (first, second)]
    frame = _Frame((float(edges[0]), float(edges[-1])), (0.0, float(max(share.max() for share in shares)) * 1.05))
    svg = _canvas(title)
    _draw_axes(svg, frame, x_label, percent=True)
    for name, share in zip(("before", "after"), shares, strict=True):
        for low, high, height in zip(edges[:-1], edges[1:], share, strict=True):
            if height:
                x, y = frame.x(low) + 0.5, frame.y(height)
                width, tall = frame.x(high) - x - 0.5, frame.y(0.0) - y
                _add(svg, "rect", class_=f"bar {name}", x=x, y=y, width=width, height=tall)
    return ElementTree.tostring(svg, encoding="unicode")


def histogram_edges(values: Floats, bins: int) -> Floats:
    """[bins + 1] ends of bins of equal width over finite values."""
    return np.linspace(*_padded(values, 0.0), bins + 1)


def interval_chart(
    rows: Sequence[tuple[str, Interval, int | None]], *, title: str, x_label: str, rule: float | None = None
) -> str:
    """Means with their intervals below each other, as an SVG element.

    Args:
        rows: name, mean and interval, and number of the colour (or None) of each, from the top.
        title: what the chart shows, for those who cannot see it.
        x_label: what the values are.
        rule: a value to compare with, such as that of the base model; a dashed line.

    Raises:
        ValueError: no row has a finite mean.
    """
    shown = [row for row in rows if math.isfinite(row[1].mean)]
    if not shown:
        raise ValueError(f"the chart {title!r} has no value to draw")
    ends = np.array([value for _, one, _ in shown for value in (one.mean, one.low, one.high)])
    ends = ends if rule is None else np.append(ends, rule)
    low, high = _padded(ends[np.isfinite(ends)], 0.04)
    left, bottom = 130, TOP + 26 * len(shown)

    def place(value: float) -> float:
        return round(left + (value - low) / (high - low) * (WIDTH - left - RIGHT), 2)

    svg = _canvas(title, height=bottom + BOTTOM)
    for tick in _ticks(low, high, 5):
        _add(svg, "line", class_="grid", x1=place(tick), x2=place(tick), y1=TOP, y2=bottom)
        _add(svg, "text", class_="tick", x=place(tick), y=bottom + 18, text_anchor="middle", text=_tick_text(tick))
    _add(svg, "text", class_="tick", x=(left + WIDTH - RIGHT) / 2, y=bottom + 38, text_anchor="middle", text=x_label)
    if rule is not None and math.isfinite(rule):
        _add(svg, "line", class_="curve rule", x1=place(rule), x2=place(rule), y1=TOP, y2=bottom)
    for number, (name, one, colour) in enumerate(shown):
        y, classes = TOP + 26 * number + 13, "eval" if colour is None else colour_classes(colour)
        _add(svg, "text", class_="tick", x=left - 8, y=y + 4, text_anchor="end", text=_short(name))
        if math.isfinite(one.low) and math.isfinite(one.high):
            _add(svg, "line", class_=f"whisker {classes}", x1=place(one.low), x2=place(one.high), y1=y, y2=y)
        where, shape = f"translate({place(one.mean):g} {y})", SHAPES[marker(colour or 0)]
        dot = _add(svg, "path", class_=f"dot {classes}", transform=where, d=shape)
        _add(dot, "title", text=f"{name}: {one.mean:.4g}")
    return ElementTree.tostring(svg, encoding="unicode")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


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


def _canvas(title: str, height: int = HEIGHT) -> ElementTree.Element:
    svg = ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {height}", "role": "img", "class": "chart"})
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
        _add(svg, "text", class_="tick", x=frame.x(value), y=bottom + 20, text_anchor="middle", text=_tick_text(value))
    _add(svg, "line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom)
    _add(svg, "text", class_="tick", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle", text=x_label)


def _draw_limit(svg: ElementTree.Element, frame: _Frame, limit: float) -> None:
    y = frame.y(limit)
    _add(svg, "rect", class_="beyond", x=LEFT, width=WIDTH - LEFT - RIGHT, y=TOP, height=max(0.0, y - TOP))
    _add(svg, "line", class_="limit", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y)


def _draw_series(svg: ElementTree.Element, frame: _Frame, one: Series) -> None:
    known = [index for index in range(len(one.y)) if math.isfinite(one.x[index]) and math.isfinite(one.y[index])]
    points = [(frame.x(one.x[index]), frame.y(one.y[index])) for index in known]
    if one.kind != "points":
        joined = " ".join(f"{x:g},{y:g}" for x, y in points)
        _add(svg, "polyline", class_=f"curve {one.classes}", points=joined)
    if one.kind not in ("eval", "points") and len(points) > 1:
        return
    for index, (x, y) in zip(known, points, strict=True):
        _draw_whiskers(svg, frame, one, index, (x, y))
        if one.colour is None:
            dot = _add(svg, "circle", class_=f"dot {one.classes}", cx=x, cy=y, r=3.5)
        else:
            shape, place = SHAPES[marker(one.colour)], f"translate({x:g} {y:g})"
            dot = _add(svg, "path", class_=f"dot {one.classes}", transform=place, d=shape)
        note = one.notes[index] if one.notes else one.label
        if note:
            _add(dot, "title", text=note)


def _draw_whiskers(
    svg: ElementTree.Element, frame: _Frame, one: Series, index: int, middle: tuple[float, float]
) -> None:
    (x, y), classes = middle, "whisker" if one.colour is None else f"whisker {colour_classes(one.colour)}"
    for low, high, upright in ((one.low, one.high, True), (one.x_low, one.x_high, False)):
        if low is None or high is None or not math.isfinite(low[index]) or not math.isfinite(high[index]):
            continue
        if upright:
            _add(svg, "line", class_=classes, x1=x, x2=x, y1=frame.y(low[index]), y2=frame.y(high[index]))
        else:
            _add(svg, "line", class_=classes, x1=frame.x(low[index]), x2=frame.x(high[index]), y1=y, y2=y)
