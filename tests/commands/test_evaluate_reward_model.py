"""tropism evaluate RUN of a reward model, on a tiny run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tiny_models import tiny_model, tiny_tokenizer
from tropism.build import run_recipe
from tropism.cli import main
from tropism.config import Recipe
from tropism.safe_yaml import read_yaml, write_yaml

Captured = pytest.CaptureFixture[str]
RECORDS = [
    {"prompt": f"film {'abcdef'[n % 6]} was ", "completions": ["bad", "so good"], "choice": int(n % 3 > 0)}
    for n in range(24)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates with a third of its prompts held out."""
    folder = tmp_path_factory.mktemp("judged")
    tiny_model("llama", seed=3).save_pretrained(folder / "plain")
    tiny_tokenizer().save_pretrained(folder / "plain")
    (folder / "choices.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    recipe = {
        "model": str(folder / "plain"),
        "algorithm": "reward-model",
        "data": {"path": str(folder / "choices.jsonl"), "eval_fraction": 0.34},
        "run": str(folder / "run"),
        "total_steps": 2,
        "prompts_per_step": 4,
        "trainer": {"learning_rate": 1e-2, "progress": False},
    }
    run_recipe(Recipe.from_mapping(recipe))
    return folder / "run"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropism.evaluation.comparison_files.rendered", lambda figure, kind: kind.encode())


def items_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "items.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def plain_score(folder: Path, text: str) -> float:
    """By transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids).logits) + float(model.config.tropism_reward_offset)


@pytest.mark.usefixtures("undrawn")
def test_a_run_is_measured_on_what_it_held_out(run: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are those of the exported model, numbers those of the run's last evaluation."""
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    assert "8 held-out comparisons" in out and "always the longest" in out and "written: 4 files" in out
    assert "only 8 of them" in out
    names = {"items.csv", "calibration.csv", "calibration.png", "statistics.json"}
    assert {path.name for path in (run / "choices").iterdir()} == names
    rows = items_in(run / "choices")
    assert len(rows) == 16 and {row["prompt"] for row in rows} < {record["prompt"] for record in RECORDS}
    for row in rows[:3]:
        alone = plain_score(run / "model", row["prompt"] + row["completion"])
        assert float(row["score"]) == pytest.approx(alone, abs=1e-5)
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["kind"] == "evaluation"
    numbers = json.loads((run / "choices" / "statistics.json").read_text())["numbers"]
    found = {f"eval/{name}": value["value"] for name, value in numbers.items()}
    assert found == {name: pytest.approx(value, abs=1e-5) for name, value in last.items() if name.startswith("eval/")}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("part", ["", "model"])
def test_other_judgements(run: Path, part: str, tmp_path: Path) -> None:
    """Of a run or of its model folder; what the run held out has no part in it."""
    ratings = [{"prompt": "p", "completion": text, "rating": len(text)} for text in ("a", "bc", "def", "gh")]
    (tmp_path / "ratings.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ratings))
    command = ["evaluate", str(run / part), "--data", str(tmp_path / "ratings.jsonl"), "--n", "3"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"items.csv", "statistics.json"}
    assert [row["completion"] for row in items_in(tmp_path / "out")] == ["a", "bc", "def"]
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert statistics["kind"] == "rating" and statistics["numbers"]["label_mean"]["value"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "vader"], "leave out --reward"),
        (["--steerability"], "leave out --steerability"),
        (["--targets", "1", "2"], "leave out --targets"),
        (["--out", "here.parquet"], "name a folder"),
        (["--data", "not-there.jsonl"], "not-there.jsonl"),
    ],
)
def test_options_that_mean_nothing(run: Path, words: list[str], message: str, capsys: Captured) -> None:
    assert main(["evaluate", str(run), *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_folder_needs_judgements(run: Path, capsys: Captured) -> None:
    assert main(["evaluate", str(run / "model")]) == 2
    assert "--data must name judgements" in " ".join(capsys.readouterr().err.split())


def changed(run: Path, folder: Path, **fields: Any) -> Path:
    """The run with another recipe."""
    folder.mkdir()
    (folder / "model").symlink_to(run / "model")
    (folder / "recipe.yaml").write_text(write_yaml({**read_yaml(run / "recipe.yaml"), **fields}))
    return folder


def test_a_run_that_held_out_nothing_or_has_not_finished(run: Path, tmp_path: Path, capsys: Captured) -> None:
    data = str(run.parent / "choices.jsonl")
    nothing = changed(run, tmp_path / "nothing", data={"path": data})
    assert main(["evaluate", str(nothing)]) == 2
    assert "held out no judgements; give some: --data FILE" in " ".join(capsys.readouterr().err.split())
    (nothing / "model").unlink()
    assert main(["evaluate", str(nothing), "--data", data]) == 2
    assert "has no model yet" in capsys.readouterr().err


def test_a_normalised_model_is_measured_on_the_scale_of_its_training(tmp_path: Path, undrawn: None) -> None:
    """Ratings of 1 to 5 cannot be compared with scores of mean 0 and deviation 1."""
    tiny_model("llama", seed=3).save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    rated = [
        {"prompt": f"film {'abcdef'[n % 6]} was ", "completion": ["bad", "so good"][n % 2], "rating": 1 + 4 * (n % 2)}
        for n in range(24)
    ]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rated))
    recipe = {
        "model": str(tmp_path / "plain"),
        "algorithm": "reward-model",
        "data": {"path": str(tmp_path / "rated.jsonl"), "eval_fraction": 0.34},
        "normalise": {"samples": 16},
        "sampling": {"max_new_tokens": 6},
        "run": str(tmp_path / "run"),
        "total_steps": 4,
        "prompts_per_step": 4,
        "trainer": {"learning_rate": 1e-2, "progress": False},
    }
    result = run_recipe(Recipe.from_mapping(recipe))
    main(["evaluate", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    numbers = json.loads((tmp_path / "out" / "statistics.json").read_text())["numbers"]
    assert numbers["loss"]["value"] == pytest.approx(result.metrics["eval/loss"], rel=1e-3)
    facts = json.loads((tmp_path / "run" / "model" / "reward_model.json").read_text())
    assert facts["trained_gain"] != pytest.approx(facts["gain"], rel=0.01)


def test_the_choices_of_a_runs_model_folder_are_written_beside_it(run: Path, undrawn: None) -> None:
    before = sorted(path.name for path in (run / "model").iterdir())
    main(["evaluate", str(run / "model"), "--data", str(run.parent / "choices.jsonl")])
    assert sorted(path.name for path in (run / "model").iterdir()) == before
    assert (run / "choices" / "statistics.json").is_file()
