"""Rewards kept on disk: by content, across runs and processes, and never wrong."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tropism.errors import ConfigError, RewardError, StorageError
from tropism.rewards import RewardConfig, RewardHarness
from tropism.rewards.caching import RewardCache
from tropism.types import RewardInputs

Make = Callable[..., RewardInputs]
FILE = """
import pathlib
OFFSET = 0.0

def score(completions, prompts, k=1):
    with pathlib.Path(CALLS).open("a") as calls:
        calls.write("".join(f"{p}|{c};" for p, c in zip(prompts, completions)))
    return [k * len(c) + OFFSET for c in completions]

def per_token(completions, completion_ids):
    return [None if c == "none" else [float(len(c))] * len(ids) for c, ids in zip(completions, completion_ids)]

def logs(completions, log_metric):
    return [0.0] * len(completions)

def by_column(completions, label):
    return [float(x) for x in label]

def everything(completions, **kwargs):
    assert not {"log_metric", "log_extra", "trainer_state"} & set(kwargs)
    return [float(len(c)) for c in completions]
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(f"CALLS = {str(tmp_path / 'calls')!r}\n{FILE}")
    return path


def calls(tmp_path: Path) -> list[str]:
    """The rows that ``score`` was called with since the last look."""
    path = tmp_path / "calls"
    found = path.read_text().split(";")[:-1] if path.exists() else []
    path.write_text("")
    return found


def harness_of(path: Path, function: str = "score", **settings: Any) -> RewardHarness:
    config = {"use": f"{path}:{function}", "cache": str(path.parent / "cache.db"), **settings}
    return RewardHarness(RewardConfig.of(config), allow_code=True)


def values(harness: RewardHarness, inputs: RewardInputs) -> Any:
    (found,) = harness.evaluate(inputs).values.values()
    return found


def test_the_same_row_is_scored_once_by_any_run(make_inputs: Make, mine: Path, tmp_path: Path) -> None:
    harness = harness_of(mine)
    assert values(harness, make_inputs(["a", "bb"])) == [1.0, 2.0]
    assert calls(tmp_path) == ["prompt 0|a", "prompt 1|bb"]
    raw = harness.evaluate(make_inputs(["a", "ccc", "bb"], step=9, unused=[1, 2, 3]))
    assert raw.values["score"] == [1.0, 3.0, 2.0]
    # "bb" answers another prompt now, which the function asks for; steps and unused columns are no part of the row.
    assert calls(tmp_path) == ["prompt 1|ccc", "prompt 2|bb"]
    assert raw.counts == {"score": {"cached": 1}}
    batch = harness_of(mine, rows_per_call=1).score(make_inputs(["a", "ccc", "bb"]))
    assert batch.per_completion.tolist() == [1.0, 3.0, 2.0] and calls(tmp_path) == []
    assert batch.metrics["throughput/cached/score"] == 3.0
    assert not any(name.startswith("reward/score/") for name in batch.metrics)  # equal runs have equal metrics


def test_other_arguments_or_code_are_another_reward(make_inputs: Make, mine: Path) -> None:
    assert values(harness_of(mine), make_inputs(["a"])) == [1.0]
    assert values(harness_of(mine, args={"k": 3}), make_inputs(["a"])) == [3.0]
    mine.write_text(mine.read_text().replace("OFFSET = 0.0", "OFFSET = 5.0"))
    assert values(harness_of(mine), make_inputs(["a"])) == [6.0]


def test_equal_rows_of_a_batch_are_scored_once(make_inputs: Make, mine: Path, tmp_path: Path) -> None:
    inputs = make_inputs(["a", "a", "bb"])
    inputs.prompts[:] = ["p", "p", "p"]
    assert values(harness_of(mine), inputs) == [1.0, 1.0, 2.0]
    assert calls(tmp_path) == ["p|a", "p|bb"]


def test_every_kind_of_reward_is_kept(make_inputs: Make, mine: Path) -> None:
    inputs = make_inputs(["none", "two words", "x"])
    expected = [None, [9.0, 9.0], [1.0]]
    for _ in range(2):
        assert values(harness_of(mine, "per_token"), inputs) == expected


def test_columns_are_part_of_the_row(make_inputs: Make, mine: Path) -> None:
    for label in (1, 2):
        assert values(harness_of(mine, "by_column"), make_inputs(["a"], label=[label])) == [float(label)]
    with pytest.raises(
        RewardError, match=r"row 7 \(prompt 'prompt 1'\): its data, 'label': a PosixPath cannot be part of"
    ):
        harness_of(mine, "by_column").evaluate(make_inputs(["a", "b"], label=[1, Path("x")]), first_row=6)


def test_rewards_that_depend_on_the_run_are_refused(make_inputs: Make, mine: Path) -> None:
    with pytest.raises(ConfigError, match=r"'logs' asks for log_metric, .*remove `cache`"):
        harness_of(mine, "logs")
    assert values(harness_of(mine, "everything"), make_inputs(["a"])) == [1.0]


