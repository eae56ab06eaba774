"""tropism evaluate --sampling: one table with a column for every value of a field."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tropism.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step whose recipe has a metric and another way to sample."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    data = tmp_path_factory.mktemp("data") / "prompts.txt"
    data.write_text("One day a cat\nThe big dog was\nOnce upon a time\nA girl\n")
    arguments = ["--model", str(stories), "--algorithm", "grpo", "--data", str(data), "--eval_data", str(data)]
    arguments += ["--reward", "repetition", "--metrics.brief.use", "length", "--metrics.brief.args.goal", "minimise"]
    arguments += [
        "--run",
        str(folder),
        "--total_steps",
        "1",
        "--prompts_per_step",
        "2",
        "--sampling.max_new_tokens",
        "4",
    ]
    assert main(["train", *arguments, "--trainer.evaluation.sampling", "[{temperature: 0.3}]"]) == 0
    return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_a_column_for_each_value_beside_the_own_sampling(run: Path, capsys: Captured, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    assert main(["evaluate", str(run), "--sampling", "temperature=0,0.5", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "the same prompts under changed sampling" in shown
    heads = next(line for line in shown.splitlines() if "own sampling" in line)
    assert "temperature=0 " in heads and "temperature=0.5" in heads and "temperature=0.3" not in heads
    for row in ("reward, base", "reward, trained", "metric brief, base", "metric brief, trained"):
        assert row in shown
    columns = pq.read_table(out).to_pydict()
    assert columns["completion@temperature=0"] != columns["completion"]
    assert len(columns["metric/brief@temperature=0.5"]) == 8  # four prompts, by the base and the trained model


def test_the_runs_own_list_holds_where_none_is_given(run: Path, capsys: Captured, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    assert main(["evaluate", str(run), "--out", str(out), "--n", "2"]) == 0
    assert "temperature=0.3" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert len(rows) == 4 and all("reward@temperature=0.3" in row and "metric/brief" in row for row in rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("temperature", "give one field and its values, such as temperature=0.7,1.0"),
        ("temperature=", "give one field and its values"),
        ("temperature=0.5,,1", "give one field and its values"),
        ("temperatur=0.5,1", "trainer.evaluation.sampling[0].temperatur: unknown key; did you mean 'temperature'?"),
        ("temperature=0.5,warm", "trainer.evaluation.sampling[1].temperature: expected a number"),
        ("temperature=0.5,0.50", "temperature=0.5 samples as temperature=0.5 does"),
    ],
)
def test_what_cannot_be_swept_is_refused(given: str, message: str, run: Path, capsys: Captured) -> None:
    assert main(["evaluate", str(run), "--sampling", given]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_it_does_not_go_with_steerability(run: Path, capsys: Captured) -> None:
    assert main(["evaluate", str(run), "--steerability", "--sampling", "temperature=0.5"]) == 2
    assert "--sampling is for completions under the run's reward" in capsys.readouterr().err
