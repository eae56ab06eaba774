from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tropism.errors import DataError
from tropism.evaluation.run_folder import RunData


def test_a_finished_run(run_folder: Path) -> None:
    run = RunData.read(run_folder)
    assert [one.step for one in run.evaluations] == [0, 10, 20, 30]
    first = run.evaluations[0]
    assert len(first) == 24
    assert first.prompts[0] == "Film number 0 was a thing about"
    assert set(first.terms) == {"vader", "brevity"}
    assert np.array_equal(first.terms["vader"], first.rewards)
    assert run.recipe.startswith("algorithm: grpo")
    assert run.warnings == [{"step": 3, "message": "2 of 2 groups have equal rewards."}]
    assert run.environment["device"] == "cpu"
    assert run.best_step is None
    assert run.skipped == []


def test_series_averages_the_updates_of_a_step(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {"kind": "update", "step": 1, "loss/policy": 1.0},
        {"kind": "update", "step": 1, "loss/policy": 2.0},
        {"kind": "update", "step": 2, "loss/policy": math.nan},
        {"kind": "update", "step": 3, "loss/policy": -4},
        {"kind": "evaluation", "step": 3, "loss/policy": 100.0, "eval/reward": 0.5},
        {"kind": "collect", "step": 3, "reward/mean": 7.0, "model/name": "x"},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    run = RunData.read(str(tmp_path))
    steps, values = run.series("loss/policy")
    assert steps.tolist() == [1.0, 3.0]
    assert values.tolist() == [1.5, -4.0]
    assert run.names() == ["loss/policy", "reward/mean"]
    assert run.names(["evaluation"]) == ["eval/reward", "loss/policy"]
    assert run.series("absent")[0].tolist() == []


def test_a_run_in_progress_is_readable(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "update", "step": 1}\n{"kind": "upd')
    run = RunData.read(tmp_path)
    assert run.metrics == [{"kind": "update", "step": 1}]
    assert (run.evaluations, run.recipe, run.warnings, run.environment) == ([], "", [], {})


def test_the_last_best_step_counts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"best/step": 10}\n{"best/step": 20.0}\n{"step": 30}\n')
    assert RunData.read(tmp_path).best_step == 20


def test_nulls_are_unscored(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    texts = {"prompt": ["p"], "completion": [""], "finish_reason": ["eos"]}
    columns = {**texts, "reward": [None], "length": [0], "sequence_kl": [0.0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "evaluations" / "step-000000.parquet")
    assert math.isnan(RunData.read(tmp_path).evaluations[0].rewards[0])


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not valid JSON"):
        RunData.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="line 1: expected a JSON object, got list"):
        RunData.read(tmp_path)


def test_a_cut_off_evaluation_is_skipped_and_said(run_folder: Path) -> None:
    path = run_folder / "evaluations" / "step-000030.parquet"
    path.write_bytes(path.read_bytes()[:200])
    (run_folder / "evaluations" / "step-000030.parquet.tmp").write_bytes(b"")
    run = RunData.read(run_folder)
    assert [one.step for one in run.evaluations] == [0, 10, 20]
    assert len(run.skipped) == 1
    assert "step-000030.parquet" in run.skipped[0]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"]}), tmp_path / "evaluations" / "step-000000.parquet")
    with pytest.raises(DataError, match="column 'completion' is missing"):
        RunData.read(tmp_path)


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        RunData.read(tmp_path / "absent")
    with pytest.raises(DataError, match="is no run folder: it has no recipe"):
        RunData.read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        RunData.read(tmp_path / "file")