def test_python_functions_are_known_by_their_source_and_what_they_enclose(make_inputs: Make, tmp_path: Path) -> None:
    def made(bonus: Any, default: float = 0.0) -> Any:
        def reward(completions: list[str], more: float = default) -> list[float]:
            return [len(text) + float(bonus) + more for text in completions]

        return reward

    def score(function: Any, **settings: Any) -> Any:
        config = RewardConfig.of({"use": function, "cache": str(tmp_path / "cache.db"), **settings})
        return values(RewardHarness(config), make_inputs(["a"]))

    assert score(made(1)) == [2.0] == score(made(1))
    assert score(made(2)) == [3.0]
    assert score(made(1, default=4.0)) == [6.0]
    assert score(made(1), args={"more": 7.0}) == [9.0]
    assert score(partial(made(1), more=8.0)) == [10.0]
    assert score("length", args={"goal": "maximise"}) == [1.0] == score("length", args={"goal": "maximise"})
    with pytest.raises(ConfigError, match=r"'reward': .*'bonus': a Fraction cannot be part"):
        score(made(Fraction(1, 2)))
    with pytest.raises(ConfigError, match=r"what a method depends on cannot be told"):
        score(made(1).__get__(object()))
    scope: dict[str, Any] = {}
    exec("def typed_in(completions): return [0.0]", scope)
    with pytest.raises(ConfigError, match=r"'typed_in' has no source that can be read"):
        score(scope["typed_in"])


def test_the_call_before_training_is_always_made(make_inputs: Make, mine: Path, tmp_path: Path) -> None:
    harness = harness_of(mine)
    harness.evaluate(make_inputs(["a"]))
    calls(tmp_path)
    harness.dry_call(make_inputs(["a"]))
    assert calls(tmp_path) == ["prompt 0|a"]


def test_what_was_scored_before_a_failure_is_kept(make_inputs: Make, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def score(completions):\n    return [{'a': 1.0, 'b': 2.0}[c] for c in completions]\n")
    harness = harness_of(path, rows_per_call=1)
    with pytest.raises(RewardError, match="KeyError: 'x'"):
        harness.evaluate(make_inputs(["a", "x", "b"]))
    with sqlite3.connect(tmp_path / "cache.db") as connection:
        assert [json.loads(value) for (value,) in connection.execute("SELECT value FROM rewards")] == [1.0]


def test_it_works_with_workers(make_inputs: Make, mine: Path, tmp_path: Path) -> None:
    harness = harness_of(mine, timeout=20)
    for _ in range(2):
        assert values(harness, make_inputs(["a", "bb"])) == [1.0, 2.0]
    assert calls(tmp_path) == ["prompt 0|a", "prompt 1|bb"]
    harness.close()


@pytest.mark.parametrize("damage", ["value", "sum", "key"])
def test_a_changed_entry_is_never_a_reward(damage: str, make_inputs: Make, mine: Path, tmp_path: Path) -> None:
    harness = harness_of(mine)
    harness.evaluate(make_inputs(["a", "bb"]))
    with sqlite3.connect(tmp_path / "cache.db") as connection:
        if damage == "key":
            connection.execute("UPDATE rewards SET key = replace(key, substr(key, 1, 4), 'ffff')")
        else:
            connection.execute(f"UPDATE rewards SET {damage} = '7.0'")
    if damage == "key":
        assert values(harness, make_inputs(["a", "bb"])) == [1.0, 2.0]
    else:
        with pytest.raises(StorageError, match=r"cache\.db is damaged; delete it"):
            harness.evaluate(make_inputs(["a", "bb"]))


def test_a_damaged_file_is_one_clear_error(make_inputs: Make, mine: Path, tmp_path: Path) -> None:
    """Whatever byte is turned around: the rewards are right, or there is an error that names the file."""
    texts = [f"{'x' * number}" for number in range(1, 30)]
    harness_of(mine).evaluate(make_inputs(texts))
    path = tmp_path / "cache.db"
    whole = path.read_bytes()
    refused: list[str] = []
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert values(harness_of(mine), make_inputs(texts)) == [float(len(text)) for text in texts]
        except StorageError as error:
            refused.append(str(error))
    assert len(refused) > 5 and all("cache.db" in message for message in refused)


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0 and then nothing", b"not a database at all" * 100])
def test_other_files_are_not_touched(content: bytes, mine: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    path.write_bytes(content)
    if content:
        with pytest.raises(StorageError, match=r"cache\.db"):
            harness_of(mine)
        assert path.read_bytes() == content
    else:
        harness_of(mine)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (x)")
    with pytest.raises(StorageError, match="no cache of rewards"):
        RewardCache(other, "x")
    with pytest.raises(StorageError, match=r"cannot be used"):
        RewardCache(tmp_path / "mine.py" / "below", "x")


def test_several_threads_and_processes_fill_one_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    code = (
        "import sys; from tropism.rewards.caching import RewardCache\n"
        "cache = RewardCache(sys.argv[1], 'id')\n"
        "for number in range(40):\n"
        "    cache.write({f'{sys.argv[2]}-{number}': float(number), f'both-{number}': float(number)})\n"
        "    assert cache.read([f'both-{number}']) == {f'both-{number}': float(number)}\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b")]

    def fill(name: str) -> None:
        cache = RewardCache(path, "id")
        for number in range(40):
            cache.write({f"{name}-{number}": float(number)})

    threads = [threading.Thread(target=fill, args=(name,)) for name in ("c", "d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(60) for process in running] == [0, 0]
    keys = [f"{name}-{number}" for name in ("a", "b", "c", "d", "both") for number in range(40)]
    assert RewardCache(path, "id").read(keys) == {key: float(key.partition("-")[2]) for key in keys}
