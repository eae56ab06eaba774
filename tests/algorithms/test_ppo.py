from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from given_numbers import NEW, OLD, REFERENCE, Numbers, built, close, policy_batch, ratio_of, rewards, rollouts
from tropism.algorithms import PPO, Critic, KLControl, MissingEos
from tropism.algorithms.base import CollectStats
from tropism.types import PolicyBatch, RewardBatch

VALUES = torch.tensor([[0.1, 0.2, 0.3], [0.0, -0.1, 0.0]])
AFTER = torch.tensor([0.7, 9.0])


def make_batch(config: PPO, reward: RewardBatch, *, reference: Numbers | None = None) -> PolicyBatch:
    policy = Numbers(OLD, VALUES, AFTER)
    return built(config).make_batch(policy, reference, rollouts(), reward)  # type: ignore[attr-defined, no-any-return]


def test_advantages_and_returns_with_the_kl_in_the_reward() -> None:
    # Token rewards: -0.05, 0, 2 + 0.1 and -0.05, -1 + 0.05. Errors of the critic: 0.05, 0.1, 1.8 and -0.15, -0.85.
    batch = make_batch(PPO(kl_coef=0.1, lam=0.5), rewards(2.0, -1.0), reference=Numbers(REFERENCE))
    close(batch.advantages, [[0.55, 1.0, 1.8], [-0.575, -0.85]])
    close(batch.returns, [[0.65, 1.2, 2.1], [-0.575, -0.95]])
    assert torch.equal(batch.old_logprobs, OLD)
    assert torch.equal(batch.ref_logprobs, REFERENCE)
    assert torch.equal(batch.old_values, VALUES)


def test_discount() -> None:
    # 2 at the third token: discounted by 0.5 per token, less the value before each.
    batch = make_batch(PPO(kl_coef=0.0, gamma=0.5, lam=1.0), rewards(2.0, -1.0))
    close(batch.advantages, [[0.4, 0.8, 1.7], [-0.5, -0.9]])


def test_kl_in_the_loss_leaves_the_reward_alone() -> None:
    config = PPO(kl_coef=0.1, lam=1.0, kl=KLControl(place="loss"))
    batch = make_batch(config, rewards(2.0, -1.0), reference=Numbers(REFERENCE))
    close(batch.advantages, [[1.9, 1.8, 1.7], [-1.0, -0.9]])
    sums, _ = built(config).loss(Numbers(NEW, VALUES), batch)
    pairs = [(NEW[i, t], REFERENCE[i, t]) for i, n in ((0, 3), (1, 2)) for t in range(n)]
    assert float(sums["kl"]) == pytest.approx(0.1 * sum(0.5 * float(a - b) ** 2 for a, b in pairs), rel=1e-5)


def test_critic_stands_in_for_what_a_cut_completion_lacks() -> None:
    config = PPO(kl_coef=0.0, lam=0.5, critic=Critic(bootstrap_truncated=True))
    # The first completion was cut, so 0.7 follows its last token; nothing follows the second's.
    close(make_batch(config, rewards(2.0, -1.0)).advantages, [[0.75, 1.3, 2.4], [-0.55, -0.9]])


@pytest.mark.parametrize(
    ("missing", "expected"), [(MissingEos(penalty=0.5), 1.5), (MissingEos(score=-1.0), -1.0), (MissingEos(), 2.0)]
)
def test_missing_eos(missing: MissingEos, expected: float) -> None:
    batch = make_batch(PPO(kl_coef=0.0, lam=1.0, missing_eos=missing), rewards(2.0, -1.0))
    close(batch.returns, [[expected] * 3, [-1.0, -1.0]])


def test_missing_eos_score_replaces_rewards_per_token_too() -> None:
    per_token = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])
    config = PPO(kl_coef=0.0, lam=1.0, missing_eos=MissingEos(score=-1.0))
    close(make_batch(config, rewards(0.0, 0.0, per_token=per_token)).returns, [[-1.0, -1.0, -1.0], [9.0, 5.0]])


