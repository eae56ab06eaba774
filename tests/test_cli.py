"""The command line as a user meets it: help, errors on one screen, exit codes, interruption and resumption."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tropism.cli import main
from tropism.commands import COMMANDS

Train = Callable[..., int]

REWARDS = """
def raises(completions, **kwargs):
    raise KeyError("no such lexicon")

def not_a_number(completions, **kwargs):
    return [float("nan") for _ in completions]

def too_few(completions, **kwargs):
    return [1.0]

def texts(completions, **kwargs):
    return ["good" for _ in completions]

def fine(completions, **kwargs):
    return [float(len(text) % 3) for text in completions]

def interrupts(completions, trainer_state, **kwargs):
    import os, signal
    if trainer_state["step"] == 1 and os.environ.pop("TEST_INTERRUPT", None):
        os.kill(os.getpid(), signal.Signals[os.environ["TEST_SIGNAL"]])
    return fine(completions)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with prompts and reward functions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("Once upon a time\nThe little cat was\nOne day a boy\n")
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


@pytest.fixture
def train(folder: Path, stories: Path) -> Train:
    """``tropism train`` on a recipe of a few seconds; keyword arguments change the recipe."""

    def call(*arguments: str, **changes: object) -> int:
        recipe = {
            "model": str(stories),
            "algorithm": {"name": "grpo", "group_size": 2},
            "data": "prompts.txt",
            "reward": "length",
            "run": "run",
            "total_steps": 1,
            "prompts_per_step": 2,
            "sampling": {"max_new_tokens": 4},
            **changes,
        }
        if recipe["reward"] == "length":
            recipe["reward"] = {"use": "length", "args": {"goal": "maximise"}}
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        return main(["train", "recipe.yaml", *arguments])

    return call


def test_help_is_quick_and_does_not_import_torch() -> None:
    code = "import sys, tropism.cli; tropism.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started < 3  # well under one second on an idle machine
    assert all(name in result.stdout for name in COMMANDS)


def test_an_unknown_command_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: tropism {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["generate", "report"])
def test_an_unknown_option_names_the_closest(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    option, close = {"generate": ("--max-new-token", "--max-new-tokens"), "report": ("--hepl", "--help")}[command]
    assert main([command, "somewhere", "a prompt", option, "3"]) == 2
    captured = capsys.readouterr()
    assert close in captured.err + captured.out


def test_train_help_shows_every_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "--total_steps  whole number  [default 100]",
        "--algorithm.clip_high  number  [default 0.2]",
        "--algorithm.kl.target  number or null",
        "--data.first_words  whole number or null  [default null]",
        "--reward.terms.NAME.weight  number  [default 1]",
        "--sampling.top_p  number  [default 1]",
        "--lora.rank  whole number  [default 16]",
        "--trainer.optimizer.betas  [number, number]  [default [0.9, 0.999]]",
        "--trainer.checkpoints.best_mode  max | min  [default max]",
        "Advantages are divided by the standard deviation of the group's rewards",
    ):
        assert line in shown


