from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import pytest

from tropism.errors import DataError
from tropism.evaluation.charts import Chart, Histogram, LineChart, pictures
from tropism.evaluation.pictures import histogram_picture, line_picture, reward_kl_picture
from tropism.evaluation.plots import HEIGHT, WIDTH, Series, histogram, interval_chart, legend, line_chart, meter
from tropism.evaluation.run_curves import MOST_POINTS, training_curve
from tropism.evaluation.statistics import Interval


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


# Several series -------------------------------------------------------------------------------------------------------


def method(number: int, kind: Literal["eval", "points"] = "eval") -> Series:
    x, y = np.array([1.0, 2.0, np.nan]), np.array([0.0, float(number), 5.0])
    return Series(
        x=x, y=y, low=y - 1, high=y + 1, x_low=x - 0.5, x_high=x, kind=kind, label=f"m{number}", colour=number
    )


def test_twelve_methods_have_colours_markers_and_whiskers_of_their_own() -> None:
    series = [method(number) for number in range(12)]
    svg = ElementTree.fromstring(line_chart(series, title="t", x_label="KL"))
    dots = [one for one in svg.iter("path") if "dot" in one.get("class", "")]
    assert len(dots) == 12 * 2  # the point without a place is left out
    assert len({(dot.get("class"), dot.get("d")) for dot in dots}) == 12
    whiskers = [one for one in svg.iter("line") if one.get("class", "").startswith("whisker c3")]
    upright = [one for one in whiskers if one.get("x1") == one.get("x2")]
    assert len(whiskers) == 2 * 4 and len(upright) == 4  # series 3 and 11, two points, both ways
    assert [one.get("class") for one in svg.iter("polyline")][8] == "curve eval c0 dashed"
    assert legend(series)[:2] == [("c0", "m0"), ("c1", "m1")]


def test_points_alone_have_no_line() -> None:
    svg = ElementTree.fromstring(line_chart([method(1, "points")], title="t"))
    assert list(svg.iter("polyline")) == []
    assert [one.text for one in svg.iter("title")] == ["t", "m1", "m1"]


def test_legends_name_what_has_a_label() -> None:
    assert [one.label for one in training_curve(np.arange(40.0), np.ones(40))] == ["", "training"]
    assert legend(training_curve(np.arange(40.0), np.ones(40))) == [("train", "training")]


def test_notes_belong_to_their_points() -> None:
    series = Series(x=np.arange(3.0), y=np.array([1.0, np.nan, 2.0]), kind="eval", notes=["first", "lost", "last"])
    svg = ElementTree.fromstring(line_chart([series], title="t"))
    assert [dot[0].text for dot in svg.iter("circle")] == ["first", "last"]


def test_intervals_lie_below_each_other() -> None:
    rows = [("sft", Interval(1.0, 0.0, 2.0), 0), ("unknown", Interval(np.nan, np.nan, np.nan), 1)]
    rows += [("a name that is too long to stand", Interval(3.0, np.nan, np.nan), 2)]
    svg = ElementTree.fromstring(interval_chart(rows, title="t", x_label="reward", rule=4.0))
    places = [re.findall(r"[\d.]+", one.get("transform", "")) for one in svg.iter("path")]
    (first_x, first_y), (last_x, last_y) = ((float(x), float(y)) for x, y in places)
    assert first_x < last_x and first_y < last_y
    (whisker,) = (one for one in svg.iter("line") if one.get("class") == "whisker c0")
    assert (float(whisker.get("x1", "nan")) + float(whisker.get("x2", "nan"))) / 2 == pytest.approx(first_x, abs=0.01)
    (rule,) = (one for one in svg.iter("line") if one.get("class") == "curve rule")
    assert float(rule.get("x1", "nan")) > last_x
    texts = [text or "" for text in ticks(ElementTree.tostring(svg, encoding="unicode"))]
    assert "sft" in texts and "unknown" not in texts and any(text.endswith("…") for text in texts)
    with pytest.raises(ValueError, match="no value to draw"):
        interval_chart(rows[1:2], title="t", x_label="reward")


# Files beside the page ------------------------------------------------------------------------------------------------


def test_pictures_of_equal_data_are_equal_bytes() -> None:
    charts: list[Chart] = [
        LineChart(
            title="$t", name="Reward/Mean", series=[method(0), method(9), line([1.0, 2.0])], limit=3.0, zero=True
        ),
        Histogram(title="\0 \ud800 \u4f60", name="reward mean", before=np.arange(9.0), after=np.ones(3), x_label="r"),
        Histogram(
            title="t", name="", before=np.array([1e-320, 0.0]), after=np.full(2, np.nan_to_num(1e100)), x_label=""
        ),
    ]
    first, second = pictures(charts), pictures(charts)
    assert first == second
    assert list(first) == ["reward-mean.png", "reward-mean-2.png", "unnamed.png"]
    assert all(content.startswith(b"\x89PNG") for content in first.values())
    other = pictures([LineChart(title="t", name="x", series=[line([1.0, 3.0])])])
    assert other["x.png"] not in first.values()


def test_a_picture_of_many_methods_has_room_for_their_names() -> None:
    few, many = (line_picture([method(number) for number in range(count)], title="t") for count in (2, 12))
    widths = [int.from_bytes(content[16:20], "big") for content in (few, many)]
    assert widths == [864, 1184]


def test_names_in_pictures_are_no_formulas() -> None:
    """Between dollar signs matplotlib reads a formula, and an unknown command in one is an error."""
    name = r"from $10 to $\nonsense{"
    assert line_picture([replace(method(0), label=name)], title="t").startswith(b"\x89PNG")
    values = np.arange(5.0)
    assert histogram_picture(values, values, title="t", x_label="x", labels=(name, "after")).startswith(b"\x89PNG")