def test_rewards_per_token_reach_the_advantages() -> None:
    per_token = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])
    batch = make_batch(PPO(kl_coef=0.0, lam=1.0), rewards(10.0, 20.0, per_token=per_token))
    close(batch.returns, [[16.0, 15.0, 13.0], [29.0, 25.0]])


def test_golden_numbers_of_lm_human_preferences() -> None:
    """Advantages, returns and whitening for gamma 1 and lambda 0.95, worked out from OpenAI's code."""
    full = replace(rollouts(lengths=torch.tensor([3, 3])), logprobs=torch.zeros(2, 3))
    values = torch.tensor([[0.1, 0.2, 0.3], [0.0, -0.1, 0.4]])
    token_rewards = torch.tensor([[0.0, -0.1, 1.0], [0.05, 0.0, -1.0]])
    reward = rewards(0.0, 0.0, per_token=token_rewards)
    method = built(PPO(kl_coef=0.0, gamma=1.0, lam=0.95))
    batch = method.make_batch(Numbers(OLD, values), None, full, reward)  # type: ignore[attr-defined]
    close(batch.advantages, [[0.73175, 0.665, 0.7], [-0.8385, -0.83, -1.4]])
    close(batch.returns, [[0.83175, 0.865, 1.0], [-0.8385, -0.93, -1.0]])
    close(method.prepare(batch).advantages, [[1.013846, 0.938123, 0.977828], [-0.767487, -0.757844, -1.404467]])
    # With gamma 0 and no values the advantages are the whitened rewards themselves.
    method = built(PPO(kl_coef=0.0, gamma=0.0, whiten_rewards=True))
    batch = method.make_batch(Numbers(OLD), None, full, reward)  # type: ignore[attr-defined]
    close(batch.advantages, [[0.006057, -0.166627, 1.732899], [0.092399, 0.006057, -1.720785]])


