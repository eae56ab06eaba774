from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from full_disk import file_size_limit
from tropism.errors import ConfigError, StorageError
from tropism.training.checkpoint import Checkpoint, write_checkpoint
from tropism.training.run_folder import RunFolder, as_text
from tropism.types import RewardBatch, RewardInputs


def opened(path: Path) -> RunFolder:
    folder = RunFolder(path, resume=False)
    folder.create()
    return folder


def test_an_existing_run_is_never_overwritten(tmp_path: Path) -> None:
    opened(tmp_path / "run").write_recipe("a: 1\n")
    with pytest.raises(ConfigError, match="already holds a run"):
        RunFolder(tmp_path / "run", resume=False)
    RunFolder(tmp_path / "run", resume=True)
    (tmp_path / "empty").mkdir()
    opened(tmp_path / "empty")


def test_impossible_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "file", resume=False)
    with pytest.raises(ConfigError, match="no run to resume"):
        RunFolder(tmp_path / "nothing", resume=True)
    for path in (tmp_path / "file" / "below", Path("/proc/tropism/run")):
        with pytest.raises(StorageError, match="cannot be written"):
            opened(path)
    for name in ("a\0b", "a\nb", "\x1b[31m", "x" * 300):
        with pytest.raises(ConfigError, match="cannot be"):
            opened(tmp_path / name)
    assert not (tmp_path / "nothing").exists()


