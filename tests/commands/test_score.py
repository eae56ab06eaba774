"""``tropism score``: what is written, going on after a stop, and what is refused before anything is scored."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conditioned_policies import conditioned_policy
from tiny_models import tiny_tokenizer
from tropism.cli import main
from tropism.data.config import DataConfig
from tropism.data.scored import make_scored
from tropism.errors import ConfigError, RewardError, StorageError
from tropism.models.loading import load_model
from tropism.scoring import score

Captured = pytest.CaptureFixture[str]

REWARDS = """
import os, signal
from pathlib import Path

def letters(completions, **kwargs):
    with open("calls.txt", "a") as log:
        log.writelines(text + "\\n" for text in completions)
    if Path("stop").exists() and "eee" in completions:
        if Path("stop").read_text() == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if Path("stop").read_text() == "interrupt":
            raise KeyboardInterrupt
        raise ValueError("told to stop")
    return [float(len(text)) for text in completions]

def short_only(completions):
    return [None if len(text) > 2 else len(text) / 10 for text in completions]
"""

TEXTS = ["a", "bb", "ccc", "dd", "eee", "f", "gg"]
COMMAND = ["score", "data.jsonl", "--reward", "rewards.py:letters", "--allow-code", "--out", "out.jsonl"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with seven texts and reward functions that can be told to stop at the fifth."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write("data.jsonl", [{"id": index, "text": text} for index, text in enumerate(TEXTS)])
    Path("rewards.py").write_text(REWARDS)
    return tmp_path


def write(path: str, records: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


def read(path: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---- what is scored and written --------------------------------------------------------------------------------------


def test_the_folder_of_the_file_is_made() -> None:
    assert main(["score", "data.jsonl", "--reward", "vader", "--out", "new/folder/o.jsonl"]) == 0
    assert Path("new/folder/o.jsonl").is_file()


def test_every_record_keeps_its_columns_and_gets_a_reward(capsys: Captured) -> None:
    assert main([*COMMAND, "--batch-size", "3"]) == 0
    lengths = [1, 2, 3, 2, 3, 1, 2]
    assert read() == [
        {"id": index, "text": text, "reward": length}
        for index, (text, length) in enumerate(zip(TEXTS, lengths, strict=True))
    ]
    shown = capsys.readouterr().out
    assert "written: out.jsonl (7 records)" in shown
    assert "mean 2, standard deviation 0.7559, from 1 to 3" in shown  # 14 / 7, sqrt((1+0+1+0+1+1+0) / 7)
    assert sorted(os.listdir()) == ["calls.txt", "data.jsonl", "out.jsonl", "rewards.py"]


def test_the_total_is_the_plain_weighted_sum_and_each_term_has_a_column() -> None:
    reward = {
        "reward": {
            "terms": {
                "long": {"use": "length", "args": {"goal": "maximise", "unit": "characters"}, "weight": 0.1},
                "c": {"use": "words", "args": {"words": ["ccc"]}, "weight": -2},
                "seen": {"use": "keywords", "args": {"keywords": ["bb"]}, "weight": 0},
            },
            "clip": 0.05,
            "scale": "running",
        }
    }
    Path("reward.yaml").write_text(json.dumps(reward))
    Path("terms.yaml").write_text(json.dumps(reward["reward"]))
    for file in ("reward.yaml", "terms.yaml"):
        command = ["score", "data.jsonl", "--reward-file", file, "--out", "out.jsonl", "--overwrite", "--limit", "3"]
        assert main([*command, "--reward-column", "total"]) == 0
        assert [{name: row[name] for name in ("total", "long", "c", "seen")} for row in read()] == [
            {"total": 0.1, "long": 1, "c": 0, "seen": 0},
            {"total": 0.2, "long": 2, "c": 0, "seen": 1},
            {"total": -1.7, "long": 3, "c": 1, "seen": 0},
        ]


def test_arguments_of_a_reward_on_the_command_line() -> None:
    arguments = ["--reward.args.target", "2", "--reward.args.unit", "characters", "--term-columns"]
    assert main(["score", "data.jsonl", "--out", "out.jsonl", "--reward", "length", *arguments]) == 0
    assert [(row["reward"], row["length"]) for row in read()[:3]] == [(-1, -1), (0, 0), (-1, -1)]


def test_no_opinion_is_null_or_dropped_and_always_told(capsys: Captured) -> None:
    command = [word.replace("letters", "short_only") for word in COMMAND]
    assert main(command) == 0
    assert [row["reward"] for row in read()] == [0.1, 0.2, None, 0.2, None, 0.1, 0.2]
    assert "2 of 7 records have no reward (null), which training refuses; leave them out with --drop-unscored" in (
        capsys.readouterr().err
    )
    assert main([*command, "--overwrite", "--drop-unscored"]) == 0
    assert [row["id"] for row in read()] == [0, 1, 3, 5, 6]
    assert "5 records, 2 without a reward left out" in capsys.readouterr().out
    with pytest.raises(RewardError, match="no opinion on any of the 1 records"):
        score(["a"], lambda completions: [None], out="none.jsonl", drop_unscored=True)


def test_what_is_written_can_be_trained_on() -> None:
    assert main(COMMAND) == 0
    scored = make_scored("out.jsonl", tiny_tokenizer(), targets=("reward",), max_length=None)
    assert [text.rewards for text in scored] == [(1,), (2,), (3,), (2,), (3,), (1,), (2,)]


# ---- token ids -------------------------------------------------------------------------------------------------------


def count_ids(completion_ids: list[list[int]]) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def test_a_reward_that_asks_for_token_ids_needs_a_tokenizer(stories: Path, capsys: Captured) -> None:
    command = ["score", "data.jsonl", "--out", "out.jsonl", "--reward", "length", "--reward.args.goal", "maximise"]
    assert main(command) == 2
    assert "'length' asks for completion_ids, and texts have none without a tokenizer" in capsys.readouterr().err
    assert main([*command, "--tokenizer", str(stories)]) == 0
    texts = make_scored("out.jsonl", load_model(stories).tokenizer, targets=("id",), max_length=None)
    assert [row["reward"] for row in read()] == [len(text.completion_ids) for text in texts]
    with pytest.raises(ConfigError, match="'count_ids' asks for completion_ids"):
        score(["a"], count_ids, out="ids.jsonl")
    assert score(["ab", "abc"], count_ids, out="ids.jsonl", tokenizer=tiny_tokenizer()).rewards == (3, 4)  # and the eos
    assert main([*command[:-2], "--tokenizer", "nowhere/at/all", "--overwrite"]) == 2


# ---- stopped and started again ---------------------------------------------------------------------------------------


def stopped_in_the_third_batch(how: str = "error") -> None:
    Path("stop").write_text(how)
    assert main([*COMMAND, "--batch-size", "2"]) == (130 if how == "interrupt" else 2)
    Path("stop").unlink()
    assert not Path("out.jsonl").exists()
    assert [json.loads(line)["record"] for line in Path("out.jsonl.partial").read_text().splitlines()] == [0, 1, 2, 3]


@pytest.mark.parametrize("tail", [b"", b'{"record": 4, "colum', b'{"record": 4, "columns": {"reward": 3.0}}'])
def test_a_stopped_command_goes_on_after_the_last_whole_line(tail: bytes) -> None:
    assert main([*COMMAND, "--batch-size", "2"]) == 0
    whole = Path("out.jsonl").read_bytes()
    Path("out.jsonl").unlink()
    stopped_in_the_third_batch()
    with Path("out.jsonl.partial").open("ab") as partial:
        partial.write(tail)
    Path("calls.txt").unlink()
    assert main([*COMMAND, "--batch-size", "3"]) == 0
    assert Path("out.jsonl").read_bytes() == whole
    assert Path("calls.txt").read_text().split() == TEXTS[4:]  # nothing is scored twice
    assert not [name for name in os.listdir() if name.startswith("out.jsonl.")]


def test_a_killed_process_leaves_what_it_had_scored() -> None:
    Path("stop").write_text("kill")
    child = os.fork()
    if child == 0:
        main([*COMMAND, "--batch-size", "2"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    Path("stop").unlink()
    assert json.loads(Path("out.jsonl.state.json").read_text())["total"] == 7
    Path("calls.txt").unlink()
    assert main(COMMAND) == 0
    assert [row["reward"] for row in read()] == [1, 2, 3, 2, 3, 1, 2]
    assert Path("calls.txt").read_text().split() == TEXTS[4:]


def test_an_interrupt_says_how_to_go_on(capsys: Captured) -> None:
    stopped_in_the_third_batch("interrupt")
    assert "4 of 7 records are scored and kept; the same command goes on there" in capsys.readouterr().err


def change_data() -> list[str]:
    write("data.jsonl", [{"id": index, "text": text.upper()} for index, text in enumerate(TEXTS)])
    return COMMAND


def change_number_of_records() -> list[str]:
    return [*COMMAND, "--limit", "6"]


def change_code() -> list[str]:
    Path("rewards.py").write_text(REWARDS + "\n# another\n")
    return COMMAND


def change_column() -> list[str]:
    return [*COMMAND, "--reward-column", "other"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_data, "another data"),
        (change_number_of_records, "another number of records, data"),
        (change_code, "another reward"),
        (change_column, "another reward"),
    ],
)
def test_other_data_or_another_reward_does_not_go_on(
    change: Callable[[], list[str]], named: str, capsys: Captured
) -> None:
    stopped_in_the_third_batch()
    before = Path("out.jsonl.partial").read_bytes()
    command = change()
    assert main(command) == 2
    assert f"out.jsonl.partial was begun with {named}" in capsys.readouterr().err
    assert Path("out.jsonl.partial").read_bytes() == before
    assert main([*command, "--overwrite"]) == 0
    assert len(read()) == (6 if "--limit" in command else 7)


def test_a_file_that_is_there_stays_until_a_new_one_is_whole(capsys: Captured) -> None:
    Path("out.jsonl").write_text("mine\n")
    assert main(COMMAND) == 2
    assert "out.jsonl is there already; name another file, or replace it with --overwrite" in capsys.readouterr().err
    Path("stop").write_text("error")
    assert main([*COMMAND, "--overwrite"]) == 2
    assert Path("out.jsonl").read_text() == "mine\n"
    Path("stop").unlink()
    assert main([*COMMAND, "--overwrite"]) == 0
    assert len(read()) == 7


def test_lines_of_two_commands_at_once_are_noticed() -> None:
    stopped_in_the_third_batch()
    lines = Path("out.jsonl.partial").read_text().splitlines(keepends=True)
    Path("out.jsonl.partial").write_text("".join([*lines, lines[-1]]))
    with pytest.raises(StorageError, match="is damaged, or two commands wrote to it at once; delete it"):
        score(DataConfig(path="data.jsonl"), "rewards.py:letters", out="out.jsonl", allow_code=True)


# ---- completions of a model ------------------------------------------------------------------------------------------


def test_the_command_samples_from_a_model(stories: Path) -> None:
    write("prompts.jsonl", [{"question": "Once upon a time", "words": 3}])
    command = ["score", "prompts.jsonl", "--prompt-column", "question", "--reward", "vader", "--out", "out.jsonl"]
    assert main([*command, "--model", str(stories), "--n", "2", "--max-new-tokens", "6", "--temperature", "0"]) == 0
    rows = read()
    assert [(row["prompt"], row["words"]) for row in rows] == [("Once upon a time", 3)] * 2
    assert rows[0]["completion"] == rows[1]["completion"] and rows[0]["completion"].startswith(", there was")
    assert {row["finish_reason"] for row in rows} == {"length"}


# ---- refusals before anything is scored ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "vadr", "--out", "o.jsonl"], "unknown reward 'vadr'. Did you mean 'vader'"),
        (["--out", "o.jsonl"], "say what to score by: --reward NAME, or --reward-file"),
        (["--reward", "vader", "--reward-file", "r.yaml", "--out", "o.jsonl"], "(one of them)"),
        (["--reward-file", "r.yaml", "--out", "o.jsonl"], "r.yaml: cannot be read"),
        (["--reward", "rewards.py:letters", "--out", "o.jsonl"], "If you trust it, allow it: --allow-code"),
        (["--reward", "vader", "--out", "o.txt"], "o.txt: name a .jsonl or .parquet file"),
        (["--reward", "vader", "--out", "data.jsonl/o.jsonl"], "data.jsonl is a file; name a file in a folder"),
        (
            ["--reward", "vader", "--out", "o.jsonl", "--reward-column", "id"],
            "column 'id' cannot be added: the data",
        ),
        (["--reward", "vader", "--out", "o.jsonl", "--term-columns", "--reward-column", "vader"], "two new columns"),
        (["--reward", "vader", "--out", "o.jsonl", "--batch-size", "0"], "batch_size must be at least 1"),
        (["--reward", "vader", "--out", "o.jsonl", "--n", "2"], "--n is for sampling completions"),
        (["--reward", "vader", "--out", "o.jsonl", "--max-new-tokens", "9"], "--max-new-tokens is for sampling"),
        (["--reward", "vader", "--out", "o.jsonl", "--target-reward", "1"], "--target-reward is for sampling"),
        (["--reward", "vader", "--out", "o.jsonl", "--limit", "0"], "limit must be at least 1"),
        (["--reward", "vader", "--out", "o.jsonl", "--reward.arg.x", "1"], "unknown key 'arg'"),
        (["--reward", "vader", "--out", "o.jsonl", "--prompt-column", "nope"], "there is no column 'nope'"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: Captured) -> None:
    before = sorted(os.listdir())
    assert main(["score", "data.jsonl", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(os.listdir()) == before


def test_the_command_asks_a_conditioned_model_for_a_target(tmp_path: Path, capsys: Captured) -> None:
    asked = conditioned_policy("llama", "linear", tokenizer=tiny_tokenizer(add_bos=True))
    asked.save_pretrained("asked")
    Path("asked.txt").write_text("a cat\nthe dog")
    command = ["score", "asked.txt", "--model", "asked", "--reward", "vader", "--max-new-tokens", "5", "--n", "1"]
    assert main([*command, "--out", "a.jsonl"]) == 2
    assert "say for which: --target-reward reward=NUMBER" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--out", "a.jsonl", "--target-reward", "0.9"]) == 0
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == asked.generate(
        ["a cat", "the dog"], max_new_tokens=5, target_reward=0.9
    )


def test_an_unknown_option_names_the_closest(capsys: Captured) -> None:
    assert main([*COMMAND, "--reward-colum", "x"]) == 2
    assert "--reward-column" in capsys.readouterr().err
