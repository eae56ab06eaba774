"""With importance weights the expected gradient is that of the policy, whatever sampled: every case is enumerated."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from given_numbers import MASK, NEW, Numbers, built, policy_batch, ratio_of
from tropism.algorithms import GRPO, PPO, RLOO, KLControl
from tropism.algorithms.base import OnPolicyConfig
from tropism.training.correction import sampling_correction
from tropism.types import RewardBatch, Rollouts

SYMBOLS, KL_COEF = 3, 0.3


class Task:
    """Completions of ``length`` tokens, each drawn from a distribution of its place; pairs of them are a group."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(length)

        def table() -> Tensor:
            return torch.randn(length, SYMBOLS, generator=generator, dtype=torch.float64)

        self.theta = table().requires_grad_()
        self.behaviour, self.reference = table().log_softmax(-1), table().log_softmax(-1)
        self.sequences = torch.tensor(list(itertools.product(range(SYMBOLS), repeat=length)))
        self.places = torch.arange(length)
        self.rewards = torch.randn(len(self.sequences), generator=generator, dtype=torch.float64)

    def of(self, table: Tensor) -> Tensor:
        """[sequences, length] log-probs of every sequence's tokens."""
        return table[self.places, self.sequences]

    def exact(self, kl_coef: float) -> Tensor:
        """Gradient of E_pi[r] - kl_coef * KL(pi || reference), by autograd through the sum over all sequences."""
        logprobs = self.of(self.theta.log_softmax(-1)).sum(-1)
        value = self.rewards - kl_coef * (logprobs - self.of(self.reference).sum(-1))
        (gradient,) = torch.autograd.grad((logprobs.exp() * value).sum(), self.theta)
        return gradient

    def expected(self, config: OnPolicyConfig, *, cap: float | None = math.inf) -> Tensor:
        """Minus the gradient of the method's own loss per completion, averaged over every pair that mu may sample."""
        method: Any = built(config)
        policy = self.theta.log_softmax(-1)
        total = torch.zeros_like(self.theta)
        sampled = self.of(self.behaviour)
        for pair in itertools.product(range(len(self.sequences)), repeat=2):
            rows = torch.tensor(pair)
            logprobs = self.of(policy)[rows]
            rollouts = self.rollouts(rows, logprobs.detach())
            rewards = RewardBatch(
                per_completion=self.rewards[rows], per_token=None, scored=torch.ones(2, dtype=torch.bool)
            )
            zeros = torch.zeros_like(logprobs)
            known = Numbers(logprobs, value=zeros)
            batch = method.make_batch(known, Numbers(self.of(self.reference)[rows]), rollouts, rewards)
            _, weights = sampling_correction(rollouts, sampled[rows], action=config.action, cap=cap)
            batch = method.prepare(replace(batch, importance_weights=weights))
            sums, _ = method.loss(known, batch)
            loss = sum(value for name, value in sums.items() if name != "value") / 2
            (gradient,) = torch.autograd.grad(loss, self.theta, retain_graph=True)
            total -= float(sampled[rows].sum().exp()) * gradient
        return total

    def rollouts(self, rows: Tensor, logprobs: Tensor) -> Rollouts:
        ones = torch.ones(2, dtype=torch.long)
        return Rollouts(
            prompt_ids=ones[:, None],
            prompt_lengths=ones,
            completion_ids=self.sequences[rows],
            completion_lengths=ones * len(self.places),
            logprobs=logprobs,
            behaviour_logprobs=logprobs,
            finish_reasons=("length", "length"),
        )


