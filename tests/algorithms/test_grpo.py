from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from given_numbers import NEW, OLD, RATIOS, REFERENCE, Numbers, built, close, policy_batch, ratio_of, rewards, rollouts
from tropism.algorithms import GRPO
from tropism.types import PolicyBatch, RewardBatch, Rollouts

ADVANTAGES = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, 9.0]])
PLAIN: dict[str, Any] = {"group_size": 2, "kl_coef": 0.0}


def make_batch(config: GRPO, reward: RewardBatch) -> PolicyBatch:
    reference = Numbers(REFERENCE) if config.needs_reference else None
    return built(config).make_batch(Numbers(OLD), reference, rollouts(), reward)  # type: ignore[attr-defined, no-any-return]


def test_advantages_by_scale() -> None:
    # Mean 0.5, unbiased deviation 3 / sqrt(2).
    scaled = 1.5 / (3 / math.sqrt(2) + 1e-4)
    batch = make_batch(GRPO(**PLAIN), rewards(2.0, -1.0))
    close(batch.advantages, [[scaled] * 3, [-scaled] * 2])
    close(make_batch(GRPO(**PLAIN, scale="none"), rewards(2.0, -1.0)).advantages, [[1.5] * 3, [-1.5] * 2])
    assert torch.equal(batch.ref_logprobs, OLD)


def test_batch_scale_is_over_all_groups() -> None:
    four = Rollouts.concat([rollouts(), rollouts()])
    reward = RewardBatch(
        per_completion=torch.tensor([2.0, -1.0, 5.0, 5.0]), per_token=None, scored=torch.ones(4, dtype=torch.bool)
    )
    batch = built(GRPO(**PLAIN, scale="batch")).make_batch(Numbers(OLD), None, four, reward)  # type: ignore[attr-defined]
    scaled = 1.5 / (math.sqrt(24.75 / 3) + 1e-4)
    close(batch.advantages, [[scaled] * 3, [-scaled] * 2, [0.0] * 3, [0.0] * 2])


def test_k1_is_part_of_the_reward() -> None:
    config = GRPO(group_size=2, kl_coef=0.1, kl_estimator="k1", scale="none")
    # Sequence log-ratios -0.5 and 0: totals 2.05 and -1.
    batch = make_batch(config, rewards(2.0, -1.0))
    close(batch.advantages, [[1.525] * 3, [-1.525] * 2])
    assert set(built(config).loss(Numbers(NEW), batch)[0]) == {"policy"}


PER_TOKEN = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])


def test_rewards_per_token_count_for_the_tokens_up_to_them() -> None:
    batch = make_batch(GRPO(**PLAIN, scale="none"), rewards(0.0, 10.0, per_token=PER_TOKEN))
    # To go: 6, 5, 3 and 19, 15 (10 after its end); at each place less the mean of both.
    close(batch.advantages, [[-6.5, -5.0, -3.5], [6.5, 5.0]])


@pytest.mark.parametrize("change", [{"credit": "completion"}, {"ratio": "sequence"}])
def test_rewards_per_token_are_summed_where_whole_completions_are_judged(change: dict[str, Any]) -> None:
    batch = make_batch(GRPO(**PLAIN, scale="none", **change), rewards(0.0, 10.0, per_token=PER_TOKEN))
    close(batch.advantages, [[-6.5] * 3, [6.5] * 2])


def test_cut_and_unscored_completions_are_not_learned_from() -> None:
    masked = make_batch(GRPO(**PLAIN, mask_truncated=True), rewards(2.0, -1.0))
    assert masked.loss_mask.tolist() == [[False] * 3, [True, True, False]]
    unscored = make_batch(GRPO(**PLAIN), rewards(2.0, 0.0, scored=(True, False)))
    assert unscored.loss_mask.tolist() == [[True] * 3, [False] * 3]
    assert not bool(unscored.advantages.any())  # the only scored one of its group has nothing to be compared with


@pytest.mark.parametrize(
    ("normalisation", "total", "weight"),
    # Token losses -1.1, -1.2 (clipped), -0.5 and 1.8, 2.
    [("token", 1.0, 5.0), ("sequence", -2.8 / 3 + 3.8 / 2, 2.0), ("constant", 1.0, 8.0)],
)
def test_normalisation(normalisation: Any, total: float, weight: float) -> None:
    method, batch = built(GRPO(**PLAIN, normalisation=normalisation)), policy_batch(advantages=ADVANTAGES)
    sums, ratios = method.loss(Numbers(NEW), batch)
    assert float(sums["policy"]) == pytest.approx(total, rel=1e-5)
    assert method.weight(batch)["policy"] == weight
    assert ratio_of(ratios, "policy/clip_fraction") == pytest.approx(1 / 5)


