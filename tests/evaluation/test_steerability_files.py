from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tropism.errors import DataError, StorageError
from tropism.evaluation.steerability import Samples, TrainingRewards, steerability
from tropism.evaluation.steerability_files import SweepRecord, _pictures, write_sweep

NASTY = ("=SUM(A1)", 'a "quoted" word', "two\nlines\r\nand one", "comma, here", "+1", "@x", "-2", "ünïcode ☃", " ")

NAMES = {
    *("steerability.csv", "high_reward_completions.csv", "low_reward_completions.csv", "sampled_completions.csv"),
    "statistics.json",
    *(f"{name}.{kind}" for kind in ("png", "svg")
      for name in ("steerability", "high_reward_dist", "low_reward_dist", "correlation")),
}  # fmt: skip


def make_samples(rows: list[tuple[int, float, float]], *, kl: float = 1.5) -> Samples:
    prompt, target, achieved = (np.array(column) for column in zip(*rows, strict=True))
    return Samples(
        prompts=tuple(NASTY[row[0] % len(NASTY)] for row in rows),
        completions=tuple(NASTY[number % len(NASTY)] for number in range(len(rows))),
        prompt_indices=prompt,
        targets=target,
        achieved=achieved,
        sequence_kl=np.full(len(rows), kl),
    )


def make_record(*, name: str = "warmth", prompts: int = 12, kl: float = 1.5, moved: float = 0.8) -> SweepRecord:
    rng = np.random.default_rng(0)
    training = TrainingRewards.of(np.linspace(0, 10, 101))
    rows = [(p, t, moved * t + rng.normal()) for t in (-3.0, 0.5, 2.5, 5.0, 9.5, 13.0) for p in range(prompts)]
    rows[-1] = (prompts - 1, 13.0, math.nan)
    samples = make_samples(rows, kl=kl)
    drawn = make_samples([(p, t, moved * t + rng.normal()) for p, t in enumerate(rng.uniform(0, 10, prompts))])
    result = steerability(samples, training, resamples=100)
    return SweepRecord(name=name, result=result, samples=samples, sampled=drawn, training=training)


