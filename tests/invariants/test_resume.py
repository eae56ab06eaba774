"""A run that was interrupted after any update and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_runs import (
    ON_POLICY,
    PARTIAL_SETTINGS,
    SETTINGS,
    Setting,
    assemble,
    assert_same,
    early_letters,
    execute,
    stop_after,
    weights_of,
)
from tropism.build import Assembly
from tropism.rewards import RewardConfig
from tropism.training.checkpoint import list_checkpoints, read_checkpoint
from tropism.training.config import CheckpointConfig
from tropism.training.interrupt import Interrupted
from tropism.training.sources import Collected
from tropism.training.state import optimizer_state

UPDATES = {"sft": 4, "ppo": 8, "grpo": 8, "rloo": 8}
"""SFT: one per step; the others: two steps of two epochs of two minibatches."""


def assert_same_run(one: Assembly, other: Assembly) -> None:
    """Weights, moments, the logs' bytes, and everything else that a checkpoint holds."""
    assert_same(weights_of(one), weights_of(other))
    assert_same(
        optimizer_state(one.policy, one.trainer.optimizer), optimizer_state(other.policy, other.trainer.optimizer)
    )
    for log in ("metrics.jsonl", "warnings.jsonl"):
        first, second = one.folder.path / log, other.folder.path / log
        assert first.exists() == second.exists()
        assert not first.exists() or first.read_bytes() == second.read_bytes()
    last, same = (read_checkpoint(list_checkpoints(a.folder.path / "checkpoints")[-1]) for a in (one, other))
    ignored = {"logs"}  # sizes; those of timings.jsonl differ, as seconds do
    assert {k: v for k, v in last.state.items() if k not in ignored} == {
        k: v for k, v in same.state.items() if k not in ignored
    }
    for name, tensors in last.tensors.items():
        assert_same(dict(tensors), dict(same.tensors[name]))


@pytest.mark.parametrize("setting", SETTINGS + PARTIAL_SETTINGS, ids=str)
def test_interrupted_after_any_update(setting: Setting, tmp_path: Path) -> None:
    whole = execute(assemble(setting, tmp_path / "whole"))
    assert whole.trainer.counts.updates == UPDATES[setting.method]
    for updates in range(1, UPDATES[setting.method]):
        run = tmp_path / f"stopped-{updates}"
        stopped = assemble(setting, run)
        stop_after(stopped, updates, signal.SIGTERM)
        with pytest.raises(Interrupted):
            execute(stopped)
        assert stopped.trainer.counts.updates == updates
        assert_same_run(whole, execute(assemble(setting, run, resume=True)))


@pytest.mark.parametrize("method", ON_POLICY)
def test_signal_during_a_rollout_abandons_it(method: str, tmp_path: Path) -> None:
    setting = Setting(method, False, "llama")
    whole = execute(assemble(setting, tmp_path / "whole"))

    def interrupting(completions: list[str], trainer_state: dict[str, int]) -> list[float]:
        if trainer_state["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return early_letters(completions)

    changes: dict[str, Any] = {
        "reward": RewardConfig.of({"terms": {"early": {"use": interrupting}}, "scale": "running"})
    }
    stopped = assemble(setting, tmp_path / "stopped", **changes)
    with pytest.raises(Interrupted) as caught:
        execute(stopped)
    assert caught.value.signal_number == signal.SIGINT
    assert stopped.trainer.counts.steps == 1
    assert_same_run(whole, execute(assemble(setting, tmp_path / "stopped", resume=True)))


@pytest.mark.parametrize("method", ON_POLICY)
def test_signal_while_a_collect_is_logged_does_not_log_it_twice(method: str, tmp_path: Path) -> None:
    setting = Setting(method, False, "llama")
    whole = execute(assemble(setting, tmp_path / "whole"))
    stopped = assemble(setting, tmp_path / "stopped")
    source: Any = stopped.trainer.source
    log = source.on_collect

    def interrupted(collected: Collected) -> None:
        log(collected)
        if collected.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    source.on_collect = interrupted
    with pytest.raises(Interrupted):
        execute(stopped)
    assert_same_run(whole, execute(assemble(setting, tmp_path / "stopped", resume=True)))


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[3]], ids=str)
def test_stopped_twice(setting: Setting, tmp_path: Path) -> None:
    whole = execute(assemble(setting, tmp_path / "whole"))
    run = tmp_path / "stopped"
    for updates in (1, 3):
        stopped = assemble(setting, run, resume=updates > 1)
        stop_after(stopped, updates, signal.SIGINT)
        with pytest.raises(Interrupted):
            execute(stopped)
    assert_same_run(whole, execute(assemble(setting, run, resume=True)))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_saving_every_step_changes_nothing(setting: Setting, tmp_path: Path) -> None:
    often: dict[str, Any] = {"trainer": {"checkpoints": CheckpointConfig(every=1, keep=100)}}
    never = execute(assemble(setting, tmp_path / "never"))
    saved = execute(assemble(setting, tmp_path / "often", **often))
    assert len(list_checkpoints(tmp_path / "often" / "checkpoints")) == saved.recipe.total_steps
    assert_same_run(never, saved)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_same_seed_same_run_and_another_seed_another(setting: Setting, tmp_path: Path) -> None:
    first = execute(assemble(setting, tmp_path / "first"))
    torch.rand(17)  # the global random state has no influence
    torch.manual_seed(99)
    assert_same_run(first, execute(assemble(setting, tmp_path / "again")))
    other = execute(assemble(setting, tmp_path / "other", seed=8))
    assert (tmp_path / "first" / "metrics.jsonl").read_bytes() != (tmp_path / "other" / "metrics.jsonl").read_bytes()
    assert any(not torch.equal(value, weights_of(other)[name]) for name, value in weights_of(first).items())