def test_clip_higher() -> None:
    method, batch = built(GRPO(**PLAIN, clip_low=0.2, clip_high=0.28)), policy_batch(advantages=ADVANTAGES)
    assert float(method.loss(Numbers(NEW), batch)[0]["policy"]) == pytest.approx(-1.1 - 1.28 - 0.5 + 3.8, rel=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_kl_in_the_loss(estimator: Any, normalisation: Any) -> None:
    config = GRPO(group_size=2, kl_coef=0.3, kl_estimator=estimator, normalisation=normalisation)
    sums, _ = built(config).loss(Numbers(NEW), policy_batch(advantages=ADVANTAGES))
    expected = 0.0
    for row, length in ((0, 3), (1, 2)):
        for t in range(length):
            d = float(NEW[row, t] - REFERENCE[row, t])
            k = 0.5 * d * d if estimator == "k2" else math.exp(-d) + d - 1
            expected += 0.3 * k / (length if normalisation == "sequence" else 1)
    assert float(sums["kl"]) == pytest.approx(expected, rel=1e-5)


def test_gspo_has_one_ratio_per_completion() -> None:
    config = GRPO(**PLAIN, ratio="sequence", normalisation="sequence", clip_low=0.01, clip_high=0.01)
    sums, ratios = built(config).loss(Numbers(NEW), policy_batch(advantages=ADVANTAGES))
    # Ratios 0.825^(1/3), inside the bound that matters for A > 0, and 0.9^(1/2), below 0.99 with A < 0.
    assert float(sums["policy"]) == pytest.approx(-(0.825 ** (1 / 3)) + 2 * 0.99, rel=1e-5)
    # The clip of the second completion, not the three tokens whose own ratios lie outside.
    assert ratio_of(ratios, "policy/clip_fraction") == pytest.approx(2 / 5)


def test_cispo_caps_the_weight_and_every_token_learns() -> None:
    logprobs = NEW.clone().requires_grad_()
    sums, ratios = built(GRPO(**PLAIN, ratio="cispo", clip_high=0.2)).loss(
        Numbers(logprobs), policy_batch(advantages=ADVANTAGES)
    )
    weights = [[min(ratio, 1.2) for ratio in row] for row in RATIOS]
    expected = -sum(
        weight * float(ADVANTAGES[i, t]) * float(NEW[i, t])
        for i, row in enumerate(weights)
        for t, weight in enumerate(row)
    )
    assert float(sums["policy"].detach()) == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(sums["policy"], logprobs)
    close(gradient, [[-1.1, -1.2, -0.5], [1.8, 2.0]])
    assert ratio_of(ratios, "policy/clip_fraction") == pytest.approx(1 / 5)


def test_presets_carry_the_numbers_of_their_papers() -> None:
    dr, dapo, gspo, cispo = (GRPO.preset(name) for name in ("dr_grpo", "dapo", "gspo", "cispo"))
    assert (dr.scale, dr.normalisation, dr.kl_coef) == ("none", "constant", 0.0)
    assert (dapo.clip_low, dapo.clip_high, dapo.normalisation, dapo.mask_truncated) == (0.2, 0.28, "token", True)
    assert (gspo.ratio, gspo.clip_low, gspo.clip_high, gspo.normalisation) == ("sequence", 3e-4, 4e-4, "sequence")
    assert (cispo.ratio, cispo.normalisation, cispo.kl_coef) == ("cispo", "token", 0.0)
    assert (GRPO.preset("deepseekmath").group_size, GRPO.preset("deepseekmath").kl_coef) == (64, 0.04)
    for name in GRPO.presets:
        config = GRPO.preset(name)
        batch = policy_batch(advantages=ADVANTAGES)
        assert all(math.isfinite(float(value)) for value in built(config).loss(Numbers(NEW), batch)[0].values())


@pytest.mark.parametrize("fields", [{"group_size": 1}, {"clip_high": -0.1}, {"kl_coef": -1.0}])
def test_impossible_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        GRPO(**fields)
