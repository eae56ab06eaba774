from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tropism.errors import ConfigError
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
    with pytest.raises(ConfigError, match="cannot be created"):
        opened(tmp_path / "file" / "below")
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
    folder.cut_logs(sizes)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "run" / "warnings.jsonl").read_text() == ""


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
    assert table["completion"][0] == "b?"
    assert table["completion_ids"] == [[1, 2], []]
    assert table["finish_reason"] == ["eos", "length"]
    assert table["reward"][0] == 0.5 and math.isnan(table["reward"][1])
    assert table["reward/warm"][0] == 0.5 and table["extra/why"] == ["because", None]
    assert table["advantage"] == [1.0, 0.0]
    assert [file.name for file in (tmp_path / "run" / "rollouts").iterdir()] == ["step-000003.parquet"]


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
