"""Runs that are killed at any moment, or meet a full disk, go on to the same end as a run that nothing happened to."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tropism.evaluation.run_folder import RunData
from tropism.training.checkpoint import list_checkpoints, newest_complete, read_newest, sweep

SCRIPT = Path(__file__).with_name("run_server.py")
SETTINGS = ("grpo-full", "ppo-lora")
SAVES = 8
"""One after each update."""
KILLS = 10
"""Of each setting."""

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """The server of run_server.py: takes a request, waits for the answer."""
    server = subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert server.stdin is not None and server.stdout is not None
    try:
        assert json.loads(server.stdout.readline())["ready"]

        def request(**what: Any) -> dict[str, Any]:
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(json.dumps(what, default=str) + "\n")
            server.stdin.flush()
            answer: dict[str, Any] = json.loads(server.stdout.readline())
            return answer

        yield request
    finally:
        server.kill()
        server.communicate()


@pytest.fixture(scope="module")
def whole(ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], float]]:
    """What the uninterrupted run of each setting leaves behind, and its seconds."""
    found = {}
    for setting in SETTINGS:
        run = tmp_path_factory.mktemp("whole") / setting
        began = time.monotonic()
        answer = ask(run=run, setting=setting)
        assert answer["ended"] == "whole", answer
        found[setting] = contents(run), time.monotonic() - began
    return found


def contents(run: Path) -> dict[str, Any]:
    """Every file of a run: its bytes, but for what may differ between equal runs (times, paths)."""
    files: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_dir() or path.name in ("timings.jsonl", "manifest.json", "environment.json", "recipe.yaml"):
            files[name] = "present"
        elif path.name == "state.json":
            files[name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "logs"}
        else:
            files[name] = path.read_bytes()
    return files


def assert_same(run: Path, expected: dict[str, Any]) -> None:
    found = contents(run)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def finish(ask: Ask, run: Path, setting: str) -> dict[str, Any]:
    """Resume a run; where nothing had been saved yet that is refused with the reason, and the run begins anew."""
    answer = ask(run=run, setting=setting, resume=True)
    if answer["ended"] == "error":
        assert answer["type"] == "ConfigError", answer
        assert "holds no complete checkpoint" in answer["text"] or "there is no run to resume" in answer["text"], answer
        assert newest_complete(run / "checkpoints")[0] is None, answer
        shutil.rmtree(run, ignore_errors=True)
        answer = ask(run=run, setting=setting)
    assert answer["ended"] == "whole", answer
    return answer


def test_the_whole_run_writes_everything(whole: dict[str, tuple[dict[str, Any], float]]) -> None:
    for files, _ in whole.values():
        steps = [f"step-{step:06d}.parquet" for step in (0, 1, 2)]
        assert {f"evaluations/{step}" for step in steps} | {f"rollouts/{step}" for step in steps[1:]} <= files.keys()
        assert len([name for name in files if name.endswith("optimizer.safetensors")]) == 2
        assert "best/policy.safetensors" in files and len(files["metrics.jsonl"].splitlines()) == 8 + 2 + 3
        assert not [name for name in files if name.split("/")[-1].startswith(".")]


@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_at_any_moment(
    setting: str, ask: Ask, whole: dict[str, tuple[dict[str, Any], float]], tmp_path: Path
) -> None:
    """Most moments lie inside of the writing of a checkpoint, some anywhere in the run."""
    expected, seconds = whole[setting]
    chance = random.Random(f"killed {setting}")
    killed = unfinished = 0
    for number in range(KILLS):
        run = tmp_path / f"run-{number}"
        save = 0 if number % 5 == 4 else chance.randint(1, SAVES)
        delay = chance.uniform(0.1, 0.9) * seconds if save == 0 else chance.uniform(0, 0.02)
        answer = ask(run=run, setting=setting, kill={"save": save, "delay": delay})
        killed += answer["ended"] == "killed"
        unfinished += any((run / "checkpoints").glob(".*")) if run.exists() else 0
        if run.exists():
            finish(ask, run, setting)
            assert_same(run, expected)
    assert killed >= KILLS - 3, "most were still at work"
    assert unfinished >= 2, "some were killed while they wrote"


def test_killed_twice(ask: Ask, whole: dict[str, tuple[dict[str, Any], float]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ask(run=run, setting="grpo-full", kill={"save": 3, "delay": 0.004})["ended"] == "killed"
    assert ask(run=run, setting="grpo-full", resume=True, kill={"save": 2, "delay": 0.002})["ended"] == "killed"
    answer = finish(ask, run, "grpo-full")
    assert any("taken over" in message for message in answer["messages"])
    assert_same(run, whole["grpo-full"][0])


def test_killed_at_every_line_of_writing(ask: Ask, tmp_path: Path) -> None:
    """Replacing, writing and pruning: whatever is left, one checkpoint can be read, and a sweep leaves no others."""
    values: set[float] = set()
    line, ended = 1, "killed"
    while ended == "killed":
        folder = tmp_path / f"at-{line}"
        ended = ask(write=folder, line=line)["ended"]
        checkpoint, skipped = read_newest(folder)
        assert checkpoint is not None, (line, skipped)
        value = checkpoint.state["value"]
        assert checkpoint.tensors["policy"]["a"].tolist() == [value] * 3
        sweep(folder)
        swept, _ = read_newest(folder)
        assert swept is not None and swept.state["value"] == value
        assert list(folder.iterdir()) == list_checkpoints(folder)[::-1] or len(list(folder.iterdir())) == 2
        assert not any(path.name.startswith(".") for path in folder.iterdir())
        values.add(value)
        line += 2
    assert ended == "whole" and line > 80
    assert values == {1.0, 2.0, 3.0}


@pytest.mark.parametrize("when", ["save", "saved"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_full_disk(
    setting: str, when: str, ask: Ask, whole: dict[str, tuple[dict[str, Any], float]], tmp_path: Path
) -> None:
    """At the fifth save, or when the logs are written after it: a named error, nothing lost, and the same end."""
    run = tmp_path / "run"
    answer = ask(run=run, setting=setting, limit={when: 5, "bytes": 1000})
    assert (answer["ended"], answer["type"]) == ("error", "StorageError"), answer
    last = "step-000001-update-000004" if when == "save" else "step-000001-update-000005"
    culprit = "step-000001-update-000005" if when == "save" else "metrics.jsonl"
    assert f"{culprit} cannot be written: File too large; it needs" in answer["text"]
    assert f"go on from {last} with: tropism train --resume {run}" in answer["text"]
    path, skipped = newest_complete(run / "checkpoints")
    assert path is not None and path.name == last and not skipped
    assert not [path for path in run.rglob("*") if path.name.startswith(".")], "neither leftovers nor a lock"
    answer = finish(ask, run, setting)
    assert answer["messages"] == [] or not any("skipped" in message for message in answer["messages"])
    assert_same(run, whole[setting][0])


@pytest.mark.parametrize("name", ["policy.safetensors", "optimizer.safetensors", "batch.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_skipped_and_named(
    name: str, ask: Ask, whole: dict[str, tuple[dict[str, Any], float]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert ask(run=run, setting="grpo-full", limit={"save": 7, "bytes": 1000})["ended"] == "error"
    newest, _ = newest_complete(run / "checkpoints")
    assert newest is not None
    data = (newest / name).read_bytes()
    (newest / name).write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    answer = finish(ask, run, "grpo-full")
    assert any(
        "skipped" in message and f"{newest.name}" in message and name in message for message in answer["messages"]
    )
    assert_same(run, whole["grpo-full"][0])


def test_without_a_complete_checkpoint_the_run_is_refused(ask: Ask, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ask(run=run, setting="grpo-full", limit={"save": 3, "bytes": 1000})["ended"] == "error"
    for path in (run / "checkpoints").iterdir():
        (path / "optimizer.safetensors").unlink()
    before = contents(run)
    answer = ask(run=run, setting="grpo-full", resume=True)
    assert (answer["ended"], answer["type"]) == ("error", "ConfigError")
    assert answer["text"].count("optimizer.safetensors is missing") == 2
    assert contents(run) == before


def test_a_second_run_is_refused_while_the_first_works(
    ask: Ask, whole: dict[str, tuple[dict[str, Any], float]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = ask(run=run, setting="grpo-full", stop={"save": 6})
    for resume in (True, False):
        answer = ask(run=run, setting="grpo-full", resume=resume)
        assert (answer["ended"], answer["type"]) == ("error", "StorageError"), answer
        assert f"in use by process {first['pid']} on" in answer["text"]
    assert len(RunData.read(run).metrics) > 5, "reading is not kept out"
    assert ask(go_on=first["pid"])["ended"] == "whole"
    assert_same(run, whole["grpo-full"][0])


def test_a_folder_that_cannot_be_written_is_refused_before_training(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for run in (tmp_path / "file" / "run", Path("/proc/tropism/run")):
        answer = ask(run=run, setting="grpo-full")
        assert (answer["ended"], answer["type"]) == ("error", "StorageError"), answer
        assert f"{run} cannot be written" in answer["text"] and "resume" not in answer["text"]
