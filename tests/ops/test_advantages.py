"""GAE, group advantages and leave-one-out advantages."""

from __future__ import annotations

import math
import statistics
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from tropism.ops import (
    GROUP_STD_EPSILON,
    gae,
    group_advantages,
    group_advantages_per_token,
    leave_one_out_advantages,
    rewards_to_go,
)

REWARDS = tensor([[0.0, -0.1, 1.0], [0.05, 0.0, -1.0]])
VALUES = tensor([[0.1, 0.2, 0.3], [0.0, -0.1, 0.4]])
FULL = torch.ones(2, 3, dtype=torch.bool)


def mask_of(lengths: list[int], width: int) -> Tensor:
    rows = [[t < length for t in range(width)] for length in lengths]
    return tensor(rows, dtype=torch.bool).view(len(lengths), width)


def slow_gae(
    rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, lam: float, bootstrap: list[float]
) -> list[list[float]]:
    """The defining sum over all later errors, one token at a time."""
    width = rewards.shape[1]
    result = [[0.0] * width for _ in lengths]
    for b, length in enumerate(lengths):
        following = [*values[b, :length].tolist(), bootstrap[b]]
        errors = [rewards[b, t].item() + gamma * following[t + 1] - following[t] for t in range(length)]
        for t in range(length):
            result[b][t] = sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, length))
    return result