def test_train_help_of_a_recipe_shows_its_values_and_its_method_only(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    assert train("--total-steps", "7", "--help") == 0
    shown = capsys.readouterr().out
    assert "--total_steps  whole number  7  [default 100]" in shown
    assert "--algorithm.group_size  whole number  2  [default 8]" in shown
    assert "algorithm: ppo" not in shown


# ---- what is wrong before training -----------------------------------------------------------------------------------


def test_a_dry_run_checks_and_prints_and_leaves_nothing(
    train: Train, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--dry-run", eval_data="prompts.txt") == 0
    shown = capsys.readouterr().out
    assert "kl_estimator: k3" in shown
    assert "prompts: 3\ncompletions per step: 4\ntokens per step: at most 16\nheld out: 3" in shown
    assert "learning rate: " in shown and "trained weights: 260,032 of 260,032" in shown
    assert "KV cache" in shown and "most at any time" in shown
    assert not (folder / "run").exists()


def test_a_dry_run_of_sft(train: Train, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--dry-run", algorithm="sft", reward=None) == 0
    assert "demonstrations: 3\ndemonstrations per step: 2" in capsys.readouterr().out
    assert not (folder / "run").exists()


WRONG_RECORDS = {
    "malformed": ('{"prompt": "a"}\n{"prompt": \n', "data.jsonl:2"),
    "too long": (json.dumps({"prompt": "word " * 600}) + "\n", "at most 508 fit"),
    "no records": ("", "data.jsonl"),
}


@pytest.mark.parametrize("kind", WRONG_RECORDS)
@pytest.mark.parametrize("dry", [True, False])
def test_bad_data_is_an_error_that_leaves_no_run(
    kind: str, dry: bool, train: Train, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, named = WRONG_RECORDS[kind]
    (folder / "data.jsonl").write_text(text)
    assert train(*(["--dry-run"] if dry else []), data="data.jsonl") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and "Traceback" not in error
    assert not (folder / "run").exists()


def test_an_empty_prompt_needs_a_bos(
    train: Train, folder: Path, stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stories, folder / "model")
    for name, key in (("tokenizer.json", "post_processor"), ("tokenizer_config.json", "bos_token")):
        content = json.loads((folder / "model" / name).read_text())
        (folder / "model" / name).write_text(json.dumps({**content, key: None}))
    (folder / "data.jsonl").write_text('{"prompt": "Once"}\n{"prompt": ""}\n')
    assert train(model="model", data="data.jsonl") == 2
    assert "data.jsonl:2: the prompt '' is empty" in capsys.readouterr().err


WRONG_SETTINGS = {
    "missing file": (("--data", "promts.txt"), "did you mean 'prompts.txt'"),
    "unknown key": (("--totl_steps", "3"), "did you mean 'total_steps'"),
    "unknown nested key": (("--trainer.learning_rat", "1e-4"), "did you mean 'learning_rate'"),
    "unknown method": (("--algorithm", "gpro"), "did you mean 'grpo'"),
    "unknown preset": (("--algorithm.preset", "dr_gpro"), "dr_grpo"),
    "unknown reward": (("--reward", "vadr"), "'vader'"),
    "wrong type": (("--total_steps", "many"), "total_steps: expected a whole number, got the text 'many'"),
    "text in braces": (("--data.template", "{prompt}"), "expected text, got a mapping; put it in quotes"),
    "no value": (("--total_steps",), "needs a value"),
    "missing model": (("--model", "/nowhere/model"), "/nowhere/model"),
    "no room": (("--sampling.max_new_tokens", "600"), "leaves no room"),
    "two recipes": (("other.yaml",), "expected one recipe, got 2"),
    "code refused": (("--reward", "rewards.py:fine"), "--allow-code"),
    "reward raises": (("--reward", "rewards.py:raises", "--allow-code"), "no such lexicon"),
    "reward is NaN": (("--reward", "rewards.py:not_a_number", "--allow-code"), "returned NaN"),
    "reward of wrong length": (("--reward", "rewards.py:too_few", "--allow-code"), "for 2 completions"),
    "reward of texts": (("--reward", "rewards.py:texts", "--allow-code"), "'good'"),
    "no such function": (("--reward", "rewards.py:fin", "--allow-code"), "'fine'"),
}


@pytest.mark.parametrize("kind", WRONG_SETTINGS)
def test_wrong_settings_name_what_is_wrong(
    kind: str, train: Train, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, named = WRONG_SETTINGS[kind]
    assert train(*arguments) == 2
    error = capsys.readouterr().err
    assert "error: " in error and named in error and "Traceback" not in error
    assert not (folder / "run").exists()


def test_an_existing_run_is_never_overwritten(train: Train, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "notes.txt").write_text("mine")
    for arguments in ((), ("--dry-run",)):
        assert train(*arguments) == 2
        assert "already holds a run" in capsys.readouterr().err
    assert [path.name for path in (folder / "run").iterdir()] == ["notes.txt"]


def test_debug_shows_the_traceback(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--debug", "--data", "nowhere.txt") == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_unexpected_exception_is_short(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("tropism.build.policy_of", broken)
    assert train() == 1
    error = capsys.readouterr().err
    assert error == "error: RuntimeError: out of memory; run it again with --debug for the traceback\n"


# ---- training --------------------------------------------------------------------------------------------------------


def test_overrides_keep_the_rest_of_a_section(train: Train, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--dry-run", "--algorithm.kl-coef=0.3", "--data.limit", "2", algorithm="grpo") == 0
    shown = capsys.readouterr().out
    assert "name: grpo" in shown and "kl_coef: 0.3" in shown and "prompts: 2\n" in shown


def test_a_word_for_a_section_keeps_the_keys_below_it(
    train: Train, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "other.txt").write_text("one more\nand another\nand one\n")
    assert train("--dry-run", "--data", "other.txt", "--data.limit", "2", algorithm="grpo") == 0
    shown = capsys.readouterr().out
    assert "path: other.txt" in shown and "prompts: 2\n" in shown


def test_train_then_generate_then_report(train: Train, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--reward", "rewards.py:fine", "--allow-code") == 0
    assert "tropism generate run" in capsys.readouterr().out
    assert main(["generate", "run", "Once upon a time", "--n", "2", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time\n")
    (folder / "run" / "report.html").unlink()
    assert main(["report", "run"]) == 0
    assert (folder / "run" / "report.html").is_file()


@pytest.mark.parametrize(("signal", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_run_says_how_to_go_on_and_does(
    signal: str,
    code: int,
    train: Train,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEST_INTERRUPT", "yes")
    monkeypatch.setenv("TEST_SIGNAL", signal)
    assert train("--reward", "rewards.py:interrupts", "--allow-code", "--total_steps", "3") == code
    error = capsys.readouterr().err
    assert "tropism train --resume run" in error and "Traceback" not in error
    assert not (folder / "run" / "model").exists()
    assert main(["train", "--resume", "run", "--allow-code"]) == 0
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "update"] == [1, 2, 3]
    assert (folder / "run" / "model" / "config.json").is_file()


def test_a_profile(train: Train, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--profile") == 2
    assert "raise total_steps, or leave --profile out" in capsys.readouterr().err and not (folder / "run").exists()
    assert train("--profile", "--dry-run", "--total_steps", "2") == 0
    assert train("--profile", "--total_steps", "2") == 0
    assert "Where step 2 went" in capsys.readouterr().err
    assert (folder / "run" / "profile" / "table.txt").is_file()
    assert (folder / "run" / "profile" / "trace.json.gz").is_file()


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error without the warnings about what was sampled."""
    lines = capsys.readouterr().err.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("warning (step"))


def test_resume_says_what_is_resumed_and_what_differs(
    train: Train, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(total_steps=2, trainer={"checkpoints": {"every": 1}}) == 0
    said(capsys)
    assert main(["train", "--resume", "run"]) == 0
    assert (
        said(capsys) == "run is finished after step 2 of 2: nothing is left to do. Raise total_steps to go on with it\n"
    )
    assert main(["train", "--resume", "run", "--total_steps", "3"]) == 0
    assert said(capsys) == "resuming run after step 2 of 3 (2 updates)\nchanged: total_steps: 2 -> 3\n"
    newest = max((folder / "run" / "checkpoints").iterdir())
    (newest / "policy.safetensors").unlink()
    assert main(["train", "--resume", "run"]) == 0
    told = said(capsys)
    assert (
        told.startswith("warning: skipped: ") and f"{newest.name} cannot be used: policy.safetensors is missing" in told
    )
    assert told.endswith("resuming run after step 2 of 3 (2 updates)\n")


def test_resume_refuses_another_recipe(train: Train, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    before = (folder / "run" / "recipe.yaml").read_bytes()
    said(capsys)
    wrong = ["--total_steps", "2", "--seed", "3", "--algorithm.kl-coef", "0.5"]
    for dry in ([], ["--dry-run"]):
        assert main(["train", "--resume", "run", *wrong, *dry]) == 2
        told = said(capsys)
        assert told.startswith(
            "error: run cannot go on with another recipe:\n  algorithm.kl_coef: 0.05 -> 0.5\n  seed: 0 -> 3\n"
        )
        assert "total_steps" not in told and "model: run/model" in told
    assert (folder / "run" / "recipe.yaml").read_bytes() == before
    (folder / "prompts.txt").write_text("Once upon a time\nThe little dog was\nOne day a boy\n")
    assert main(["train", "--resume", "run", "--total_steps", "2"]) == 2
    assert said(capsys).startswith("error: the data is not that of the run")


def test_a_dry_run_of_a_resumption(train: Train, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    before = sorted(path.stat().st_mtime_ns for path in (folder / "run").rglob("*"))
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("run is finished after step 1 of 1") and "nothing is left to do." in shown
    assert main(["train", "--resume", "run", "--dry-run", "--total_steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("resuming run after step 1 of 2") and "ready to train" in shown
    assert sorted(path.stat().st_mtime_ns for path in (folder / "run").rglob("*")) == before


def test_resume_without_a_checkpoint(train: Train, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    shutil.rmtree(folder / "run" / "checkpoints")
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--total_steps", "2"]) == 2
    assert "holds no complete checkpoint to resume from" in said(capsys)


def test_a_damaged_recipe_cannot_be_resumed(train: Train, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    path = folder / "run" / "recipe.yaml"
    whole = path.read_text()
    for text in (whole[: whole.index("sampling:")], whole[: whole.index("lora:") + 3]):
        path.write_text(text)
        capsys.readouterr()
        assert main(["train", "--resume", "run", "--total_steps", "2"]) == 2
        assert "run/recipe.yaml" in said(capsys)


def test_resume_errors(train: Train, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    assert main(["train", "--resume", "empty"]) == 2
    assert "holds no recipe.yaml" in capsys.readouterr().err
    assert main(["train", "empty"]) == 2
    assert "--resume empty" in capsys.readouterr().err
    (folder / "empty" / "recipe.yaml").write_text("model: demo\nalgorithm: sft\ndata: <list of 3 given from Python>\n")
    assert main(["train", "--resume", "empty"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data: ") and "resume=True" in error
    assert train("--resume", run=None) == 2
    assert "--resume RUN_FOLDER" in capsys.readouterr().err
