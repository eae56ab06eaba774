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


@pytest.mark.parametrize(("reason", "expected"), [("stop", 2.0), ("length", -1.0)])
def test_the_score_stands_at_the_last_sampled_token_whatever_rewards_saw(reason: Any, expected: float) -> None:
    seen = replace(rollouts(), visible_lengths=torch.tensor([1, 1]), finish_reasons=(reason, "stop"))
    policy, config = Numbers(OLD), PPO(kl_coef=0.0, gamma=0.0, missing_eos=MissingEos(score=-1.0))
    batch: PolicyBatch = built(config).make_batch(policy, None, seen, rewards(2.0, 5.0))  # type: ignore[attr-defined]
    close(batch.advantages, [[0.0, 0.0, expected], [0.0, 5.0]])
    assert batch.loss_mask.tolist() == [[True, True, True], [True, True, False]]


def test_what_replaces_rewards_of_completions_without_end_is_known_outside() -> None:
    assert PPO.preset("lm-human-preferences/sentiment").score_without_end == -1.0
    assert PPO(missing_eos=MissingEos(penalty=1.0)).score_without_end is None


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


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_the_objective_of_a_collect_by_hand(place: Any) -> None:
    """The first completion was cut, and gets -3 for its 2; its sequence KL is -0.5, that of the second 0."""
    config = PPO(kl_coef=0.1, kl=KLControl(place=place), missing_eos=MissingEos(score=-3.0))
    for scored, effective, net in (((True, True), -2.0, -1.975), ((True, False), -3.0, -2.95)):
        method: Any = built(config)
        reward = rewards(2.0, -1.0 * scored[1], scored=scored)
        batch = method.make_batch(Numbers(OLD, VALUES), Numbers(REFERENCE), rollouts(), reward)
        metrics = method.collect_metrics(batch)
        assert metrics["reward/effective"] == pytest.approx(effective)
        assert metrics["reward/net"] == pytest.approx(net)
        assert metrics["policy/kl_coef_used"] == 0.1
    method = built(config)
    batch = method.make_batch(Numbers(OLD), Numbers(REFERENCE), rollouts(), rewards(0.0, 0.0, scored=(False, False)))
    assert not {"reward/effective", "reward/net"} & method.collect_metrics(batch).keys()


def test_moments_of_returns_and_old_values_by_hand() -> None:
    method: Any = built(PPO(kl_coef=0.0, lam=1.0))
    batch = method.make_batch(Numbers(OLD, VALUES), None, rollouts(), rewards(2.0, -1.0))  # returns 2 2 2 and -1 -1
    metrics = method.collect_metrics(batch)
    expected = {"return_mean": 0.8, "return_var": 14 / 5 - 0.64, "old_mean": 0.1, "old_var": 0.15 / 5 - 0.01}
    assert {name: metrics[f"value/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    # Errors 1.9, 1.8, 1.7, -1, -0.9, of mean 0.7.
    spread = (1.9**2 + 1.8**2 + 1.7**2 + 1 + 0.81) / 5 - 0.49
    assert metrics["value/explained_variance"] == pytest.approx(1 - spread / 2.16, rel=1e-5)


def test_pitfall_44_what_is_logged_pays_the_current_coefficient() -> None:
    method: Any = built(PPO(kl_coef=0.1, lam=1.0, kl=KLControl(target=1.0, horizon=1.0)))
    method.after_collect(CollectStats(samples=1, tokens=0, sequence_kl=100.0))  # 0.1 * 1.2
    batch = method.make_batch(Numbers(OLD), Numbers(REFERENCE), rollouts(), rewards(2.0, -1.0))
    metrics = method.collect_metrics(batch)
    assert metrics["policy/kl_coef_used"] == pytest.approx(0.12)
    assert metrics["reward/net"] == pytest.approx(0.5 + 0.12 * 0.25)
    # Without discount and critic the first return of a completion is what all of it earned, less what it paid.
    assert float(batch.returns[:, 0].mean()) == pytest.approx(metrics["reward/net"])


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
    k2 = [0.5 * math.log(ratio) ** 2 for ratio in (1.1, 1.5, 0.5, 0.9, 1.0)]
    assert ratio_of(ratios, "policy/approx_kl_k2") == pytest.approx(sum(k2) / 5, rel=1e-4)
    assert ratio_of(ratios, "value/mean") == pytest.approx(1.4 / 5)
    assert ratio_of(ratios, "value/error") == pytest.approx((0.25 + 0.04 + 0 + 1 + 0.36) / 5, rel=1e-5)
    assert ratio_of(ratios, "value/clip_fraction") == pytest.approx(2 / 5)
    assert ratio_of(ratios, "loss/total") == pytest.approx((-2.7 + 0.117 - 0.025) / 5, rel=1e-5)


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
    tasks = {"sentiment": 0.15, "descriptiveness": 0.15, "cnndm": 0.01, "tldr": 0.03}
    for task, coefficient in tasks.items():
        style = task in ("sentiment", "descriptiveness")
        preset = PPO.preset(f"lm-human-preferences/{task}")
        assert (preset.kl_coef, preset.kl.place, preset.kl.target) == (coefficient, "reward", 6.0 if style else None)
        assert preset.kl.horizon == 10_000 and preset.whiten_rewards is style and preset.whiten_advantages
        assert (preset.group_size, preset.num_epochs, preset.minibatch_size, preset.target_kl) == (1, 4, None, None)
        assert (preset.clip_low, preset.clip_high, preset.gamma, preset.lam) == (0.2, 0.2, 1.0, 0.95)
        critic = preset.critic
        assert (critic.coef, critic.clip, critic.rate, critic.bootstrap_truncated) == (0.1, 0.2, 1.0, False)
        assert (preset.missing_eos.score, preset.missing_eos.penalty, preset.entropy_coef) == (-1.0, 0.0, 0.0)
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