def test_gae_golden_numbers_of_openai() -> None:
    advantages = gae(REWARDS, VALUES, FULL, gamma=1.0, lam=0.95)
    expected = tensor([[0.73175, 0.665, 0.7], [-0.8385, -0.83, -1.4]])
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    returns = tensor([[0.83175, 0.865, 1.0], [-0.8385, -0.93, -1.0]])
    torch.testing.assert_close(advantages + VALUES, returns, atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_gae_equals_the_defining_sum(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    width = max(lengths) + data.draw(st.integers(0, 2))
    numbers = st.floats(-3, 3, width=32)
    size = len(lengths) * width
    rows = [data.draw(st.lists(numbers, min_size=size, max_size=size)) for _ in range(2)]
    rewards, values = (tensor(row).view(len(lengths), width) for row in rows)
    gamma, lam = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
    bootstrap = data.draw(st.lists(numbers, min_size=len(lengths), max_size=len(lengths)))
    found = gae(rewards, values, mask_of(lengths, width), gamma=gamma, lam=lam, bootstrap=tensor(bootstrap))
    expected = tensor(slow_gae(rewards, values, lengths, gamma, lam, bootstrap)).view(len(lengths), width)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gae_bootstrap_stands_after_the_last_real_token() -> None:
    zeros, bootstrap = torch.zeros(2, 3), tensor([8.0, 8.0])
    found = gae(zeros, zeros, mask_of([1, 3], 3), gamma=0.5, lam=1.0, bootstrap=bootstrap)
    assert found.tolist() == [[4.0, 0.0, 0.0], [1.0, 2.0, 4.0]]


def test_gae_without_discount_is_the_return_less_the_value() -> None:
    found = gae(REWARDS, VALUES, mask_of([2, 1], 3), gamma=1.0, lam=1.0)
    torch.testing.assert_close(found, tensor([[-0.1 - 0.1, -0.1 - 0.2, 0.0], [0.05, 0.0, 0.0]]))


def test_gae_lam_zero_is_the_one_step_error() -> None:
    found = gae(REWARDS, VALUES, FULL, gamma=1.0, lam=0.0)
    torch.testing.assert_close(found, tensor([[0.1, 0.0, 0.7], [-0.05, 0.5, -1.4]]))


def test_gae_ignores_what_is_masked() -> None:
    rewards, values, mask = REWARDS.clone(), VALUES.clone(), mask_of([2, 0], 3)
    clean = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    rewards[~mask], values[~mask] = math.nan, math.inf
    assert torch.equal(gae(rewards, values, mask, gamma=1.0, lam=0.95), clean)
    assert clean[1].tolist() == [0.0, 0.0, 0.0]


def test_gae_widths_zero_and_half_precision() -> None:
    empty = torch.empty(2, 0)
    assert gae(empty, empty, empty.bool(), gamma=1.0, lam=1.0, bootstrap=torch.ones(2)).shape == (2, 0)
    found = gae(REWARDS.bfloat16(), VALUES.bfloat16(), FULL, gamma=1.0, lam=0.95)
    assert found.dtype == torch.float32


def test_gae_does_not_change_its_arguments() -> None:
    rewards, values, bootstrap = REWARDS.clone(), VALUES.clone(), torch.ones(2)
    gae(rewards, values, FULL, gamma=0.9, lam=0.9, bootstrap=bootstrap)
    assert torch.equal(rewards, REWARDS)
    assert torch.equal(values, VALUES)
    assert torch.equal(bootstrap, torch.ones(2))


def test_gae_refusals() -> None:
    with pytest.raises(ValueError, match=r"rewards \[2, 3\], values \[2, 1\]"):
        gae(REWARDS, VALUES[:, :1], FULL, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"2 dimension.*rewards \[3\]"):
        gae(REWARDS[0], VALUES[0], FULL[0], gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"bootstrap \[2, 1\]"):
        gae(REWARDS, VALUES, FULL, gamma=1.0, lam=1.0, bootstrap=torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"mask \[2, 3\] must be bool"):
        gae(REWARDS, VALUES, FULL.long(), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="pad on the right"):
        gae(REWARDS, VALUES, FULL.clone().index_fill_(1, tensor(1), False), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"gamma must be between 0 and 1, not 1\.5"):
        gae(REWARDS, VALUES, FULL, gamma=1.5, lam=1.0)
    with pytest.raises(ValueError, match="lam must be between 0 and 1, not nan"):
        gae(REWARDS, VALUES, FULL, gamma=1.0, lam=math.nan)


GROUP_REWARDS = [1.0, 2.0, 6.0, 0.5, 0.5, 2.0]


def test_group_advantages_by_hand() -> None:
    # Groups of three: means 3 and 1, unbiased variances 7 and 0.75.
    first, second = math.sqrt(7) + 1e-4, math.sqrt(0.75) + 1e-4
    expected = tensor([-2 / first, -1 / first, 3 / first, -0.5 / second, -0.5 / second, 1 / second])
    assert GROUP_STD_EPSILON == 1e-4
    torch.testing.assert_close(group_advantages(tensor(GROUP_REWARDS), 3), expected)
    plain = group_advantages(tensor(GROUP_REWARDS), 3, scale="none")
    torch.testing.assert_close(plain, tensor([-2.0, -1.0, 3.0, -0.5, -0.5, 1.0]))
    torch.testing.assert_close(
        group_advantages(tensor(GROUP_REWARDS), 3, scale="batch"),
        plain / (statistics.stdev(GROUP_REWARDS) + 1e-4),
    )


def test_leave_one_out_by_hand() -> None:
    expected = tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 0.5 - 1.25, 0.5 - 1.25, 2 - 0.5])
    torch.testing.assert_close(leave_one_out_advantages(tensor(GROUP_REWARDS), 3), expected)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_group_methods_equal_loops_over_what_is_scored(data: st.DataObject) -> None:
    size, prompts = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3))
    rewards = data.draw(st.lists(st.floats(-5, 5, width=16), min_size=size * prompts, max_size=size * prompts))
    scored = data.draw(st.lists(st.booleans(), min_size=size * prompts, max_size=size * prompts))
    everyone = [r for r, s in zip(rewards, scored, strict=True) if s]
    expected: dict[str, list[float]] = {"group": [], "batch": [], "none": [], "loo": []}
    for i, reward in enumerate(rewards):
        group = range(i // size * size, i // size * size + size)
        mine = [rewards[j] for j in group if scored[j]]
        siblings = [rewards[j] for j in group if scored[j] and j != i]
        counts = scored[i] and bool(siblings)
        lead = reward - statistics.mean(mine) if counts else 0.0
        expected["none"].append(lead)
        expected["group"].append(lead / (statistics.stdev(mine) + 1e-4) if counts else 0.0)
        expected["batch"].append(lead / (statistics.stdev(everyone) + 1e-4) if counts else 0.0)
        expected["loo"].append(reward - statistics.mean(siblings) if counts else 0.0)
    # What an unscored completion holds must not matter.
    given_rewards = tensor([r if s else math.nan for r, s in zip(rewards, scored, strict=True)])
    found = {
        "group": group_advantages(given_rewards, size, scale="group", scored=tensor(scored)),
        "batch": group_advantages(given_rewards, size, scale="batch", scored=tensor(scored)),
        "none": group_advantages(given_rewards, size, scale="none", scored=tensor(scored)),
        "loo": leave_one_out_advantages(given_rewards, size, scored=tensor(scored)),
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[name], tensor(values), atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 9))
def test_equal_rewards_give_exactly_no_advantage(reward: float, size: int) -> None:
    rewards = torch.full((size,), reward)
    assert group_advantages(rewards, size).eq(0).all()
    assert group_advantages(rewards, size, scale="batch").eq(0).all()
    assert leave_one_out_advantages(rewards, size).eq(0).all()


def test_each_group_sums_to_zero() -> None:
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(4))
    for advantages in (group_advantages(rewards, 6), leave_one_out_advantages(rewards, 6)):
        torch.testing.assert_close(advantages.view(4, 6).sum(-1), torch.zeros(4), atol=1e-5, rtol=0)


def test_huge_rewards_keep_their_direction() -> None:
    found = group_advantages(tensor([1e30, -1e30, 0.0, 0.0]), 2)
    torch.testing.assert_close(found, tensor([math.sqrt(0.5), -math.sqrt(0.5), 0.0, 0.0]))
    assert group_advantages(tensor([1e30, -1e30]), 2, scale="batch").isfinite().all()


def test_nothing_scored_and_no_rewards() -> None:
    nan = torch.full((4,), math.nan)
    nobody = torch.zeros(4, dtype=torch.bool)
    for scale in ("group", "batch", "none"):
        assert group_advantages(nan, 2, scale=scale, scored=nobody).eq(0).all()
        assert group_advantages(torch.empty(0), 2, scale=scale).shape == (0,)
    assert leave_one_out_advantages(nan, 2, scored=nobody).eq(0).all()
    assert leave_one_out_advantages(torch.empty(0), 2).shape == (0,)


