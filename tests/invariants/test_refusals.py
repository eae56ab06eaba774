"""What must not change the weights: nothing to learn from, numbers that are not finite, completions without tokens."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_runs import (
    ON_POLICY,
    SETTINGS,
    Setting,
    assemble,
    assert_same,
    early_letters,
    execute,
    logged,
    sample,
    weights_of,
)
from tropism.build import Assembly
from tropism.errors import NumericsError
from tropism.rewards import RewardConfig
from tropism.training.state import optimizer_state
from tropism.types import Batch, RewardBatch, Rollouts

ON_POLICY_SETTINGS = [s for s in SETTINGS if s.on_policy]


def state_of(assembly: Assembly) -> dict[str, torch.Tensor]:
    moments = optimizer_state(assembly.policy, assembly.trainer.optimizer)
    return weights_of(assembly) | {name: value.clone() for name, value in moments.items()}


def batch_after(assembly: Assembly) -> Batch:
    """The next batch of a run that already has momentum."""
    assembly.run.begin()
    batch: Batch = next(iter(assembly.trainer.source.collect(assembly.trainer.policy)))
    assembly.trainer.update(batch)
    return batch


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_batch_without_weight_skips_the_step_momentum_and_decay_included(setting: Setting, tmp_path: Path) -> None:
    assembly = assemble(setting, tmp_path / "run")
    for group in assembly.trainer.optimizer.param_groups:
        group["weight_decay"] = 0.1
    batch = batch_after(assembly)
    before = state_of(assembly)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing can be whitened
        metrics = assembly.trainer.update(batch.emptied())
    assert metrics["optim/skipped"] == 1.0
    assert "optim/grad_norm" not in metrics
    assert_same(before, state_of(assembly))
    assembly.trainer.update(batch)
    with pytest.raises(AssertionError, match="differ"):
        assert_same(before, state_of(assembly))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_loss_that_is_not_finite_is_refused_before_the_weights_change(
    setting: Setting, bad: float, tmp_path: Path
) -> None:
    assembly = assemble(setting, tmp_path / "run", trainer={"micro_batch_size": 1})
    batch = batch_after(assembly)
    before = state_of(assembly)
    loss, calls = assembly.algorithm.loss, []

    def broken(policy: Any, micro_batch: Batch) -> Any:
        calls.append(len(micro_batch))
        sums, ratios = loss(policy, micro_batch)
        if len(calls) == 2:
            sums = {name: value * bad for name, value in sums.items()}
        return sums, ratios

    assembly.algorithm.loss = broken
    with pytest.raises(NumericsError, match=r"^loss/\w+ is (nan|-?inf) at update 2 "):
        assembly.trainer.update(batch)
    assert_same(before, state_of(assembly))
    assert all(parameter.grad is None for parameter in assembly.policy.parameters())
    assembly.algorithm.loss = loss
    assembly.trainer.update(batch)  # and nothing of it is left over
    assert all(bool(torch.isfinite(value).all()) for value in state_of(assembly).values())


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_gradient_that_is_not_finite_is_refused_and_named(setting: Setting, tmp_path: Path) -> None:
    assembly = assemble(setting, tmp_path / "run")
    batch = batch_after(assembly)
    before = state_of(assembly)
    trained = [(name, p) for name, p in assembly.policy.named_parameters() if p.requires_grad and "model." in name]
    name, parameter = trained[len(trained) // 2]

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        poisoned = gradient.clone()
        poisoned.view(-1)[0] = float("nan")
        return poisoned

    parameter.register_hook(poison)
    with pytest.raises(NumericsError) as caught:
        assembly.trainer.update(batch)
    assert name in str(caught.value)
    assert_same(before, state_of(assembly))
    assert all(p.grad is None for p in assembly.policy.parameters())


@pytest.mark.parametrize("method", ["ppo", "rloo"])
def test_huge_reward_never_leaves_weights_that_are_not_finite(method: str, tmp_path: Path) -> None:
    """GRPO divides by the standard deviation; the others stop, or their clipped gradient is finite."""

    def huge(completions: list[str]) -> list[float]:
        return [1e30 * value for value in early_letters(completions)]

    setting = Setting(method, False, "llama")
    algorithm = setting.with_algorithm(**({"whiten_advantages": False} if method == "ppo" else {}))
    assembly = assemble(setting, tmp_path / "run", algorithm=algorithm, reward=RewardConfig.of(huge))
    with pytest.raises(NumericsError, match="weights are unchanged"):
        execute(assembly)
    assert assembly.trainer.counts.updates == 0


def test_huge_reward_is_harmless_where_it_is_normalised(tmp_path: Path) -> None:
    def huge(completions: list[str]) -> list[float]:
        return [1e30 * value for value in early_letters(completions)]

    assembly = execute(assemble(Setting("grpo", False, "llama"), tmp_path / "run", reward=RewardConfig.of(huge)))
    assert all(bool(torch.isfinite(value).all()) for value in weights_of(assembly).values())


@pytest.mark.parametrize("setting", ON_POLICY_SETTINGS, ids=str)
def test_reward_without_any_opinion_makes_no_update(setting: Setting, tmp_path: Path) -> None:
    def silent(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    assembly = assemble(setting, tmp_path / "run", reward=RewardConfig.of(silent))
    before = weights_of(assembly)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # ours says it better than a library's
        execute(assembly)
    assert_same(before, weights_of(assembly))
    assert optimizer_state(assembly.policy, assembly.trainer.optimizer) == {}
    updates = logged(tmp_path / "run", "update")
    assert len(updates) == 8 and all(row["optim/skipped"] == 1.0 for row in updates)
    assert "no opinion" in (tmp_path / "run" / "warnings.jsonl").read_text()


@pytest.mark.parametrize("method", ON_POLICY)
def test_rows_without_opinion_contribute_nothing(method: str, tmp_path: Path) -> None:
    assembly, rollouts, rewards = scored(method, tmp_path)
    unscored = torch.tensor([i % 3 == 0 for i in range(len(rollouts))])
    rewards = replace(rewards, scored=~unscored, per_completion=torch.where(unscored, 0.0, rewards.per_completion))
    batch = make_batch(assembly, rollouts, rewards)
    assert not bool(batch.loss_mask[unscored].any())
    assert not bool(batch.advantages[unscored].mul(batch.loss_mask[unscored]).any())
    assert_same_update(assembly, batch, batch.select(torch.nonzero(~unscored).squeeze(-1)))


@pytest.mark.parametrize("method", ON_POLICY)
def test_empty_completions_contribute_nothing(method: str, tmp_path: Path) -> None:
    assembly, rollouts, rewards = scored(method, tmp_path)
    lengths = rollouts.completion_lengths.clone()
    lengths[[1, 4]] = 0
    mask = torch.arange(rollouts.completion_ids.shape[1])[None, :] < lengths[:, None]
    rollouts = replace(
        rollouts,
        completion_lengths=lengths,
        completion_ids=rollouts.completion_ids * mask,
        logprobs=rollouts.logprobs * mask,
        behaviour_logprobs=rollouts.behaviour_logprobs * mask,
    )
    batch = make_batch(assembly, rollouts, rewards)
    assert all(bool(torch.isfinite(value).all()) for value in batch.tensors().values())
    assert_same_update(assembly, batch, batch.select(torch.nonzero(lengths > 0).squeeze(-1)))


def test_only_empty_completions_make_no_update(tmp_path: Path) -> None:
    for method in ON_POLICY:
        assembly, rollouts, rewards = scored(method, tmp_path / method)
        empty = replace(rollouts, completion_lengths=torch.zeros_like(rollouts.completion_lengths)).trimmed()
        batch = make_batch(assembly, empty, rewards)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert assembly.trainer.update(batch)["optim/skipped"] == 1.0


def scored(method: str, folder: Path) -> tuple[Assembly, Rollouts, RewardBatch]:
    """Completions of an untrained policy with rewards 0, 1, 2, ..."""
    assembly = assemble(Setting(method, False, "llama"), folder / "run", trainer={"micro_batch_size": 1})
    rollouts = sample(assembly)
    values = torch.arange(len(rollouts), dtype=torch.float32)
    rewards = RewardBatch(per_completion=values, per_token=None, scored=torch.ones(len(rollouts), dtype=torch.bool))
    return assembly, rollouts, rewards


def make_batch(assembly: Assembly, rollouts: Rollouts, rewards: RewardBatch) -> Any:
    with torch.no_grad():
        return assembly.algorithm.make_batch(assembly.scorer, assembly.reference_scorer, rollouts, rewards)


def assert_same_update(assembly: Assembly, whole: Batch, without: Batch) -> None:
    """The rows that ``without`` lacks have no influence on loss and gradient."""
    assembly.trainer.learning_rate = 0.0
    one, other = assembly.trainer.update(whole), assembly.trainer.update(without)
    assert one["optim/skipped"] == other["optim/skipped"] == 0.0
    assert one["optim/grad_norm"] == pytest.approx(other["optim/grad_norm"], rel=1e-5)
    for name in one:
        if name.startswith(("loss/", "policy/", "value/")):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6)