G2: dict[str, Any] = {"group_size": 2, "kl_coef": KL_COEF}
NO_CRITIC: dict[str, Any] = {"lam": 1.0, "whiten_advantages": False}
CASES: dict[str, tuple[OnPolicyConfig, float, float]] = {
    # Method, share of the exact gradient (a group's mean includes the completion itself), tokens per completion.
    "rloo": (RLOO(**G2), 1.0, 2),
    "gspo": (GRPO(**{**G2, "kl_coef": 0.0}, ratio="sequence", scale="none"), 0.5, 2),
    "grpo-k1": (GRPO(**G2, kl_estimator="k1", scale="none"), 0.5, 1),
    "grpo": (GRPO(**{**G2, "kl_coef": 0.0}, scale="none"), 0.5, 1),
    "cispo": (GRPO(**{**G2, "kl_coef": 0.0}, ratio="cispo", scale="none"), 0.5, 1),
    "ppo": (PPO(**G2, **NO_CRITIC), 1.0, 1),
    "ppo-kl-in-the-loss": (PPO(**G2, **NO_CRITIC, kl=KLControl(place="loss")), 1.0, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_expected_gradient_is_exact(name: str) -> None:
    """Methods whose action is the completion also with two tokens, the others where one token is the completion."""
    config, share, length = CASES[name]
    task = Task(int(length))
    exact = share * task.exact(config.kl_coef)
    torch.testing.assert_close(task.expected(config), exact, rtol=1e-5, atol=1e-7)
    scale = float(exact.abs().max())
    assert float((task.expected(config, cap=None) - exact).abs().max()) > 0.05 * scale, "the task has no mismatch"
    assert float((task.expected(config, cap=1.1) - exact).abs().max()) > 0.01 * scale, "the cap is never reached"


def test_the_kl_in_the_loss_is_weighted_too() -> None:
    """k2's gradient is that of KL(pi || reference), as an expectation over tokens of pi."""
    task = Task(1)
    config = GRPO(**G2, kl_estimator="k2", scale="none")
    with_kl = task.expected(config)
    without = task.expected(replace(config, kl_coef=0.0))
    torch.testing.assert_close(with_kl - without, task.exact(KL_COEF) - task.exact(0.0), rtol=1e-9, atol=1e-12)


WEIGHTS = torch.tensor([[0.5, 2.0, 1.0], [1.5, 0.2, 9.0]])
ADVANTAGES = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, 9.0]])


def test_weights_scale_each_tokens_loss() -> None:
    """Token losses before weighting: -1.1, -1.2 (clipped), -0.5 and 1.8, 2."""
    batch = policy_batch(advantages=ADVANTAGES, importance_weights=WEIGHTS * MASK)
    expected = -1.1 * 0.5 - 1.2 * 2.0 - 0.5 + 1.8 * 1.5 + 2.0 * 0.2
    for config in (GRPO(group_size=2, kl_coef=0.0), PPO(whiten_advantages=False)):
        method = built(config)
        sums, ratios = method.loss(Numbers(NEW), batch)
        assert float(sums["policy"]) == pytest.approx(expected, rel=1e-5)
        # They change neither what the sum is divided by nor the numbers about the ratio.
        assert method.weight(batch)["policy"] == 5.0
        assert ratio_of(ratios, "policy/clip_fraction") == pytest.approx(1 / 5)
        assert ratio_of(ratios, "policy/ratio") == pytest.approx(1.0)


def test_whitening_does_not_take_the_weights_back() -> None:
    method: Any = built(PPO())
    plain = policy_batch(advantages=ADVANTAGES)
    batch = replace(plain, importance_weights=3.0 * MASK)
    one = method.loss(Numbers(NEW), method.prepare(plain))[0]["policy"]
    assert float(method.loss(Numbers(NEW), method.prepare(batch))[0]["policy"]) == pytest.approx(3 * float(one))


def test_rloo_weighs_whole_completions() -> None:
    weights = torch.tensor([[2.0] * 3, [0.5] * 3]) * MASK
    batch = policy_batch(
        advantages=torch.tensor([[3.0] * 3, [-3.0, -3.0, 9.0]]), importance_weights=weights, old_logprobs=NEW
    )
    sums, _ = built(RLOO(group_size=2)).loss(Numbers(NEW), batch)
    assert float(sums["policy"]) == pytest.approx(-3.0 * 2.0 + 3.0 * 0.5)
