"""Losses from logged data, against numbers by hand and a loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from tropism.ops import (
    advantage_weighted_loss,
    conservative_loss,
    expectile_loss,
    next_action_values,
    td_targets,
)


def test_expectile_loss_by_hand() -> None:
    values = tensor([[1.0, 1.0, 1.0]], requires_grad=True)
    loss = expectile_loss(values, tensor([[3.0, -1.0, 1.0]]), tau=0.75)
    torch.testing.assert_close(loss, tensor([[3.0, 1.0, 0.0]]))
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(gradient, tensor([[-3.0, 1.0, 0.0]]))


def test_one_half_is_half_the_squared_error() -> None:
    torch.testing.assert_close(expectile_loss(tensor([1.0, 5.0]), tensor([3.0, 2.0]), tau=0.5), tensor([2.0, 4.5]))


def test_the_minimum_moves_towards_the_largest_target() -> None:
    targets = tensor([0.0, 0.0, 0.0, 1.0])
    grid = torch.linspace(0, 1, 1001)
    for tau in (0.5, 0.7, 0.9, 0.99):
        total = torch.stack([expectile_loss(v.expand(4), targets, tau=tau).sum() for v in grid])
        # tau (1 - v) = 3 (1 - tau) v at the minimum.
        assert grid[total.argmin()].item() == pytest.approx(tau / (tau + 3 * (1 - tau)), abs=2e-3)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"values \[4\], targets \[4, 1\]"):
        expectile_loss(torch.zeros(4), torch.zeros(4, 1), tau=0.7)
    for tau in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="tau must be between 0 and 1"):
            expectile_loss(torch.zeros(4), torch.zeros(4), tau=tau)


def test_next_action_values_by_hand() -> None:
    """The second row has two turns: what is read between them is skipped, and nothing follows the last action."""
    values = tensor([[1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    mask = tensor([[True, True, True, False], [True, False, False, True], [False, False, False, False]])
    expected = tensor([[2.0, 3.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(next_action_values(values, mask), expected)


def test_next_action_values_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 9, generator=generator)
    mask = torch.rand(20, 9, generator=generator) < 0.5
    for row in range(20):
        following = 0.0
        for place in range(8, -1, -1):
            found = float(next_action_values(values, mask)[row, place])
            assert found == (following if mask[row, place] else 0.0)
            if mask[row, place]:
                following = float(values[row, place])


def test_next_action_values_of_nothing() -> None:
    assert next_action_values(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)
    one = next_action_values(tensor([[3.0]]), tensor([[True]]))
    assert torch.equal(one, tensor([[0.0]]))


def test_td_targets_by_hand() -> None:
    targets = td_targets(tensor([[0.0, 1.0]]), tensor([[4.0, 0.0]]), gamma=0.5)
    assert torch.equal(targets, tensor([[2.0, 1.0]]))


def test_conservative_loss_by_hand() -> None:
    """Of two actions worth log 3 and 0 the first was taken: -log(3 / 4)."""
    taken = tensor([[math.log(3.0)]], requires_grad=True)
    loss = conservative_loss(taken, torch.stack([taken, torch.zeros_like(taken)]).logsumexp(0))
    assert loss.item() == pytest.approx(math.log(4 / 3))
    loss.sum().backward()
    assert taken.grad is not None and taken.grad.item() == pytest.approx(-1 / 4)


def test_advantage_weighted_loss_by_hand() -> None:
    logprobs = tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    advantages = tensor([[math.log(4.0), 0.0, 50.0]], requires_grad=True)
    loss = advantage_weighted_loss(logprobs, advantages, beta=0.5, max_weight=10.0)
    torch.testing.assert_close(loss, tensor([[2.0, 2.0, 30.0]]))
    loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad[0].tolist() == pytest.approx([-2.0, -1.0, -10.0])
    assert advantages.grad is None
    plain = advantage_weighted_loss(logprobs, advantages, beta=0.0)
    assert plain.tolist() == [[1.0, 2.0, 3.0]]
    unlimited = advantage_weighted_loss(logprobs.detach(), advantages, beta=0.5)
    assert unlimited[0, 2].item() == pytest.approx(3 * math.exp(25.0))


def test_refusals_of_the_others() -> None:
    one, other, mask = torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"values \[2, 1\], mask \[2, 3\]"):
        next_action_values(other, mask)
    with pytest.raises(ValueError, match=r"mask.*must be bool"):
        next_action_values(one, mask.float())
    with pytest.raises(ValueError, match="2 dimension"):
        next_action_values(one[0], mask[0])
    with pytest.raises(ValueError, match="one shape"):
        td_targets(one, other, gamma=1.0)
    for gamma in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="gamma must be between 0 and 1"):
            td_targets(one, one, gamma=gamma)
    with pytest.raises(ValueError, match="one shape"):
        conservative_loss(one, other)
    with pytest.raises(ValueError, match="one shape"):
        advantage_weighted_loss(one, other, beta=1.0)
    with pytest.raises(ValueError, match="beta must be at least 0"):
        advantage_weighted_loss(one, one, beta=-1.0)
    with pytest.raises(ValueError, match="max_weight must be positive"):
        advantage_weighted_loss(one, one, beta=1.0, max_weight=0.0)
