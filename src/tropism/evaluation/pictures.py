"""Pictures as PNG files, made with matplotlib: charts of pages once more, and panels for model cards."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tropism.errors import DataError
from tropism.evaluation.chart_colours import LIGHT, is_dashed, marker
from tropism.evaluation.plots import Series, histogram_edges
from tropism.evaluation.result_files import BLUE, GREY, ORANGE, as_names, dress, new_figure, rendered
from tropism.evaluation.run_curves import evaluation_means, training_curve
from tropism.evaluation.run_folder import RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

Panel = tuple[str, list[Series], Series | None]
"""Title, curve of training, and points of evaluation, of which one may be missing."""

RED = "#c02b2b"
MOST_INSIDE = 4
"""Names in a legend that lies in the panel."""
MOST_LETTERS = 80
"""Of a name in a picture."""


def line_picture(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "step",
    y_label: str = "",
    limit: float | None = None,
    zero: bool = False,
) -> bytes:
    """What ``plots.line_chart`` draws, as the bytes of a PNG file; equal data gives equal bytes."""
    figure, axis = _one_panel(names=sum(1 for one in series if one.label))
    for one in series:
        _draw(axis, one)
    if limit is not None:
        axis.axhline(limit, color=RED, lw=1.2, ls="--")
    if zero:
        axis.axhline(0.0, alpha=0.0)
    _dress(axis, title=title, x_label=x_label, y_label=y_label)
    return _rendered(figure)


def histogram_picture(
    before: Floats,
    after: Floats,
    *,
    title: str,
    x_label: str,
    labels: tuple[str, str] = ("before", "after"),
    bins: int = 20,
) -> bytes:
    """What ``plots.histogram`` draws, as the bytes of a PNG file; equal data gives equal bytes."""
    sides = [values[np.isfinite(values)] for values in (before, after)]
    edges = histogram_edges(np.concatenate(sides), bins)
    figure, axis = _one_panel()
    for values, colour, label in zip(sides, (GREY, ORANGE), labels, strict=True):
        shares = 100 * np.histogram(values, edges)[0] / len(values)
        axis.stairs(shares, edges, fill=True, color=colour, alpha=0.6, label=_shown(label))
    _dress(axis, title=title, x_label=x_label, y_label="share (%)")
    return _rendered(figure)


def _one_panel(names: int = 0) -> tuple[Figure, Axes]:
    """A picture with fixed margins: fitting them to the labels would double the time that it takes.

    More names than ``MOST_INSIDE`` stand beside the panel.
    """
    width = 5.4 + 2.0 * (names > MOST_INSIDE)
    figure = new_figure(width, 3.6)
    figure.set_layout_engine("none")
    return figure, figure.add_axes((0.7 / width, 0.14, 4.5 / width, 0.77))


def _dress(axis: Axes, *, title: str, x_label: str, y_label: str) -> None:
    dress(axis, title=_shown(title), x=_shown(x_label), y=_shown(y_label))
    names = len(axis.get_legend_handles_labels()[1])
    if not names:
        return
    if names > MOST_INSIDE:
        legend = axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        legend = axis.legend(framealpha=0.85, edgecolor="none", fontsize=9)
    as_names(legend)


def _rendered(figure: Figure) -> bytes:
    with warnings.catch_warnings():
        # Names in scripts that the one font of matplotlib lacks: boxes stand there.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph", category=UserWarning)
        return rendered(figure, "png")


def _shown(text: str) -> str:
    """The text without what cannot be drawn."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", " ", text[:MOST_LETTERS])


def _draw(axis: Axes, one: Series) -> None:
    """One series in its colour and with its marker."""
    held_out = "held-out" if one.low is None else "held-out, 95 %"
    label = _shown(one.label).lstrip("_") or {"train": "training", "eval": held_out}.get(one.kind, "_")
    number = one.colour
    colour = LIGHT[number % len(LIGHT)] if number is not None else _colour_of(one)
    if one.kind == "raw":
        axis.plot(one.x, one.y, color=colour, alpha=0.3, lw=1)
        return
    line: dict[str, Any] = {"color": colour, "lw": 2 if one.kind == "train" else 1.2, "ms": 5}
    line["ls"] = "--" if one.kind == "rule" or (number is not None and is_dashed(number)) else "-"
    if one.kind == "points":
        line["ls"] = "none"
    if one.kind in ("eval", "points") or len(one.y) == 1:
        line["marker"] = marker(number) if number is not None else "o"
    axis.errorbar(
        one.x,
        one.y,
        xerr=_spread(one.x, one.x_low, one.x_high),
        yerr=_spread(one.y, one.low, one.high),
        label=label,
        capsize=2,
        **line,
    )


def _colour_of(one: Series) -> str:
    return {"eval": ORANGE, "points": ORANGE, "rule": GREY}.get(one.kind, BLUE)


def _spread(middle: Floats, low: Floats | None, high: Floats | None) -> Floats | None:
    """[2, K] distances to both ends, 0 where an end is unknown."""
    if low is None or high is None:
        return None
    spread: Floats = np.nan_to_num(np.stack([middle - low, high - middle])).clip(min=0)
    return spread


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
    figure = new_figure(4.5 * len(panels), 3.3)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines, points) in zip(axes, panels, strict=True):
        for one in [*lines, *([points] if points else [])]:
            _draw(axis, one)
        _dress(axis, title=title, x_label="step", y_label="")
    Path(path).write_bytes(_rendered(figure))
    return Path(path)
