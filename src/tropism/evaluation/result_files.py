"""Tables, statistics and pictures that a measurement leaves in a folder, in one form and one look."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism.evaluation.statistics import Interval
from tropism.storage import ensure_room, write_whole, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

BLUE, ORANGE, GREY = "#3b7dd8", "#d9622b", "#9aa0a6"


def write_files(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files over older ones; each appears whole or not at all.

    Raises:
        StorageError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        ensure_room(folder, sum(map(len, contents.values())))
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in contents]


def csv_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Text in quotes and otherwise as it is, numbers to the last bit, nothing where there is no number."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[without_nan(value) for value in row] for row in rows])
    return out.getvalue().encode("utf-8")


def without_nan(value: Any) -> Any:
    """The value, or None for NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def plain_values(value: Any) -> Any:
    """Dataclasses as dictionaries, intervals as value, low and high, NaN as None."""
    if isinstance(value, Interval):
        return {"value": without_nan(value.mean), "low": without_nan(value.low), "high": without_nan(value.high)}
    if is_dataclass(value):
        return {one.name: plain_values(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain_values(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return [plain_values(one) for one in value]
    return without_nan(value)


def new_figure(width: float, height: float) -> Figure:
    """An empty picture of so many inches."""
    import matplotlib.figure  # here, so that importing the package stays fast

    return matplotlib.figure.Figure(figsize=(width, height), dpi=160, layout="constrained")


def dress(axis: Axes, *, title: str, x: str, y: str) -> None:
    """The title, labels and look of every panel."""
    # A name is text; what stands between dollar signs in it is no formula.
    axis.set_title(title, fontsize=11, loc="left", parse_math=False)
    axis.set_xlabel(x, parse_math=False)
    axis.set_ylabel(y, parse_math=False)
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def as_names(legend: Legend) -> None:
    """Show what a legend names as it is written, dollar signs too, as ``dress`` does."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def rendered(figure: Figure, kind: str) -> bytes:
    """The picture as a file; equal pictures give equal bytes."""
    import matplotlib  # here, so that importing the package stays fast

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "tropism"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(out, format=kind, facecolor="white", metadata=metadata)
    return out.getvalue()