def test_whitening_ignores_padding_and_unscored_rows() -> None:
    advantages = torch.tensor([[1.0, 3.0, 100.0], [5.0, 7.0, 100.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    batch = policy_batch(advantages=advantages, loss_mask=mask)
    close(built(PPO()).prepare(batch).advantages, [[-1.0, 1.0], []])
    assert built(PPO(whiten_advantages=False)).prepare(batch) is batch


def test_loss_against_hand_numbers() -> None:
    batch = policy_batch(
        advantages=torch.tensor([[1.0, 1.0, -1.0], [-2.0, 3.0, 9.0]]),
        old_values=VALUES,
        returns=torch.tensor([[1.0, 0.0, 0.3], [1.0, 1.0, 9.0]]),
    )
    values = torch.tensor([[0.5, 0.2, 0.3], [0.0, 0.4, 9.0]])
    method = built(PPO(kl_coef=0.1, critic=Critic(coef=0.1, clip=0.2), entropy_coef=0.01))
    sums, ratios = method.loss(Numbers(NEW, values), batch)
    # -1.1, -1.2 (clipped), 0.8 (clipped), 1.8, -3
    assert float(sums["policy"]) == pytest.approx(-2.7, rel=1e-5)
    # Halves of 0.49 (clipped), 0.04, 0, 1, 0.81 (clipped)
    assert float(sums["value"]) == pytest.approx(0.1 * 1.17, rel=1e-5)
    assert float(sums["entropy"]) == pytest.approx(-0.01 * 5 * 0.5, rel=1e-5)
    assert "kl" not in sums
    assert method.weight(batch) == {"policy": 5.0, "value": 5.0, "kl": 5.0, "entropy": 5.0}
    assert ratio_of(ratios, "policy/clip_fraction") == pytest.approx(2 / 5)
    assert ratio_of(ratios, "policy/ratio") == pytest.approx((1.1 + 1.5 + 0.5 + 0.9 + 1.0) / 5)
    assert ratio_of(ratios, "policy/entropy") == pytest.approx(0.5)
    log_ratios = [float(NEW[i, t] - REFERENCE[i, t]) for i, n in ((0, 3), (1, 2)) for t in range(n)]
    assert ratio_of(ratios, "policy/ref_kl") == pytest.approx(sum(log_ratios) / 5, rel=1e-4)
    k3 = [math.exp(-d) + d - 1 for d in log_ratios]
    assert ratio_of(ratios, "policy/ref_kl_k3") == pytest.approx(sum(k3) / 5, rel=1e-4)


def test_entropy_has_a_gradient_only_where_it_is_a_bonus() -> None:
    for coefficient, wanted in ((0.0, False), (0.1, True)):
        policy = Numbers(NEW, VALUES)
        built(PPO(entropy_coef=coefficient)).loss(policy, policy_batch())
        assert policy.asked["entropy_gradient"] is wanted


@pytest.mark.parametrize(("kl", "expected"), [(12.0, 0.151536), (6.6, 0.150768), (3.0, 0.148464), (-1.0, 0.148464)])
def test_adaptive_coefficient(kl: float, expected: float) -> None:
    method = built(PPO(kl_coef=0.15, kl=KLControl(target=6.0, horizon=10_000)))
    metrics = method.after_collect(CollectStats(samples=512, tokens=0, sequence_kl=kl))
    assert metrics["policy/kl_coef"] == pytest.approx(expected, abs=1e-9)
    restored = built(PPO(kl_coef=0.15))
    restored.load_state_dict(method.state_dict())
    assert restored.state_dict() == method.state_dict() != built(PPO(kl_coef=0.15)).state_dict()


def test_adapted_coefficient_is_the_one_that_penalises() -> None:
    method = built(PPO(kl_coef=0.1, lam=1.0, kl=KLControl(target=1.0, horizon=1.0)))
    method.after_collect(CollectStats(samples=1, tokens=0, sequence_kl=100.0))  # 0.1 * 1.2
    batch = method.make_batch(Numbers(OLD), Numbers(REFERENCE), rollouts(), rewards(0.0, 0.0))  # type: ignore[attr-defined]
    close(batch.returns, [[0.06, 0.12, 0.12], [0.0, 0.06]])


def test_fixed_coefficient_stays() -> None:
    method = built(PPO(kl_coef=0.3))
    assert method.after_collect(CollectStats(samples=512, tokens=0, sequence_kl=50.0)) == {"policy/kl_coef": 0.3}


def test_presets_carry_the_numbers_of_their_sources() -> None:
    sentiment = PPO.preset("lm-human-preferences/sentiment")
    assert (sentiment.kl_coef, sentiment.kl.target, sentiment.kl.horizon) == (0.15, 6.0, 10_000)
    assert (sentiment.num_epochs, sentiment.critic.coef, sentiment.critic.clip) == (4, 0.1, 0.2)
    assert (sentiment.clip_low, sentiment.clip_high, sentiment.gamma, sentiment.lam) == (0.2, 0.2, 1.0, 0.95)
    assert sentiment.whiten_rewards and sentiment.missing_eos.score == -1.0
    for name, coefficient in (("cnndm", 0.01), ("tldr", 0.03)):
        preset = PPO.preset(f"lm-human-preferences/{name}")
        assert (preset.kl_coef, preset.kl.target, preset.whiten_rewards) == (coefficient, None, False)
    assert PPO.preset("trl").kl_coef == 0.05
    assert PPO.preset("trlx", gamma=0.9).gamma == 0.9


@pytest.mark.parametrize(
    "fields",
    [{"gamma": 1.1}, {"lam": -0.1}, {"clip_low": -1.0}, {"kl_coef": -0.1}, {"num_epochs": 0}, {"minibatch_size": 0}],
)
def test_impossible_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        PPO(**fields)
    impossible: list[dict[str, Any]] = [{"place": "nowhere"}, {"target": 0.0}, {"horizon": 0.0}]
    for bad in impossible:
        with pytest.raises(ValueError, match=next(iter(bad))):
            KLControl(**bad)
