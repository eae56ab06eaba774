"""The expectile loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from tropism.ops import expectile_loss


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
