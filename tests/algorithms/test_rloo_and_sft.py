from __future__ import annotations

import pytest
import torch

from given_numbers import (
    LENGTHS,
    MASK,
    NEW,
    OLD,
    REFERENCE,
    Numbers,
    built,
    close,
    policy_batch,
    ratio_of,
    rewards,
    rollouts,
)
from tropism.algorithms import ALGORITHMS, RLOO, SFT
from tropism.algorithms.base import Signal
from tropism.errors import ConfigError
from tropism.types import DemonstrationBatch

ADVANTAGES = torch.tensor([[3.05, 3.05, 3.05], [-3.05, -3.05, 9.0]])


def test_rloo_advantages_and_loss() -> None:
    method = built(RLOO(group_size=2, kl_coef=0.1))
    # Sequence log-ratios -0.5 and 0: totals 2.05 and -1, each against the other.
    batch = method.make_batch(Numbers(OLD), Numbers(REFERENCE), rollouts(), rewards(2.0, -1.0))  # type: ignore[attr-defined]
    close(batch.advantages, [[3.05] * 3, [-3.05] * 2])
    sums, _ = method.loss(Numbers(NEW), batch)
    # Ratios of whole completions: 1.1 * 1.5 * 0.5 and 0.9.
    assert float(sums["policy"]) == pytest.approx(-3.05 * 0.825 + 3.05 * 0.9, rel=1e-4)
    assert method.weight(batch) == {"policy": 2.0}


def test_rloo_clips_the_ratio_of_a_completion() -> None:
    method = built(RLOO(group_size=2, clip_low=0.05, clip_high=0.2))
    sums, ratios = method.loss(Numbers(NEW), policy_batch(advantages=ADVANTAGES))
    assert float(sums["policy"]) == pytest.approx(-3.05 * 0.825 + 3.05 * 0.95, rel=1e-4)
    assert ratio_of(ratios, "policy/clip_fraction") == pytest.approx(2 / 5)


def test_rloo_gradient_before_an_update_is_that_of_reinforce() -> None:
    logprobs = OLD.clone().requires_grad_()
    sums, _ = built(RLOO(group_size=2)).loss(Numbers(logprobs), policy_batch(advantages=ADVANTAGES))
    (gradient,) = torch.autograd.grad(sums["policy"], logprobs)
    close(gradient, [[-3.05] * 3, [3.05] * 2])


def test_rloo_presets() -> None:
    assert (RLOO.preset("paper").group_size, RLOO.preset("paper").kl_coef) == (4, 0.03)
    assert (RLOO.preset("trl").group_size, RLOO.preset("trl").kl_coef) == (2, 0.05)
    with pytest.raises(ValueError, match="group_size"):
        RLOO(group_size=1)


def test_sft_loss_is_the_sum_over_learned_tokens() -> None:
    mask = MASK.clone()
    mask[0, 0] = False
    batch = DemonstrationBatch(
        prompt_ids=torch.tensor([[5, 6], [0, 7]]),
        prompt_lengths=torch.tensor([2, 1]),
        completion_ids=torch.tensor([[8, 9, 8], [9, 2, 0]]),
        completion_lengths=LENGTHS,
        loss_mask=mask,
    )
    method, policy = built(SFT()), Numbers(OLD)
    sums, ratios = method.loss(policy, batch)
    assert float(sums["nll"]) == pytest.approx(0.5 + 2.0 + 0.25 + 1.5)
    assert method.weight(batch) == {"nll": 4.0}
    assert policy.asked["want"] == {"logprobs"} and policy.asked["mask"] is mask
    assert ratios == {}
    assert built(SFT()).state_dict() == {}


def test_target_kl_ends_the_collect() -> None:
    method = built(RLOO(target_kl=0.1))
    assert method.after_step(None, {"policy/approx_kl": 0.11}) is Signal.END_COLLECT
    assert method.after_step(None, {"policy/approx_kl": 0.09}) is Signal.CONTINUE
    assert method.after_step(None, {}) is Signal.CONTINUE
    assert built(RLOO()).after_step(None, {"policy/approx_kl": 99.0}) is Signal.CONTINUE


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_preset_builds_and_an_unknown_one_names_them(name: str) -> None:
    method = ALGORITHMS[name]
    for preset in method.presets:
        built(method.preset(preset))
    with pytest.raises(ConfigError, match="its presets are: "):
        method.preset("nope")
    assert method.name == name
