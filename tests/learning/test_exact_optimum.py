"""PPO, GRPO and RLOO come within 5 % of the exact optimum of their objective; with a mistake in it they do not."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from enumerable_task import (
    BETA,
    REWARD,
    SEQUENCES,
    assemble_task,
    model,
    objective,
    optimum,
    sequence_logprobs,
    share_of_optimum,
)
from tropism.algorithms import GRPO, PPO, RLOO, Critic
from tropism.algorithms.base import OnPolicyConfig
from tropism.types import RewardBatch

pytestmark = pytest.mark.learning

ENOUGH = 0.95
STEPS, RATE, SAMPLES = 64, 1.5e-3, 64

# Unscaled, because only then is the expected gradient that of J.
METHODS: dict[str, OnPolicyConfig] = {
    "ppo": PPO(group_size=SAMPLES, kl_coef=BETA, num_epochs=2),
    "grpo": GRPO(group_size=SAMPLES, kl_coef=BETA, scale="none", kl_estimator="k1", normalisation="constant"),
    "rloo": RLOO(group_size=SAMPLES, kl_coef=BETA),
}
UNWHITENED = PPO(
    group_size=SAMPLES, kl_coef=BETA, num_epochs=2, lam=1.0, whiten_advantages=False, critic=Critic(coef=0.5)
)


def reached(algorithm: OnPolicyConfig, folder: Path) -> float:
    """The share of the way to the optimum."""
    share, _, _ = share_of_optimum(assemble_task(algorithm, folder, steps=STEPS, rate=RATE))
    return share


def test_the_kl_matters_in_this_task() -> None:
    """Neither the reference nor always giving the best completion is anywhere near the optimum."""
    ref = sequence_logprobs(model())
    start, best = objective(ref, ref), optimum(ref)
    assert len(SEQUENCES) == 40
    greedy = max(REWARD[ids] + BETA * logprob for ids, logprob in zip(SEQUENCES, ref, strict=True))
    assert best - start > 0.5
    assert (greedy - start) / (best - start) < 0.7
    # The formula of the optimum, against the objective of the policy that is said to reach it.
    weights = [math.exp(logprob + REWARD[ids] / BETA) for ids, logprob in zip(SEQUENCES, ref, strict=True)]
    assert objective([math.log(w / sum(weights)) for w in weights], ref) == pytest.approx(best)


@pytest.mark.parametrize("name", [*METHODS, "ppo-unwhitened"])
def test_within_five_percent_of_the_optimum(name: str, tmp_path: Path) -> None:
    algorithm = METHODS.get(name, UNWHITENED)
    share, value, best = share_of_optimum(assemble_task(algorithm, tmp_path, steps=STEPS, rate=RATE))
    assert share >= ENOUGH
    assert value >= ENOUGH * best


@pytest.mark.parametrize("name", METHODS)
def test_fails_with_the_sign_of_the_kl_flipped(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"tropism.algorithms.{name}.kl_k1", lambda own, ref: ref - own)
    assert reached(METHODS[name], tmp_path) < ENOUGH


@pytest.mark.parametrize("name", METHODS)
def test_fails_without_the_kl(name: str, tmp_path: Path) -> None:
    assert reached(replace(METHODS[name], kl_coef=0.0), tmp_path) < ENOUGH


@pytest.mark.parametrize("name", METHODS)
def test_fails_with_the_score_of_the_previous_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = assemble_task(METHODS[name], tmp_path, steps=STEPS, rate=RATE)
    make_batch = assembly.algorithm.make_batch

    def shifted(policy: Any, reference: Any, rollouts: Any, rewards: RewardBatch) -> Any:
        return make_batch(policy, reference, rollouts, replace(rewards, per_completion=rewards.per_completion.roll(1)))

    monkeypatch.setattr(assembly.algorithm, "make_batch", shifted)
    assert share_of_optimum(assembly)[0] < ENOUGH


@pytest.mark.parametrize("name", METHODS)
def test_fails_with_shifted_logprobs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training forward reads the state after a token, not the one before it."""
    assembly = assemble_task(METHODS[name], tmp_path, steps=STEPS, rate=RATE)
    hidden_states = assembly.policy.rows.hidden_states

    def shifted(rows: Any) -> torch.Tensor:
        return hidden_states(rows).roll(-1, dims=0)

    monkeypatch.setattr(assembly.policy.rows, "hidden_states", shifted)
    assert share_of_optimum(assembly)[0] < ENOUGH


def test_ppo_fails_with_the_score_on_the_first_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def misplaced(self: RewardBatch, lengths: torch.Tensor, width: int) -> torch.Tensor:
        return torch.nn.functional.pad(self.per_completion[:, None], (0, width - 1))

    monkeypatch.setattr(RewardBatch, "by_token", misplaced)
    assert reached(METHODS["ppo"], tmp_path) < ENOUGH
