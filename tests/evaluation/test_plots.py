from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tropism.errors import DataError
from tropism.evaluation.plots import (
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    Series,
    histogram,
    line_chart,
    meter,
    reward_kl_picture,
    training_curve,
)


def line(values: list[float]) -> Series:
    return Series(x=np.arange(len(values), dtype=float), y=np.array(values), kind="train")


def ticks(svg: str) -> list[str | None]:
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


@pytest.mark.parametrize(
    "values", [[1.0], [0.0], [0.5, 0.5], [-3.0, 2.0, 1e6], [1e-5, 3e-5], [2.0, float("nan"), 3.0], [-1e-9, 0.0]]
)
def test_every_coordinate_is_inside_the_picture(values: list[float]) -> None:
    svg = ElementTree.fromstring(line_chart([line(values)], title="t", limit=None))
    for element in svg.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.get(name, 0)) <= WIDTH
        for name in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.get(name, 0)) <= HEIGHT
        for x, y in re.findall(r"([-\d.e]+),([-\d.e]+)", element.get("points", "")):
            assert 0 <= float(x) <= WIDTH
            assert 0 <= float(y) <= HEIGHT


def test_ticks_are_round_numbers() -> None:
    assert ticks(line_chart([line([0.0, 1.0, 2.0, 9.0])], title="t"))[:5] == ["0", "2", "4", "6", "8"]
    assert "20k" in ticks(line_chart([line([0.0, 30_000.0])], title="t"))


def test_the_limit_is_in_the_picture_even_if_nothing_reaches_it() -> None:
    svg = ElementTree.fromstring(line_chart([line([0.0, 4.0])], title="t", limit=10.0, zero=True))
    limits = [element for element in svg.iter("line") if element.get("class") == "limit"]
    assert len(limits) == 1
    top = min(float(y) for e in svg.iter("polyline") for _, y in re.findall(r"([\d.]+),([\d.]+)", e.get("points", "")))
    assert float(limits[0].get("y1", "nan")) < top


def test_labels_are_escaped() -> None:
    assert "<script>" not in line_chart([line([1.0])], title="<script>", x_label="<script>")


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="has no point to draw"):
        line_chart([], title="empty")
    with pytest.raises(ValueError, match="has no point to draw"):
        line_chart([line([float("nan")])], title="empty")
    with pytest.raises(ValueError, match="no values on one side"):
        histogram(np.array([1.0]), np.array([np.nan]), title="empty", x_label="reward")


def test_long_curves_are_thinned_and_smoothed() -> None:
    assert [one.kind for one in training_curve(np.arange(5.0), np.ones(5))] == ["train"]
    assert training_curve(np.array([]), np.array([])) == []
    raw, smooth = training_curve(np.arange(3000.0), np.tile([0.0, 2.0], 1500))
    assert (raw.kind, smooth.kind) == ("raw", "train")
    assert len(raw.x) == MOST_POINTS
    assert raw.x[0] == pytest.approx(4.5)
    assert np.allclose(smooth.y, 1.0)


def test_moving_average_shrinks_at_the_ends() -> None:
    values = np.arange(30.0) ** 2
    _, smooth = training_curve(np.arange(30.0), values)
    assert smooth.y[0] == pytest.approx((0 + 1) / 2)
    assert smooth.y[10] == pytest.approx((81 + 100 + 121) / 3)
    assert smooth.y[-1] == pytest.approx((28**2 + 29**2) / 2)


def test_histogram_bars_show_shares() -> None:
    svg = ElementTree.fromstring(histogram(np.array([0.0, 0.0, 1.0]), np.array([1.0, np.nan]), title="t", x_label="r"))
    heights: dict[str, list[float]] = {"bar before": [], "bar after": []}
    for bar in svg.iter("rect"):
        heights[bar.get("class", "")].append(float(bar.get("height", "nan")))
    low, high = heights["bar before"]
    assert low == pytest.approx(2 * high, rel=1e-3)
    assert heights["bar after"] == [pytest.approx(3 * high, rel=1e-3)]


def test_meter_fills_up_to_its_end() -> None:
    widths = []
    for value in (-1.0, 5.0, 49.0, float("inf")):
        svg = ElementTree.fromstring(meter(value, limit=10.0, level="low", title="t"))
        widths.append([float(bar.get("width", "nan")) for bar in svg.iter("rect")][1])
    assert widths == [0.0, 75.0, 300.0, 300.0]


def test_picture_is_a_png(run_folder: Path, tmp_path: Path) -> None:
    path = reward_kl_picture(run_folder, tmp_path / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no reward or KL yet"):
        reward_kl_picture(tmp_path, tmp_path / "picture.png")