@pytest.mark.parametrize("function", [group_advantages, leave_one_out_advantages])
def test_group_refusals(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="group_size must be at least 2, not 1"):
        function(torch.zeros(4), 1)
    with pytest.raises(ValueError, match=r"rewards \[5\] is no whole number of groups of 2"):
        function(torch.zeros(5), 2)
    with pytest.raises(ValueError, match=r"rewards \[4, 1\]"):
        function(torch.zeros(4, 1), 2)
    with pytest.raises(ValueError, match=r"rewards \[4\], scored \[2, 2\]"):
        function(torch.zeros(4), 2, scored=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"scored \[4\] must be bool"):
        function(torch.zeros(4), 2, scored=torch.ones(4))


def test_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="'group', 'batch' or 'none', not 'std'"):
        group_advantages(torch.zeros(4), 2, scale="std")  # type: ignore[arg-type]


# ---- credit per token ------------------------------------------------------------------------------------------------


def test_rewards_to_go_by_hand() -> None:
    found = rewards_to_go(tensor([10.0, 0.0]), tensor([[1.0, 0.0, 2.0], [-1.0, 4.0, 0.0]]))
    assert found.tolist() == [[13, 12, 12], [3, 4, 0]]


def test_credit_per_token_by_hand() -> None:
    # Two completions of one prompt: what they still earn at each place, and its mean: (2, 1.5, 0).
    to_go = tensor([[3.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
    plain = group_advantages_per_token(to_go, 2, scale="none")
    assert plain.tolist() == [[1, 1.5, 0], [-1, -1.5, 0]]
    # Unbiased deviations by place: sqrt(2), sqrt(4.5), 0; the largest divides all places.
    scaled = group_advantages_per_token(to_go, 2, scale="group")
    torch.testing.assert_close(scaled, plain / (math.sqrt(4.5) + GROUP_STD_EPSILON))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_credit_of_whole_completions_is_that_of_groups_at_every_token(scale: str) -> None:
    rewards = tensor([0.3, -1.0, 2.0, 5.0, 5.0, 4.0])
    scored = tensor([True, True, True, True, False, True])
    to_go = rewards_to_go(rewards, torch.zeros(6, 4))
    found = group_advantages_per_token(to_go, 3, scale=scale, scored=scored)  # type: ignore[arg-type]
    expected = group_advantages(rewards, 3, scale=scale, scored=scored)  # type: ignore[arg-type]
    assert torch.equal(found, expected[:, None].expand(-1, 4))


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_credit_per_token_does_not_depend_on_the_padding(scale: Literal["group", "batch"]) -> None:
    """Beyond the longest completion only the rewards of whole completions are left, which may differ more."""
    rewards, paid = tensor([0.0, 10.0]), tensor([[3.0, 3.0], [-3.0, -3.0]])
    tight = group_advantages_per_token(rewards_to_go(rewards, paid), 2, scale=scale)
    padded = torch.cat([paid, torch.zeros(2, 3)], dim=1)
    mask = tensor([[True, True, False, False, False]] * 2)
    loose = group_advantages_per_token(rewards_to_go(rewards, padded), 2, scale=scale, mask=mask)
    torch.testing.assert_close(loose[:, :2], tight)
    # What is still earned: (6, 3) and (4, 7), so the deviations are sqrt(2) and sqrt(8).
    torch.testing.assert_close(tight[0], tensor([1.0, -2.0]) / (math.sqrt(8) + GROUP_STD_EPSILON))
    with pytest.raises(ValueError, match="mask must be bool"):
        group_advantages_per_token(torch.zeros(2, 3), 2, mask=torch.ones(2, 2, dtype=torch.bool))


def test_the_same_sum_paid_at_other_tokens_does_not_explode() -> None:
    to_go = rewards_to_go(torch.zeros(2), tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    found = group_advantages_per_token(to_go, 2)
    assert found[:, 0].tolist() == [0, 0]
    assert float(found.abs().max()) < 1


def test_unscored_completions_take_no_part_in_credit_per_token() -> None:
    to_go = tensor([[3.0, 1.0], [1.0, 1.0], [99.0, 99.0]])
    found = group_advantages_per_token(to_go, 3, scale="none", scored=tensor([True, True, False]))
    assert found.tolist() == [[1, 0], [-1, 0], [0, 0]]


def test_credit_refusals() -> None:
    with pytest.raises(ValueError, match="rewards_to_go"):
        group_advantages_per_token(torch.zeros(4), 2)
    with pytest.raises(ValueError, match="no whole number of groups"):
        group_advantages_per_token(torch.zeros(3, 2), 2)
    with pytest.raises(ValueError, match=r"rewards must be \[B\]"):
        rewards_to_go(torch.zeros(3), torch.zeros(2, 5))
    assert group_advantages_per_token(torch.zeros(4, 0), 2).shape == (4, 0)
