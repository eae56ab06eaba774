from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch import Tensor

from tropism.errors import DataError, NumericsError
from tropism.evaluation.comparison_table import ScoredComparison, comparisons_in, is_comparison_table, table_of
from tropism.evaluation.comparisons import ComparisonEvaluation
from tropism.evaluation.run_folder import RunData
from tropism.evaluation.summary import summarise
from tropism.judgements import Comparison
from tropism.training.run_folder import RunFolder


class Scorer:
    """The sum of a row's ids is its score; counts its calls."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[int, ...]]] = []

    def __call__(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self.asked.append([tuple(row) for row in rows])
        return torch.tensor([float(sum(row)) for row in rows])


def comparison(*ids: tuple[int, ...], **fields: Any) -> Comparison:
    return Comparison(ids=ids, prompt="p", completions=tuple("a" * len(row) for row in ids), **fields)


CHOICES = [
    comparison((1, 2), (3,), (1, 1, 2), choice=2, ratings=(0.0, 1.0, 2.0)),
    comparison((5,), (2, 2), choice=1),
    comparison((1,), (1, 1), choice=None),
]


def test_one_pass_of_scores_over_all_texts() -> None:
    score = Scorer()
    evaluation = ComparisonEvaluation(CHOICES, kind="choice", score=score)
    metrics, table = evaluation(3)
    assert len(evaluation) == 3
    assert score.asked == [[(1, 2), (3,), (1, 1, 2), (5,), (2, 2), (1,), (1, 1)]]
    assert table["scores"] == [[3, 3, 4], [5, 4], [1, 2]]
    assert table["choice"] == [2, 1, None] and table["predicted"] == [2, 0, 1]
    assert table["probability"][1] == pytest.approx(1 / (1 + math.e)) and table["probability"][2] is None
    assert table["characters"] == [[2, 1, 3], [1, 2], [1, 2]]
    assert metrics["eval/accuracy"] == 1 / 2
    assert metrics["eval/pair_accuracy"] == pytest.approx((2 + 0.5) / 3)
    assert all(math.isfinite(value) for value in metrics.values())


def test_every_metric_is_in_the_glossary() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    known = set(re.findall(r"^\| `([^`]+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE))
    ratings = [comparison((n,), target=float(n % 3)) for n in range(5)]
    differences = [comparison((n,), (1, n), target=float(n % 3) - 1) for n in range(5)]
    for kind, items in (("choice", CHOICES), ("rating", ratings), ("difference", differences)):
        metrics, _ = ComparisonEvaluation(items, kind=kind, score=Scorer())(0)  # type: ignore[arg-type]
        assert len(metrics) > 4
        assert set(metrics) <= known


def test_a_score_that_is_not_finite_is_an_error() -> None:
    evaluation = ComparisonEvaluation(CHOICES, kind="choice", score=lambda rows: torch.full((len(rows),), math.nan))
    with pytest.raises(NumericsError, match=r"1\. held-out comparison"):
        evaluation(0)


def scored(**fields: Any) -> ScoredComparison:
    whole: dict[str, Any] = {"prompt": "p", "completions": ("a", "b"), "scores": (0.0, 1.0), "choice": 1, **fields}
    return ScoredComparison(**whole)


def test_tables_come_back_from_the_run_folder_as_they_went_in(tmp_path: Path) -> None:
    """Through the writer of runs, Parquet and the reader of reports; texts without lone surrogates."""
    items = [scored(), scored(choice=None, ratings=(1.0, 2.5), weight=0.5), scored(prompt="\ud800x\U0001f600")]
    folder = RunFolder(tmp_path / "run", resume=False)
    folder.create()
    folder.write_evaluation(0, table_of(items, "choice"))
    folder.write_evaluation(20, table_of([scored(choice=None, target=2.0)], "difference"))
    folder.release()
    data = RunData.read(tmp_path / "run")
    assert data.evaluations == [] and data.skipped == []
    assert [(one.step, one.kind) for one in data.comparisons] == [(0, "choice"), (20, "difference")]
    assert data.comparisons[0].items == [*items[:2], scored(prompt="\ufffdx\U0001f600")]
    assert data.comparisons[1].items[0].target == 2.0


def test_tables_of_completions_are_told_apart() -> None:
    assert is_comparison_table(table_of([scored()], "choice"))
    assert not is_comparison_table({"prompt": [], "completion": [], "reward": [], "length": []})


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("scores", [0.0], "2 completions and 1 scores"),
        ("scores", [0.0, math.nan], "not finite"),
        ("scores", None, "row 1 is damaged"),
        ("ratings", [1.0], "1 ratings of 2"),
        ("choice", 2, "the choice 2 of 2"),
        ("choice", "x", "row 1 is damaged"),
        ("kind", "guess", "'kind'"),
    ],
)
def test_damaged_tables_are_named(tmp_path: Path, column: str, value: Any, message: str) -> None:
    table = table_of([scored()], "choice")
    table[column] = [value]
    with pytest.raises(DataError, match=message) as error:
        comparisons_in(table, "evaluations/step-0.parquet")
    assert "evaluations/step-0.parquet" in str(error.value)


def test_a_table_without_a_column_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "evaluations"
    folder.mkdir()
    table = table_of([scored()], "choice")
    del table["weight"]
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "step-000000.parquet")
    with pytest.raises(DataError, match="'weight' is missing"):
        RunData.read(tmp_path)


def test_runs_of_reward_models_have_no_summary_of_completions(tmp_path: Path) -> None:
    folder = tmp_path / "evaluations"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table(table_of([scored()], "choice")), folder / "step-000000.parquet")
    with pytest.raises(DataError, match="tropism evaluate"):
        summarise(RunData.read(tmp_path))
