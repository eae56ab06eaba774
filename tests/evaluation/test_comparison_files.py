from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tropism.evaluation.comparison_files import BEST, PAIR, ComparisonRecord, _calibration_picture, write_comparisons
from tropism.evaluation.comparison_numbers import measure
from tropism.evaluation.comparison_table import ScoredComparison
from tropism.evaluation.comparison_verdict import best_rule, counts_text, number_rows, verdict


def made(noise: float, *, count: int = 200, size: int = 4, strength: float = 1.0, seed: int = 0) -> Any:
    """Choices by a hidden quality, and scores that are the quality with noise; lengths say nothing."""
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(count):
        quality = rng.normal(0, 1.5, size)
        items.append(
            ScoredComparison(
                prompt='say "it", and\nwell',
                completions=tuple("x" * int(length) for length in rng.integers(5, 50, size)),
                scores=tuple(strength * (quality + rng.normal(0, noise, size))),
                choice=int((quality + rng.gumbel(size=size)).argmax()),
                ratings=tuple(quality),
            )
        )
    return items


def record_of(items: list[ScoredComparison], kind: Any = "choice") -> ComparisonRecord:
    return ComparisonRecord(name="judge $x_1$", result=measure(items, kind, resamples=400), items=items)


@pytest.fixture(scope="module")
def record() -> ComparisonRecord:
    return record_of(made(0.3))


def test_the_files(tmp_path: Path, record: ComparisonRecord) -> None:
    written = write_comparisons(tmp_path / "in" / "choices", record)
    names = ["items.csv", "calibration.csv", "calibration.png", "statistics.json"]
    assert [path.name for path in written] == names == [path.name for path in written if path.stat().st_size]
    statistics = json.loads((tmp_path / "in" / "choices" / "statistics.json").read_text())
    accuracy = record.result.numbers["accuracy"]
    assert statistics["numbers"]["accuracy"] == {"value": accuracy.mean, "low": accuracy.low, "high": accuracy.high}
    assert statistics["verdict"] == verdict(record.result) and statistics["items"] == 200
    bins = statistics["pair_curve"]["bins"]
    assert sum(one["count"] for one in bins) == 600 and bins[0]["low"] == 0.5 and bins[-1]["high"] == 1.0
    with (tmp_path / "in" / "choices" / "calibration.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["predicting"] for row in rows] == [PAIR] * 10 + [BEST] * 10
    assert sum(int(row["count"]) for row in rows) == 600 + 200
    with (tmp_path / "in" / "choices" / "items.csv").open(newline="") as file:
        texts = list(csv.DictReader(file))
    first = record.items[0]
    assert len(texts) == 800 and [row["completion"] for row in texts[:4]] == list(first.completions)
    assert texts[0]["prompt"] == first.prompt and [float(row["score"]) for row in texts[:4]] == list(first.scores)
    assert [row["chosen"] for row in texts[:4]] == [str(int(place == first.choice)) for place in range(4)]
    assert (tmp_path / "in" / "choices" / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_the_curves_and_the_diagonal(record: ComparisonRecord) -> None:
    assert record.result.pair_curve is not None and record.result.best_curve is not None
    curves = {PAIR: record.result.pair_curve, BEST: record.result.best_curve}
    figure = _calibration_picture(record.name, curves)
    uppers, lowers = figure.axes[:2], figure.axes[2:]
    for axis, lower, curve in zip(uppers, lowers, curves.values(), strict=True):
        known = [one for one in curve.bins if one.count]
        diagonal, points = axis.lines[0], axis.lines[1]
        assert np.array_equal(diagonal.get_xdata(), diagonal.get_ydata())
        assert np.array_equal(points.get_xdata(), [one.predicted for one in known])
        assert np.array_equal(points.get_ydata(), [one.observed.mean for one in known])
        assert [bar.get_height() for bar in lower.containers[0]] == [one.count for one in curve.bins]


def test_ratings_have_no_calibration(tmp_path: Path) -> None:
    items = [
        ScoredComparison(prompt="", completions=("x" * n,), scores=(float(n),), target=float(n * n)) for n in range(9)
    ]
    written = write_comparisons(tmp_path, record_of(items, "rating"))
    assert [path.name for path in written] == ["items.csv", "statistics.json"]
    statistics = json.loads(written[-1].read_text())
    assert statistics["pair_curve"] is None and statistics["best_rule"] is None
    assert statistics["numbers"]["label_variance"]["low"] is None


def said(items: list[ScoredComparison], kind: Any = "choice") -> str:
    return "\n".join(verdict(measure(items, kind, resamples=400)))


def test_the_verdict_in_plain_words() -> None:
    good = said(made(0.0))
    assert (
        "better than every rule" in good
        and "about as sure as it should be" in good
        and "close enough to be used" in good
    )
    assert "not shown to be better" in said(made(30.0, strength=0.01))
    # Seven of twelve are right, six by the best rule.
    few = [
        ScoredComparison(prompt="", completions=("a", "bb"), scores=(1.0, 0.0) if n < 7 else (0.0, 1.0), choice=n % 2)
        for n in (0, 2, 4, 6, 8, 10, 7, 9, 11, 1, 3, 5)
    ]
    result = measure(few, "choice", resamples=400)
    assert result.numbers["accuracy"].mean == 7 / 12 and result.leads["accuracy_longest"].mean > 0
    assert "not shown to be better" in said(few) and "may be chance" in said(few)
    assert "too sure of itself" in said(made(1.0, strength=5.0))
    assert "are no probabilities" in said(made(1.0, strength=5.0))
    assert "less sure than it could be" in said(made(0.0, strength=0.2))
    assert "worse than a rule" in said(made(0.0, strength=-1.0))
    assert "only 20 of them" in said(made(0.0, count=20)) and "too few predictions" in said(made(0.0, count=20, size=2))
    assert "orders 100.0% rightly" in good


def test_the_verdict_on_numbers_and_ties() -> None:
    def rated(scores: list[float]) -> list[ScoredComparison]:
        return [
            ScoredComparison(prompt="", completions=("x" * n,), scores=(score,), target=float(n))
            for n, score in enumerate(scores, start=1)
        ]

    assert "explains 100%" in said(rated([float(n) for n in range(1, 60)]), "rating")
    assert "no better than the mere lengths" in said(rated([float(n) for n in range(1, 60)]), "rating")
    assert "no smaller than that of always giving the mean" in said(rated([99.0 - n for n in range(1, 60)]), "rating")
    tie = ScoredComparison(prompt="", completions=("a", "b"), scores=(1.0, 0.0))
    assert "Every held-out label is a tie" in said([tie] * 3)


def test_the_best_rule_and_the_rows(record: ComparisonRecord) -> None:
    rule = best_rule(record.result)
    assert rule is not None
    rules = ("accuracy_longest", "accuracy_shortest", "accuracy_first", "accuracy_majority", "accuracy_chance")
    assert rule.accuracy.mean == max(record.result.numbers[name].mean for name in rules)
    labels = [label for label, _ in number_rows(record.result)]
    assert labels[:2] == ["loss", "accuracy"] and "  always the longest" in labels
    assert len(labels) == len(record.result.numbers) - 1  # the number of pairs is in the line of counts
    assert counts_text(record.result).startswith("200 held-out comparisons, ")
    assert "pairs whose ratings differ by 0.5 or more" in counts_text(record.result)
    assert all(math.isfinite(value.mean) for _, value in number_rows(record.result))