def test_nothing_is_written_before_create(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_lines_are_json_whatever_the_number(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    folder.append("metrics.jsonl", {"kind": "update", "a": 0.1 + 0.2, "b": math.nan, "c": -math.inf, "n": 3})
    folder.append("metrics.jsonl", {"kind": "collect"})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert first == {"kind": "update", "a": 0.1 + 0.2, "b": None, "c": None, "n": 3}
    assert len(lines) == 2


def test_logs_are_cut_back_to_a_checkpoint(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    folder.append("metrics.jsonl", {"step": 1})
    sizes = folder.log_sizes()
    assert sizes["warnings.jsonl"] == 0
    folder.append("metrics.jsonl", {"step": 2})
    folder.append("warnings.jsonl", {"step": 2})
    assert folder.cut_back(sizes, collected=1, evaluated=1) == []
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "run" / "warnings.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("found", "left"),
    [("", ""), ('{"step": 1}\n', '{"step": 1}\n'), ('{"step": 1}\n{"st', '{"step": 1}\n'), (None, None)],
)
def test_a_log_that_lacks_lines_is_told_and_never_filled_up(
    found: str | None, left: str | None, tmp_path: Path
) -> None:
    folder = opened(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    if found is not None:
        path.write_text(found)
    (message,) = folder.cut_back({"metrics.jsonl": 100}, collected=0, evaluated=0)
    assert "metrics.jsonl" in message and "100 bytes" in message and f"only {len(left or '')}" in message
    assert (path.read_text() if path.exists() else None) == left


def test_a_log_that_was_edited_is_cut_to_whole_lines(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": "a longer line than it was"}\n')
    assert len(folder.cut_back({"metrics.jsonl": 24}, collected=0, evaluated=0)) == 1
    assert path.read_text() == '{"step": 1}\n'


def test_nothing_but_logs_is_cut(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    (tmp_path / "mine.txt").write_text("mine")
    folder.cut_back({"../mine.txt": 0, "recipe.yaml": 0}, collected=0, evaluated=0)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_tables_of_later_steps_are_forgotten(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    for name in ("rollouts", "evaluations"):
        for step in (1, 2, 3):
            (folder.path / name / f"step-{step:06d}.parquet").write_text("x")
        (folder.path / name / "step-9.txt").write_text("mine")
    folder.cut_back({}, collected=2, evaluated=1)
    assert {path.name for path in (folder.path / "rollouts").iterdir()} == {
        "step-000001.parquet",
        "step-000002.parquet",
        "step-9.txt",
    }
    assert {path.name for path in (folder.path / "evaluations").iterdir()} == {"step-000001.parquet", "step-9.txt"}


def test_a_full_disk_leaves_whole_lines_and_whole_files(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    folder.append("metrics.jsonl", {"step": 1})
    folder.write_evaluation(0, {"prompt": ["a"]})
    folder.write_recipe("a: 1\n")
    with file_size_limit(20):
        for write, name in (
            (lambda: folder.append("metrics.jsonl", {"step": 2}), "metrics.jsonl"),
            (lambda: folder.write_evaluation(0, {"prompt": ["b"]}), "step-000000.parquet"),
            (lambda: folder.write_recipe("a: 1\nb: 23456789012345\n"), "recipe.yaml"),
        ):
            with pytest.raises(StorageError, match=f"{name} cannot be written: File too large; it needs"):
                write()  # type: ignore[no-untyped-call]
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert pq.read_table(folder.path / "evaluations" / "step-000000.parquet").to_pydict() == {"prompt": ["a"]}
    assert (folder.path / "recipe.yaml").read_text() == "a: 1\n"
    assert {path.name for path in folder.path.rglob("*")} == {
        *("rollouts", "evaluations", "checkpoints", "metrics.jsonl", "step-000000.parquet", "recipe.yaml"),
        *(".lock", ".lock-owner.json"),
    }


def test_no_space_is_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened(tmp_path / "run")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(
        StorageError, match=r"metrics.jsonl cannot be written: No space left on device; it needs 12 bytes"
    ):
        folder.append("metrics.jsonl", {"step": 1})


# One run at a time ---------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    early = RunFolder(tmp_path / "run", resume=False)
    first = opened(tmp_path / "run")
    with pytest.raises(StorageError, match=f"in use by process {os.getpid()} "):
        early.create()  # it had looked before the first began
    first.write_recipe("a: 1\n")
    with pytest.raises(StorageError, match=f"in use by process {os.getpid()} "):
        RunFolder(tmp_path / "run", resume=True)
    first.release()
    RunFolder(tmp_path / "run", resume=True).create()


def test_a_run_that_came_and_went_in_the_meantime_is_not_overwritten(tmp_path: Path) -> None:
    early = RunFolder(tmp_path / "run", resume=False)
    first = opened(tmp_path / "run")
    first.write_recipe("a: 1\n")
    first.release()
    with pytest.raises(ConfigError, match="already holds a run"):
        early.create()
    resumed = RunFolder(tmp_path / "run", resume=True)
    write_checkpoint(tmp_path / "run" / "checkpoints" / "step-000001-update-000001", Checkpoint(state={}, tensors={}))
    with pytest.raises(StorageError, match="another run has gone on"):
        resumed.create()
    RunFolder(tmp_path / "run", resume=True).create()


def test_a_run_that_never_began_leaves_the_folder_free(tmp_path: Path) -> None:
    """Killed between making the folders and writing the recipe."""
    opened(tmp_path / "run").release()
    opened(tmp_path / "run")


def test_leftovers_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    first = opened(tmp_path / "run")
    first.write_recipe("a: 1\n")
    first.release()
    run = first.path
    name = "step-000001-update-000001"
    swept = [
        *(".recipe.yaml.writing", ".environment.json.writing", ".report-17.html", "rollouts/step-000002.writing"),
        *("evaluations/step-000002.writing", ".model.0123abcd.new/half", ".writing-best/half"),
        *(f"checkpoints/.writing-{name}/half", f"checkpoints/.deleting-{name}/manifest.json"),
    ]
    kept = [".model.mine", "rollouts/notes.writing", "checkpoints/notes.txt", ".recipe.yaml.writing.bak"]
    for path in [*swept, *kept]:
        (run / path).parent.mkdir(exist_ok=True)
        (run / path).write_text("half")
    (run / "checkpoints" / f".deleting-{name}" / "manifest.json").unlink()
    (run / ".model.89abcdef.old").mkdir()
    (run / ".model.89abcdef.old" / "config.json").write_text("the model before")
    RunFolder(run, resume=True).create()
    left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert left == {"recipe.yaml", ".lock", ".lock-owner.json", "model/config.json", *kept}


def test_rollouts_hold_what_was_sampled_and_said(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    inputs = RewardInputs(
        prompts=["a", [{"role": "user", "content": "é"}]],
        completions=["b\udc80", [{"role": "assistant", "content": "\x00"}]],
        completion_ids=[[1, 2], []],
        finish_reasons=["eos", "length"],
    )
    rewards = RewardBatch(
        per_completion=torch.tensor([0.5, 0.0]),
        per_token=None,
        scored=torch.tensor([True, False]),
        terms={"warm": torch.tensor([0.5, math.nan])},
        extras={"why": ["because", None]},
    )
    folder.write_rollouts(3, inputs, rewards, {"advantage": [1.0, 0.0]})
    table = pq.read_table(tmp_path / "run" / "rollouts" / "step-000003.parquet").to_pydict()
    assert table["prompt"][0] == "a" and json.loads(table["prompt"][1]) == [{"role": "user", "content": "é"}]
    assert table["completion"][0] == "b\ufffd"
    assert table["completion_ids"] == [[1, 2], []]
    assert table["finish_reason"] == ["eos", "length"]
    assert table["reward"] == [0.5, None]  # unscored is no number
    assert table["reward/warm"] == [0.5, None] and table["extra/why"] == ["because", None]
    assert table["advantage"] == [1.0, 0.0]
    assert [file.name for file in (tmp_path / "run" / "rollouts").iterdir()] == ["step-000003.parquet"]


def test_rollouts_hold_what_each_term_saw_said_and_failed_to_say(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    inputs = RewardInputs(
        prompts=["a"] * 2,
        completions=["b"] * 2,
        completion_ids=[[1, 2], [3]],
        finish_reasons=["eos"] * 2,
        columns={
            "answer": [4, None],
            "messages": [[{"role": "user", "content": "é"}], []],
            "huge": [10**400, 1],
            "deep": [deep, 1],
            "name \ud800": ["x\ud800", "y"],
        },
    )
    rewards = RewardBatch(
        per_completion=torch.zeros(2),
        per_token=torch.tensor([[0.5, 1.0], [0.0, 0.0]]),
        scored=torch.tensor([True, False]),
        terms={"steps": torch.tensor([1.5, math.nan])},
        token_terms={"steps": [[0.5, 1.0], None]},
        errors={"steps": [None, "reward 'steps', step 2 raised OSError: gone"]},
    )
    folder.write_rollouts(2, inputs, rewards, {})
    table = pq.read_table(tmp_path / "run" / "rollouts" / "step-000002.parquet").to_pydict()
    assert table["column/answer"] == [4.0, None]
    assert json.loads(table["column/messages"][0]) == [{"role": "user", "content": "é"}]
    assert len(table["column/huge"]) == len(table["column/deep"]) == 2
    assert table["column/name \ufffd"] == ["x\ufffd", "y"]
    assert table["reward"] == table["reward/steps"] == [1.5, None]
    assert table["tokens/steps"] == [[0.5, 1.0], None]
    assert table["error/steps"] == [None, "reward 'steps', step 2 raised OSError: gone"]


def test_mixed_extra_columns_become_text(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    inputs = RewardInputs(
        prompts=["a"] * 3, completions=["b"] * 3, completion_ids=[[1]] * 3, finish_reasons=["eos"] * 3
    )
    rewards = RewardBatch(
        per_completion=torch.zeros(3),
        per_token=None,
        scored=torch.ones(3, dtype=torch.bool),
        extras={"mixed": ["text", 0.5, None], "numbers": [1.0, None, 2.0], "objects": [{"a": 1}, [2], True]},
    )
    folder.write_rollouts(1, inputs, rewards, {})
    table = pq.read_table(tmp_path / "run" / "rollouts" / "step-000001.parquet").to_pydict()
    assert table["extra/mixed"] == ["text", "0.5", None]
    assert table["extra/numbers"] == [1.0, None, 2.0]
    assert table["extra/objects"] == ["{'a': 1}", "[2]", "True"]


def test_environment_names_versions(tmp_path: Path) -> None:
    opened(tmp_path / "run").write_environment({"device": "cpu"})
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["device"] == "cpu"
    assert {"tropism", "torch", "transformers"} <= environment["versions"].keys()


def test_text_that_files_cannot_hold() -> None:
    assert as_text("a\ud800b").encode("utf-8")
    assert as_text("plain") == "plain"
    assert json.loads(as_text([{"role": "user", "content": "x"}])) == [{"role": "user", "content": "x"}]
