"""Charts that a page shows as vector graphics and that lie beside it as PNG files of the same name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from tropism.evaluation.page_blocks import chart_block, charts_block
from tropism.evaluation.pictures import histogram_picture, line_picture
from tropism.evaluation.plots import Series, histogram, legend, line_chart

Floats = NDArray[np.float64]


class Chart(Protocol):
    """One figure of a page."""

    @property
    def title(self) -> str:
        """What stands above it."""

    @property
    def name(self) -> str:
        """The name of its PNG file, without ``.png``."""

    def block(self) -> Markup:
        """The figure for a page."""

    def picture(self) -> bytes:
        """The PNG file; equal data gives equal bytes."""


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Lines and points, as ``plots.line_chart`` draws them."""

    title: str
    name: str
    series: Sequence[Series]
    x_label: str = "step"
    limit: float | None = None
    """A value that the chart marks and whose excess it shades."""
    limit_label: str = ""
    zero: bool = False
    """Whether 0 belongs to the range shown."""

    def block(self) -> Markup:
        """The figure for a page; the legend names the series that have labels, and the limit."""
        svg = line_chart(self.series, title=self.title, x_label=self.x_label, limit=self.limit, zero=self.zero)
        marks = [("limit", self.limit_label)] if self.limit is not None and self.limit_label else []
        return chart_block(self.title, svg, legend=[*legend(self.series), *marks])

    def picture(self) -> bytes:
        """The PNG file."""
        return line_picture(self.series, title=self.title, x_label=self.x_label, limit=self.limit, zero=self.zero)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Two distributions, as ``plots.histogram`` draws them."""

    title: str
    name: str
    before: Floats
    """[N] NaN where unknown."""
    after: Floats
    """[M] NaN where unknown."""
    x_label: str
    labels: tuple[str, str] = ("before", "after")

    def block(self) -> Markup:
        """The figure for a page."""
        svg = histogram(self.before, self.after, title=self.title, x_label=self.x_label)
        return chart_block(self.title, svg, legend=list(zip(("before", "after"), self.labels, strict=True)))

    def picture(self) -> bytes:
        """The PNG file."""
        return histogram_picture(self.before, self.after, title=self.title, x_label=self.x_label, labels=self.labels)


def blocks(charts: Sequence[Chart], *, small: bool = False) -> Markup:
    """The charts in as many columns as there is room for."""
    return charts_block([chart.block() for chart in charts], small=small)


def pictures(charts: Sequence[Chart]) -> dict[str, bytes]:
    """The PNG files of the charts by name, for ``pages.write_page``; no two names are alike."""
    files: dict[str, bytes] = {}
    for chart in charts:
        stem = file_stem(chart.name)
        name, number = f"{stem}.png", 2
        while name in files:
            name, number = f"{stem}-{number}.png", number + 1
        files[name] = chart.picture()
    return files


def file_stem(text: str) -> str:
    """Letters, digits and hyphens alone, at most 60: safe as the name of a file and as an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].rstrip("-") or "unnamed"
