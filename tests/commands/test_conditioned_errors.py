"""What a user sees when reward-conditioned training or asking cannot work: one message, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_model, tiny_tokenizer
from tropism.cli import main

Captured = pytest.CaptureFixture[str]

RECORDS: list[dict[str, Any]] = [
    {"prompt": "acat", "completion": "sat", "reward": 0.1, "length": 3},
    {"prompt": "thedog", "completion": "ran.", "reward": 0.9, "length": 4},
    {"prompt": "oh", "completion": "no!", "reward": 0.4, "length": 3},
]

TRAIN = ["train", "--model", "model", "--algorithm.name", "conditioned", "--total_steps", "1", "--prompts_per_step"]
TRAIN += ["2", "--sampling.max_new_tokens", "3", "--trainer.progress", "false", "--data", "scored.jsonl"]
OWN = ["--algorithm.samples_per_prompt", "2", "--data", "prompts.txt"]
LENGTH = ["--reward.use", "length", "--reward.args.goal", "maximise"]


def lines(records: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model, scored data of every kind of wrongness, and two conditioned runs."""
    folder = tmp_path_factory.mktemp("world")
    tiny_model("gpt2").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("acat\nthedog\n")
    (folder / "long.txt").write_text("a" * 61 + "\n")
    (folder / "scored.jsonl").write_text(lines(RECORDS))
    wrong = {"null": None, "text": "high", "nan": float("nan"), "huge": 1e300, "list": [1], "true": True}
    for name, value in wrong.items():
        (folder / f"{name}.jsonl").write_text(lines([RECORDS[0], {**RECORDS[1], "reward": value}]))
    (folder / "equal.jsonl").write_text(lines([{**record, "reward": 0.5} for record in RECORDS]))
    (folder / "missing.jsonl").write_text(lines([{"prompt": "a", "completion": "b"}] * 2))
    (folder / "filled.jsonl").write_text(lines([{**record, "prompt": "a" * 64} for record in RECORDS]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*TRAIN, "--run", "one"]) == 0
        assert main([*TRAIN, "--algorithm.targets", '["reward", "length"]', "--run", "two"]) == 0
        assert main(["train", "--model", "model", "--algorithm.name", "sft", *TRAIN[5:], "--run", "plain"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _there(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "200")


def told(arguments: list[str], world: Path, capsys: Captured) -> str:
    """The one message of a command that fails, and leaves the folder as it was."""
    there = sorted(world.rglob("*"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error and "--debug" not in error
    assert sorted(world.rglob("*")) == there
    return error


WRONG: dict[str, tuple[list[str], str]] = {
    # rewards
    "missing": (["--data", "missing.jsonl"], "there is no column 'reward' with a reward"),
    "null": (["--data", "null.jsonl"], "the column 'reward' is null"),
    "text": (["--data", "text.jsonl"], "holds the text 'high'"),
    "nan": (["--data", "nan.jsonl"], "NaN"),
    "huge": (["--data", "huge.jsonl"], "too large for a reward"),
    "list": (["--data", "list.jsonl"], "not a number"),
    "true": (["--data", "true.jsonl"], "not a number"),
    "equal": (["--data", "equal.jsonl"], "all 3 rewards of 'reward' are 0.5, so there is nothing to ask for"),
    # the context
    "filled": (["--data", "filled.jsonl"], "fill max_length (63) alone"),
    "no room": (["--algorithm.max_length", "3", "--algorithm.targets", '["reward", "length"]'], "no room for text"),
    "long prompt": ([*OWN, *LENGTH, "--data", "long.txt"], "has 61 tokens, but at most 60 fit"),
    "long answers": ([*OWN, *LENGTH, "--sampling.max_new_tokens", "63"], "1 for what asks for the rewards leaves no"),
    # settings
    "mechanism": (["--algorithm.mechanism", "liner"], "mechanism"),
    "scaler": (["--algorithm.scaler", "z"], "scaler"),
    "twice": (["--algorithm.targets", '["reward", "reward"]'], "names a reward twice"),
    "a target of the data": (["--algorithm.targets", '["lenght"]'], "did you mean 'length'"),
    "a target of the reward": ([*OWN, *LENGTH, "--algorithm.targets", '["mood"]'], "'mood', which is no term of the"),
    "no reward": (OWN, "needs a reward"),
    "eval target": ([*OWN, *LENGTH, "--algorithm.eval_target.mood", "1"], "algorithm.eval_target: the model knows no"),
    # the model
    "layernorm": (["--algorithm.mechanism", "add", "--algorithm.direction", "ones"], "removed by LayerNorm"),
    "another mechanism": (["--model", "one/model", "--algorithm.mechanism", "token"], "mechanism 'linear'"),
    "more rewards": (["--model", "one/model", "--algorithm.targets", '["reward", "length"]'], "trained with targets"),
    "another method": (["--model", "one/model", "--algorithm.name", "sft"], "sft would train it without"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_training_is_refused_before_it_starts(kind: str, world: Path, capsys: Captured) -> None:
    changes, message = WRONG[kind]
    base = list(TRAIN)
    for option, value in zip(changes[::2], changes[1::2], strict=True):  # the last word counts, once
        if option in base:
            base[base.index(option) + 1] = value
        else:
            base += [option, value]
    assert message in told([*base, "--run", "refused"], world, capsys)


ASKED: list[tuple[list[str], str]] = [
    (["one", "acat", "--target-reward", "high"], "give a number, or NAME=NUMBER"),
    (["one", "acat", "--target-reward", "nan"], "give a number"),
    (["one", "acat", "--target-reward", "rewards=1"], "did you mean 'reward'?"),
    (["two", "acat", "--target-reward", "1"], "knows 2 rewards; say which one 1.0 is of: {'reward': 1.0}"),
    (["two", "acat", "--target-reward", "lenght=1"], "did you mean 'length'?"),
    (["plain", "acat", "--target-reward", "1"], "was not trained to be asked for a reward"),
    (["plain", "acat", "--guidance", "1"], "was not trained to be asked for a reward"),
    (["one", "acat", "--guidance", "1"], "guidance pushes towards"),
    (["one", "acat", "--target-reward", "1", "--guidance", "-1"], "guidance is -1.0"),
    (["one", "a" * 60, "--target-reward", "1", "--max-new-tokens", "5"], "has 60 tokens, but at most 58 fit"),
    (["one", "a", "--target-reward", "1", "--max-new-tokens", "63"], "leave no room for a prompt"),
]


@pytest.mark.parametrize(("arguments", "message"), ASKED, ids=lambda value: " ".join(value)[-40:])
def test_what_cannot_be_asked_for(arguments: list[str], message: str, world: Path, capsys: Captured) -> None:
    assert message in told(["generate", *arguments], world, capsys)


def test_a_target_outside_of_the_training_rewards_is_warned_of_once(capsys: Captured) -> None:
    asked = ["--n", "3", "--max-new-tokens", "2"]
    assert main(["generate", "one", "acat", "oh", "--target-reward", "2", *asked]) == 0
    error = capsys.readouterr().err
    assert error.count("lies outside of the rewards seen in training, 0.1 to 0.9") == 1
    assert main(["generate", "one", "acat", "oh", "--target-reward", "0.5", *asked]) == 0
    assert "outside" not in capsys.readouterr().err