@pytest.fixture(scope="module")
def record() -> SweepRecord:
    return make_record()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn in one format and few points, which takes a tenth of the time."""

    def draw(figure: Any, kind: str) -> bytes:
        out = io.BytesIO()
        if kind == "png":
            figure.savefig(out, format="png", dpi=25)
        return out.getvalue()

    monkeypatch.setattr("tropism.evaluation.steerability_files.rendered", draw)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropism.evaluation.steerability_files.rendered", lambda figure, kind: kind.encode())


@pytest.fixture(scope="module")
def folder(record: SweepRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "inner" / "steerability"
    assert {path.name for path in write_sweep(folder, record)} == NAMES
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_file_is_there_and_nothing_else(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == NAMES


def test_target_table(folder: Path, record: SweepRecord) -> None:
    rows = read(folder / "steerability.csv")
    header = "target in_range n mean_achieved low high std median mean_kl coverage"
    assert list(rows[0]) == header.split()
    assert [float(row["target"]) for row in rows] == [-3.0, 0.5, 2.5, 5.0, 9.5, 13.0]
    assert [row["in_range"] for row in rows] == ["false", "true", "true", "true", "true", "false"]
    assert [row["n"] for row in rows] == ["12"] * 5 + ["11"]
    for row in rows:
        here = record.samples.targets == float(row["target"])
        achieved = record.samples.achieved[here]
        achieved = achieved[~np.isnan(achieved)]
        assert float(row["mean_achieved"]) == pytest.approx(achieved.mean())
        assert float(row["low"]) < achieved.mean() < float(row["high"])
        assert float(row["median"]) == pytest.approx(np.median(achieved))
        squares = sum((achieved - achieved.mean()) ** 2)
        assert float(row["std"]) == pytest.approx(math.sqrt(squares / (len(achieved) - 1)))
        assert float(row["mean_kl"]) == 1.5
    assert float(rows[0]["coverage"]) == 0.0 and float(rows[2]["coverage"]) > 0.05


@pytest.mark.parametrize(("name", "target"), [("high", 9.5), ("low", 0.5), ("sampled", None)])
def test_completion_tables_hold_texts_as_they_are_and_targets_in_raw_units(
    name: str, target: float | None, folder: Path, record: SweepRecord
) -> None:
    """The highest and lowest target are those within the training range, and no scaled number stands in the table."""
    rows = read(folder / f"{name}_reward_completions.csv" if target else folder / "sampled_completions.csv")
    samples = record.samples.at(target) if target else record.sampled
    assert list(rows[0]) == ["prompt", "completion", "target_reward", "actual_reward"]
    assert tuple(row["prompt"] for row in rows) == samples.prompts
    assert tuple(row["completion"] for row in rows) == samples.completions
    assert [float(row["target_reward"]) for row in rows] == samples.targets.tolist()
    assert [float(row["actual_reward"]) for row in rows] == samples.achieved.tolist()
    if target:
        assert {float(row["target_reward"]) for row in rows} == {target}


@pytest.mark.usefixtures("undrawn")
def test_what_is_unscored_is_an_empty_cell(tmp_path: Path, record: SweepRecord) -> None:
    achieved = record.sampled.achieved.copy()
    achieved[3] = math.nan
    write_sweep(tmp_path, replace(record, sampled=replace(record.sampled, achieved=achieved)))
    rows = read(tmp_path / "sampled_completions.csv")
    assert [row["actual_reward"] == "" for row in rows] == [index == 3 for index in range(12)]
    assert json.loads((tmp_path / "statistics.json").read_text())["distributions"]["sampled"]["count"] == 11


def test_statistics(folder: Path, record: SweepRecord) -> None:
    said = json.loads((folder / "statistics.json").read_text())
    assert said["reward"] == "warmth" and said["training"]["min"] == 0 and said["training"]["pct_95"] == 9.5
    result = record.result
    for name in ("spearman", "slope", "calibration_error", "gap", "gap_share", "control_share", "sequence_kl"):
        interval = getattr(result, name)
        assert said[name] == {"value": interval.mean, "low": interval.low, "high": interval.high}
    assert [one["target"] for one in said["targets"]] == [-3.0, 0.5, 2.5, 5.0, 9.5, 13.0]
    assert [(one["side"], one["moves_on"]) for one in said["beyond"]] == [("below", True), ("above", True)]
    high = record.samples.achieved[record.samples.targets == 9.5]
    described = said["distributions"]["high"]
    assert described["count"] == 12 and described["mean"] == pytest.approx(sum(high) / 12)
    assert described["min"] == min(high) and described["max"] == max(high)
    assert set(described) == {"count", "min", "max", "mean", "median", "std",
                              *(f"pct_{share}" for share in (1, 5, 25, 75, 95, 99))}  # fmt: skip
    x, y = record.sampled.targets, record.sampled.achieved
    assert said["sampled_pearson"]["value"] == pytest.approx(float(np.corrcoef(x, y)[0, 1]))
    assert said["unscored"] == 1


@pytest.mark.usefixtures("undrawn")
def test_undefined_numbers_are_null(tmp_path: Path) -> None:
    write_sweep(tmp_path, make_record(prompts=1, kl=math.nan))
    said = json.loads((tmp_path / "statistics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert said["sequence_kl"] == {"value": None, "low": None, "high": None}
    assert said["slope"]["value"] is not None and said["slope"]["low"] is None
    assert read(tmp_path / "steerability.csv")[0]["mean_kl"] == ""


def test_pictures_are_pictures(folder: Path) -> None:
    for name in NAMES:
        content = (folder / name).read_bytes()
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG") and len(content) > 10_000
        elif name.endswith(".svg"):
            assert ElementTree.fromstring(content).tag.endswith("svg")


def test_main_picture_shows_means_band_diagonal_and_training_rewards(record: SweepRecord) -> None:
    upper, lower = _pictures(record)["steerability"].axes
    lines = {str(line.get_label()): line for line in upper.lines}
    mean = lines["mean achieved"]
    assert np.asarray(mean.get_xdata()).tolist() == [-3.0, 0.5, 2.5, 5.0, 9.5, 13.0]
    assert np.asarray(mean.get_ydata()).tolist() == [one.achieved.mean for one in record.result.targets]
    diagonal = lines["achieved = asked for"]
    assert np.asarray(diagonal.get_xdata()).tolist() == np.asarray(diagonal.get_ydata()).tolist()
    assert np.asarray(lines["beyond the training range"].get_xdata()).tolist() == [-3.0, 13.0]
    band = np.asarray(upper.collections[0].get_paths()[0].vertices)
    for one in record.result.targets:
        ends = band[np.isclose(band[:, 0], one.target), 1]
        assert {one.achieved.low, one.achieved.high} <= set(ends.tolist())
    bars = [patch for patch in lower.patches if hasattr(patch, "get_height") and patch.get_height() < 100]
    assert sum(bar.get_height() for bar in bars[:25]) == pytest.approx(100)
    assert lower.get_xlim() == upper.get_xlim()


def test_correlation_picture_shows_r_with_its_interval_and_the_line_of_least_squares(record: SweepRecord) -> None:
    (axis,) = _pictures(record)["correlation"].axes
    r = np.corrcoef(record.sampled.targets, record.sampled.achieved)[0, 1]
    assert axis.get_title("left").startswith(f"warmth: Pearson r = {r:.2f} [")
    (fitted,) = [line for line in axis.lines if str(line.get_label()).startswith("least squares")]
    (x0, x1), (y0, y1) = np.asarray(fitted.get_xdata()), np.asarray(fitted.get_ydata())
    x, y = record.sampled.targets, record.sampled.achieved
    slope = sum((x - x.mean()) * (y - y.mean())) / sum((x - x.mean()) ** 2)
    assert (y1 - y0) / (x1 - x0) == pytest.approx(slope)


def test_distribution_pictures_share_an_axis(record: SweepRecord) -> None:
    pictures = _pictures(record)
    high, low = (pictures[f"{which}_reward_dist"].axes[0] for which in ("high", "low"))
    assert high.get_title("left") == "warmth at the highest target"
    labels = [text.get_text() for text in high.get_legend().get_texts()]  # type: ignore[union-attr]
    assert "target 9.5" in labels and "achieved, n = 12" in labels
    assert [patch.get_x() for patch in high.patches] == [patch.get_x() for patch in low.patches]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("changes", [{"prompts": 1}, {"moved": 0.0}, {"name": "a $\\frac$ b"}, {"kl": math.nan}])
def test_unusual_sweeps_can_be_drawn(changes: dict[str, Any], tmp_path: Path) -> None:
    assert len(write_sweep(tmp_path, make_record(**changes))) == len(NAMES)


@pytest.mark.usefixtures("small")
def test_constant_rewards_can_be_drawn(tmp_path: Path, record: SweepRecord) -> None:
    samples = replace(record.samples, achieved=np.full(len(record.samples), 2.0))
    sampled = replace(record.sampled, achieved=np.full(12, 2.0))
    result = steerability(samples, record.training, resamples=100)
    write_sweep(tmp_path, replace(record, samples=samples, sampled=sampled, result=result))
    (axis,) = _pictures(replace(record, sampled=sampled))["correlation"].axes
    assert "undefined" in axis.get_title("left")


def test_equal_sweeps_give_equal_files(folder: Path, tmp_path: Path) -> None:
    write_sweep(tmp_path, make_record())
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.usefixtures("undrawn")
def test_writing_again_replaces_and_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_sweep(tmp_path, make_record())
    before = (tmp_path / "steerability.csv").read_bytes()
    write_sweep(tmp_path, make_record(moved=0.1))
    assert (tmp_path / "steerability.csv").read_bytes() != before
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_described_leaves_older_files_as_they_were(tmp_path: Path, record: SweepRecord) -> None:
    write_sweep(tmp_path, record)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    unscored = replace(record.sampled, achieved=np.full(12, math.nan))
    with pytest.raises(DataError, match="none of the 12 completions is scored"):
        write_sweep(tmp_path, replace(make_record(moved=0.1), sampled=unscored))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_and_a_folder_that_is_a_file(
    tmp_path: Path, record: SweepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="taken"):
        write_sweep(tmp_path / "taken", record)
    monkeypatch.setattr("tropism.storage.shutil.disk_usage", lambda path: _Usage())
    with pytest.raises(StorageError, match="Free space"):
        write_sweep(tmp_path / "full", record)
    assert list((tmp_path / "full").iterdir()) == []


class _Usage:
    """A disk with a hundred bytes left."""

    total, free = 10_000, 100
