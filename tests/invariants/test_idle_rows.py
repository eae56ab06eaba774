"""Completions whose gradient is exactly zero are left out, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_runs import Setting, assemble
from tropism.algorithms import GRPO, RLOO
from tropism.algorithms.base import Algorithm
from tropism.rewards import RewardConfig


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The first group of four is told apart, the second is not."""
    return [float(len(ids) + ids[0] % 3) if place % 8 < 4 else 1.0 for place, ids in enumerate(completion_ids)]


def assembled(algorithm: Any, run: Path, reward: Any) -> Any:
    """Two prompts of four completions, one update."""
    assembly = assemble(
        Setting(algorithm.name, False, "llama"),
        run,
        algorithm=algorithm,
        reward=RewardConfig.of({"terms": {"told": {"use": reward}}}),
        prompts_per_step=2,
        total_steps=1,
    )
    assembly.trainer.source.on_collect = lambda collected: None
    return assembly


def counted_rows(algorithm: Any, patch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the loss will be given."""
    seen: list[int] = []
    loss = algorithm.loss

    def counting(policy: Any, batch: Any) -> Any:
        seen.append(len(batch))
        return loss(policy, batch)

    patch.setattr(algorithm, "loss", counting)
    return seen


METHODS = {
    "grpo": GRPO(group_size=4, kl_coef=0.0),
    "gspo": GRPO(group_size=4, kl_coef=0.0, ratio="sequence", normalisation="sequence"),
    "cispo": GRPO(group_size=4, kl_coef=0.0, ratio="cispo", clip_high=5.0),
    "rloo": RLOO(group_size=4, kl_coef=0.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_leaving_idle_rows_out_changes_no_gradient(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for skipping in (True, False):
        with monkeypatch.context() as patch:
            assembly = assembled(METHODS[name], tmp_path / f"{skipping}", reward)
            if not skipping:
                patch.setattr(type(assembly.algorithm), "idle", Algorithm.idle)
            batch = next(iter(assembly.trainer.source.collect(assembly.policy)))
            seen = counted_rows(assembly.algorithm, patch)
            metrics = assembly.trainer.update(batch)
            found.append((metrics["optim/grad_norm"], metrics["loss/policy"], sum(seen), len(batch)))
    (norm, value, rows, _), (own_norm, own_value, own_rows, total) = found
    assert norm == pytest.approx(own_norm, rel=1e-5)
    assert value == pytest.approx(own_value, rel=1e-5, abs=1e-6)
    assert rows < own_rows == total


def test_with_a_kl_in_the_loss_no_group_is_idle(tmp_path: Path) -> None:
    assembly = assembled(GRPO(group_size=4, kl_coef=0.1), tmp_path / "run", reward)
    batch = next(iter(assembly.trainer.source.collect(assembly.policy)))
    assert not assembly.algorithm.idle(batch).any()


@pytest.mark.parametrize("name", METHODS)
def test_an_idle_batch_moves_nothing_momentum_and_decay_included(name: str, tmp_path: Path) -> None:
    assembly = assembled(METHODS[name], tmp_path / "run", reward)
    for group in assembly.trainer.optimizer.param_groups:
        group["weight_decay"] = 0.1
    batch = next(iter(assembly.trainer.source.collect(assembly.policy)))
    assembly.trainer.update(batch)  # now there is momentum
    before = [p.detach().clone() for p in assembly.policy.parameters()]
    idle = replace(batch, advantages=torch.zeros_like(batch.advantages))
    assert assembly.algorithm.idle(idle).all()
    metrics = assembly.trainer.update(idle)
    assert metrics["optim/skipped"] == 1.0 and metrics["optim/idle_fraction"] == 1.0
    assert "optim/grad_norm" not in metrics
    assert all(torch.equal(p, old) for p, old in zip(assembly.policy.parameters(), before, strict=True))
