"""Pictures of a sweep: the metric against each parameter, and the best so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tropism.sweeps.config import LISTED, LOGARITHMIC, SweepConfig
from tropism.sweeps.outcome import Row, best_of, shown_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
BLUE, ORANGE, GREY = "#3b7dd8", "#d9622b", "#8a8a8a"
LONGEST_LABEL = 24


def draw(rows: Sequence[Row], config: SweepConfig, folder: Path) -> None:
    """``parameters.png`` and ``history.png``.

    Args:
        rows: at least one with a value.
        folder: exists.
    """
    import matplotlib.figure  # here, so that importing the package stays fast

    keys = list(config.parameters)
    lines = -(-len(keys) // COLUMNS)
    columns = min(COLUMNS, len(keys))
    figure = matplotlib.figure.Figure(figsize=(4.2 * columns, 3.4 * lines), dpi=160, layout="constrained")
    panels = list(np.ravel(figure.subplots(lines, columns, squeeze=False)))
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    for index, (key, panel) in enumerate(zip(keys, panels, strict=False)):
        _draw_parameter(panel, rows, config, key)
        _dress(panel, key, config.metric if index % columns == 0 else "")
    _legend(panels[0])
    figure.savefig(folder / "parameters.png", format="png", facecolor="white")

    figure = matplotlib.figure.Figure(figsize=(7.0, 3.6), dpi=160, layout="constrained")
    panel = figure.subplots()
    _draw_history(panel, rows, config)
    _dress(panel, "trial", config.metric)
    _legend(panel)
    figure.savefig(folder / "history.png", format="png", facecolor="white")


def _draw_parameter(panel: Axes, rows: Sequence[Row], config: SweepConfig, key: str) -> None:
    from matplotlib.ticker import NullFormatter

    parameter = config.parameters[key]
    listed = parameter.strategy in LISTED
    places = {label: index for index, label in enumerate(parameter.labels)} if listed else {}

    def place(row: Row) -> float:
        if not listed:
            return float(row.values[key])
        # Trials with the same value stand side by side, by number.
        shift = (row.number % 7 - 3) * 0.03
        return places[parameter.labels[parameter.values.index(row.values[key])]] + shift

    shown = [row for row in rows if key in row.values]
    _draw_points(panel, shown, config, [place(row) for row in shown])
    if listed:
        labels = [_cut(shown_value(value)) for value in parameter.values]
        crowded = sum(map(len, labels)) > 40
        panel.set_xticks(range(len(labels)), labels, rotation=30 if crowded else 0, ha="right" if crowded else "center")
        panel.set_xlim(-0.5, len(labels) - 0.5)
        return
    low, high = parameter.ends
    if parameter.strategy in LOGARITHMIC:
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())
        room = (high / low) ** 0.04
        panel.set_xlim(low / room, high * room)
    else:
        room = (high - low) * 0.04
        panel.set_xlim(low - room, high + room)


def _draw_history(panel: Axes, rows: Sequence[Row], config: SweepConfig) -> None:
    _draw_points(panel, rows, config, [float(row.number) for row in rows])
    from matplotlib.ticker import MaxNLocator

    complete = sorted((row for row in rows if row.state == "complete"), key=lambda row: row.number)
    values = [row.value for row in complete if row.value is not None]
    if values:
        best = (np.maximum if config.mode == "max" else np.minimum).accumulate(values)
        numbers = [row.number for row in complete]
        panel.step(
            [*numbers, len(rows) - 0.5], [*best, best[-1]], where="post", color=ORANGE, lw=1.5, label="best so far"
        )
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_points(panel: Axes, rows: Sequence[Row], config: SweepConfig, places: Sequence[float]) -> None:
    """Trials with their uncertainty; failed ones, which have no value, as crosses on the lower edge."""
    styles: dict[str, dict[str, Any]] = {
        "pruned": {"color": GREY, "marker": "v", "mfc": "white", "label": "pruned"},
        "complete": {"color": BLUE, "marker": "o", "label": "trial"},
    }
    measured = [(row, row.value, place) for row, place in zip(rows, places, strict=True) if row.value is not None]
    for state, style in styles.items():
        group = [(row, value, place) for row, value, place in measured if row.state == state]
        if group:
            whiskers = np.array([_whisker(row, value) for row, value, _ in group]).T
            at, values = [place for *_, place in group], [value for _, value, _ in group]
            panel.errorbar(at, values, yerr=whiskers, ls="none", ms=5, elinewidth=1, **style)
    best = best_of(rows, config.mode)
    for row, value, place in measured:
        if row is best:
            panel.plot(place, value, ls="none", marker="o", ms=11, mfc="none", mec=ORANGE, mew=1.8, label="best")
    failed = [place for row, place in zip(rows, places, strict=True) if row.state == "failed"]
    if failed:
        edge = panel.get_xaxis_transform()
        panel.plot(
            failed, [0.0] * len(failed), ls="none", marker="x", color="#c0392b", transform=edge, clip_on=False,
            label="failed",
        )  # fmt: skip


def _whisker(row: Row, value: float) -> tuple[float, float]:
    """Below and above: the interval of a single run, one standard deviation over several."""
    if row.spread is not None:
        return row.spread, row.spread
    if row.interval is not None:
        return max(0.0, value - row.interval[0]), max(0.0, row.interval[1] - value)
    return 0.0, 0.0


def _dress(panel: Axes, x_label: str, y_label: str) -> None:
    panel.set_xlabel(x_label)
    panel.set_ylabel(y_label)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    if len(labels) > 1:
        panel.legend(handles, labels, frameon=False, fontsize=8)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 3] + "..."
