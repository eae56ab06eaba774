"""Rewards that misbehave in the middle of a run."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tiny_runs import Setting, assemble, assert_same, early_letters, execute, logged, make_recipe, weights_of
from tropism import build
from tropism.errors import ConfigError, ModelError, RewardError, StorageError
from tropism.rewards import RewardConfig
from tropism.training.checkpoint import newest_complete
from tropism.training.config import CheckpointConfig

GRPO = Setting("grpo", False, "llama")


def table_of(run: Path, step: int) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = pq.read_table(run / "rollouts" / f"step-{step:06d}.parquet").to_pydict()
    return table


def test_unscored_rows_are_left_out_and_the_files_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def early(completions: list[str], prompts: list[str]) -> list[float]:
        if prompts[0].startswith("a"):
            raise OSError("no answer")
        return [float(len(text)) for text in completions]

    def by_token(completion_ids: list[list[int]]) -> list[list[float]]:
        return [[0.0 for _ in ids] for ids in completion_ids]

    terms = {"early": {"use": early, "rows_per_call": 1}, "steps": {"use": by_token, "weight": 0.0}}
    data = [{"prompt": text, "source": number} for number, text in enumerate(["a cat", "oh", "we ran", "no"])]
    reward = RewardConfig.of({"terms": terms, "on_error": "skip"})
    assembly = assemble(GRPO, tmp_path / "run", data=data, reward=reward)
    monkeypatch.setattr(assembly.harness, "dry_call", lambda inputs: None)
    execute(assembly)
    table = table_of(tmp_path / "run", 1)
    broken = [prompt.startswith("a") for prompt in table["prompt"]]
    assert any(broken) and not all(broken)
    assert [value is None for value in table["reward/early"]] == broken == [value is None for value in table["reward"]]
    assert [reason is not None for reason in table["error/early"]] == broken
    row = broken.index(True)
    assert (
        f"row {row}, prompt: 'a cat'" in table["error/early"][row] and "OSError: no answer" in table["error/early"][row]
    )
    assert [table["advantage"][row] for row, bad in enumerate(broken) if bad] == [0.0] * sum(broken)
    assert [data[int(number)]["prompt"] for number in table["column/source"]] == table["prompt"]
    assert [len(values) for values in table["tokens/steps"]] == [len(ids) for ids in table["completion_ids"]]
    (first, _) = logged(tmp_path / "run", "collect")
    assert first["reward/early/skipped"] == first["reward/early/failed"] == sum(broken)
    assert first["reward/unscored"] == sum(broken) / len(broken)


def test_a_failure_names_the_step_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    def early(completions: list[str], trainer_state: Any) -> list[float]:
        if trainer_state["step"] == 2:
            raise OSError("no answer")
        return [float(len(text)) for text in completions]

    trainer = {"checkpoints": CheckpointConfig(every=1)}
    assembly = assemble(GRPO, tmp_path / "run", reward=RewardConfig.of(early), total_steps=4, trainer=trainer)
    with pytest.raises(
        RewardError, match=r"reward 'early', after step 2 raised OSError: no answer .*rows 0 to 7, first prompt"
    ):
        execute(assembly)
    newest, _ = newest_complete(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name.startswith("step-000002")


def test_an_error_loses_nothing_that_was_done(tmp_path: Path) -> None:
    """Without checkpoints on the way, too; with the cause mended the run is the one that met no error."""
    down = [True]

    def early(completions: list[str], trainer_state: Any) -> list[float]:
        if trainer_state["step"] == 2 and down[0]:
            raise OSError("no answer")
        return [float(len(text)) for text in completions]

    setting: dict[str, Any] = {"reward": RewardConfig.of(early), "total_steps": 3}
    with pytest.raises(RewardError, match="no answer"):
        execute(assemble(GRPO, tmp_path / "run", **setting))
    down[0] = False
    resumed = execute(assemble(GRPO, tmp_path / "run", resume=True, **setting))
    whole = execute(assemble(GRPO, tmp_path / "whole", **setting))
    assert_same(weights_of(whole), weights_of(resumed))
    texts = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "whole")]
    assert texts[0] == texts[1]


def test_a_hang_ends_a_run_or_leaves_rows_unscored(tmp_path: Path) -> None:
    def early(completions: list[str], trainer_state: Any) -> list[float]:
        while trainer_state["step"] == 1:
            pass
        return [float(len(text)) for text in completions]

    for on_error in ("raise", "skip"):
        reward = RewardConfig.of({"use": early, "timeout": 0.5, "on_error": on_error})
        assembly = assemble(GRPO, tmp_path / on_error, reward=reward)
        began = time.monotonic()
        if on_error == "raise":
            with pytest.raises(RewardError, match=r"step 1 took longer than its timeout of 0.5 s"):
                execute(assembly)
        else:
            execute(assembly)
            assert table_of(tmp_path / on_error, 2)["reward/early"] == [None] * 8
            assert logged(tmp_path / on_error, "collect")[1]["reward/early/timeouts"] == 1.0
        assert time.monotonic() - began < 60
        assembly.harness.close()  # type: ignore[union-attr]


def test_a_run_with_workers_is_the_run_without(tmp_path: Path) -> None:
    def early(completions: list[str]) -> list[float]:
        return [sum(letter in "abcdefghijklm" for letter in text) / max(1, len(text)) for text in completions]

    lines = []
    for name, how in (("here", {}), ("there", {"timeout": 30, "rows_per_call": 3, "concurrency": 2})):
        assembly = execute(assemble(GRPO, tmp_path / name, reward=RewardConfig.of({"use": early, **how})))
        lines.append((tmp_path / name / "metrics.jsonl").read_bytes())
        assembly.harness.close()  # type: ignore[union-attr]
    assert lines[0] == lines[1]


def test_a_cache_changes_nothing_but_how_long_it_takes(tmp_path: Path) -> None:
    reward = RewardConfig.of({"use": "length", "args": {"target": 4}, "cache": str(tmp_path / "cache.db")})
    for name in ("first", "second"):
        execute(assemble(GRPO, tmp_path / name, reward=reward))
    first, second = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("first", "second"))
    assert first == second
    timings = [json.loads(line) for line in (tmp_path / "second" / "timings.jsonl").read_text().splitlines()]
    assert [line["throughput/cached/length"] for line in timings if line["kind"] == "collect"] == [8.0, 8.0]


def test_messages_count_rows_over_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of a second process begins in the middle of the batch."""

    def early(completions: list[str]) -> list[float]:
        return [1.0, float("nan"), *[1.0] * (len(completions) - 2)]

    held_out = ["a cat sat.", "we ran.", "oh", "no"]
    assembly = assemble(GRPO, tmp_path / "run", reward=RewardConfig.of(early), eval_data=held_out)
    sampled = assembly.trainer.source.maker.sample(assembly.prompts[:4], 2)  # type: ignore[attr-defined]

    def second_half(items: Sequence[Any]) -> tuple[int, Sequence[Any]]:
        return len(items) // 2, items[len(items) // 2 :]

    prompts = [prompt for prompt in assembly.prompts[:4] for _ in range(2)]
    monkeypatch.setattr(assembly.processes, "share", second_half)
    with pytest.raises(RewardError, match=r"row 5 "):
        assembly.trainer.source.maker.score(sampled, prompts, {"step": 0})  # type: ignore[attr-defined]


@pytest.mark.parametrize("step", ["policy_of", "preflight", "the second term", "the cache"])
def test_no_worker_outlives_a_run_that_cannot_begin(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while its error is kept, as a notebook does."""
    workers: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            workers.append(self)

    def fail(*_: Any, **__: Any) -> None:
        raise ModelError("it cannot begin")

    terms: dict[str, dict[str, Any]] = {"early": {"use": early_letters, "timeout": 30}}
    if step == "the second term":
        terms["odd"] = {"use": "no-such-reward"}
    elif step == "the cache":
        terms["early"]["cache"] = tmp_path
    else:
        monkeypatch.setattr(build, step, fail)
    monkeypatch.setattr(subprocess, "Popen", Noted)
    recipe = make_recipe(GRPO, tmp_path / "run", reward=RewardConfig.of({"terms": terms}))
    with pytest.raises((ModelError, ConfigError, StorageError)) as failed:
        build.run_recipe(recipe)
    assert failed.value is not None and len(workers) == 1
    assert [worker.poll() is None for worker in workers] == [False]
