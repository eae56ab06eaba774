"""Policy surrogates, the critic's loss, and how well the critic explains the returns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor

from tropism.ops import (
    cispo_policy_loss,
    clipped_policy_loss,
    clipped_tokens,
    clipped_value_loss,
    explained_variance,
    masked_mean,
    sequence_log_ratio,
    sequence_policy_loss,
)

# Ratios 1.5 and 0.5, each with a positive and a negative advantage, and an unmoved token.
RATIOS = tensor([[1.5, 1.5, 0.5, 0.5, 1.0]])
ADVANTAGES = tensor([[2.0, -2.0, 2.0, -2.0, 2.0]])
OLD = torch.full((1, 5), -1.0)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss.sum(), of)
    return result


def test_clipped_policy_loss_by_hand() -> None:
    logprobs = (OLD + RATIOS.log()).requires_grad_()
    loss = clipped_policy_loss(logprobs, OLD, ADVANTAGES, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(loss, tensor([[-2.6, 3.0, -1.0, 1.6, -2.0]]))
    # d rho / d log pi = rho, and nothing where the clip is active.
    torch.testing.assert_close(gradient(loss, logprobs), tensor([[0.0, 3.0, -1.0, 0.0, -2.0]]))


def test_clipped_tokens_are_those_without_gradient() -> None:
    generator = torch.Generator().manual_seed(5)
    old, moved, advantages = (torch.randn(6, 7, generator=generator) for _ in range(3))
    logprobs = (old + 0.4 * moved).requires_grad_()
    clips = {"clip_low": 0.2, "clip_high": 0.28}
    clipped = clipped_tokens(logprobs, old, advantages, **clips)
    assert clipped.dtype == torch.bool
    assert 0 < clipped.sum() < clipped.numel()
    assert torch.equal(clipped, gradient(clipped_policy_loss(logprobs, old, advantages, **clips), logprobs) == 0)


def test_clipped_tokens_by_hand() -> None:
    found = clipped_tokens(OLD + RATIOS.log(), OLD, ADVANTAGES, clip_low=0.2, clip_high=0.3)
    assert found.tolist() == [[True, False, False, True, False]]
    idle = clipped_tokens(OLD + RATIOS.log(), OLD, torch.zeros(1, 5), clip_low=0.2, clip_high=0.3)
    assert not idle.any()


def test_before_the_first_update_the_gradient_is_the_policy_gradient() -> None:
    logprobs = OLD.clone().requires_grad_()
    mask = torch.ones(1, 5, dtype=torch.bool)
    for loss in (
        clipped_policy_loss(logprobs, OLD, ADVANTAGES, clip_low=0.2, clip_high=0.2),
        cispo_policy_loss(logprobs, OLD, ADVANTAGES, clip_high=0.2),
    ):
        assert torch.equal(gradient(loss, logprobs), -ADVANTAGES)
    advantages = torch.full((1, 5), 2.0)
    loss = sequence_policy_loss(logprobs, OLD, advantages, mask, clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(gradient(loss, logprobs), -advantages)


def test_huge_log_ratios_stay_finite() -> None:
    logprobs = tensor([[0.0, -500.0, -math.inf, 0.0]], requires_grad=True)
    old = tensor([[-500.0, 0.0, 0.0, -math.inf]])
    advantages = tensor([[-1.0, -1.0, 1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    for loss in (
        clipped_policy_loss(logprobs, old, advantages, clip_low=0.2, clip_high=0.2),
        sequence_policy_loss(logprobs[:, :2], old[:, :2], advantages[:, :2], mask[:, :2], clip_low=0.2, clip_high=0.2),
        cispo_policy_loss(logprobs[:, :2], old[:, :2], advantages[:, :2], clip_high=5.0),
    ):
        assert loss.isfinite().all()
        assert gradient(loss, logprobs).isfinite().all()
    assert clipped_policy_loss(logprobs, old, advantages, clip_low=0.2, clip_high=0.2)[0, 0].item() == pytest.approx(
        math.exp(20), rel=1e-6
    )


def test_half_precision_log_probs_are_upcast_before_the_difference() -> None:
    loss = clipped_policy_loss(OLD.bfloat16(), OLD, ADVANTAGES.bfloat16(), clip_low=0.2, clip_high=0.2)
    assert loss.dtype == torch.float32


def test_sequence_ratio_by_hand() -> None:
    logprobs = (OLD[:, :3] + tensor([[0.1, 0.3, 9.0]])).requires_grad_()
    old, mask = OLD[:, :3], tensor([[True, True, False]])
    log_ratio = sequence_log_ratio(logprobs, old, mask)
    torch.testing.assert_close(log_ratio, tensor([[0.2, 0.2, 0.0]]))
    loss = sequence_policy_loss(logprobs, old, torch.ones(1, 3), mask, clip_low=0.5, clip_high=0.5)
    torch.testing.assert_close(loss, tensor([[-math.exp(0.2), -math.exp(0.2), 0.0]]))
    # The mean over the row's tokens is the loss of the sequence: each token holds half of the ratio's gradient.
    half = -math.exp(0.2) / 2
    torch.testing.assert_close(gradient(masked_mean(loss, mask), logprobs), tensor([[half, half, 0.0]]))


def test_sequence_ratio_is_clipped_as_a_whole() -> None:
    # Token ratios e^0.5 and e^-0.1: the row's is e^0.2 = 1.22, above 1.1, so neither token learns.
    logprobs = (OLD[:, :2] + tensor([[0.5, -0.1]])).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = sequence_policy_loss(logprobs, OLD[:, :2], torch.ones(1, 2), mask, clip_low=0.1, clip_high=0.1)
    torch.testing.assert_close(loss, torch.full((1, 2), -1.1))
    assert gradient(loss, logprobs).eq(0).all()
    log_ratio = sequence_log_ratio(logprobs, OLD[:, :2], mask)
    zeros = torch.zeros_like(log_ratio)
    assert clipped_tokens(log_ratio, zeros, torch.ones(1, 2), clip_low=0.1, clip_high=0.1).all()


def test_sequence_loss_rows_of_one_and_no_token() -> None:
    logprobs, old = tensor([[-1.0, math.nan], [math.inf, math.nan]]), tensor([[-1.5, 0.0], [math.nan, 0.0]])
    mask = tensor([[True, False], [False, False]])
    loss = sequence_policy_loss(logprobs, old, torch.full((2, 2), -1.0), mask, clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(loss, tensor([[math.exp(0.5), 0.0], [0.0, 0.0]]))


def test_cispo_by_hand() -> None:
    old = tensor([[-0.5 - math.log(2), -0.5 + math.log(2)]])
    logprobs = tensor([[-0.5, -0.5]], requires_grad=True)  # ratios 2 and 1/2
    loss = cispo_policy_loss(logprobs, old, tensor([[2.0, -4.0]]), clip_high=0.5)
    torch.testing.assert_close(loss, tensor([[1.5, -1.0]]))
    # The cap limits the weight of a token but never takes its gradient away.
    torch.testing.assert_close(gradient(loss, logprobs), tensor([[-3.0, 2.0]]))


def test_clipped_value_loss_by_hand() -> None:
    values = tensor([[2.0, 2.0, 1.1]], requires_grad=True)
    old, returns = tensor([[1.0, 1.0, 1.0]]), tensor([[3.0, 0.0, 3.0]])
    loss = clipped_value_loss(values, old, returns, clip=0.2)
    torch.testing.assert_close(loss, tensor([[1.62, 2.0, 1.805]]))
    torch.testing.assert_close(gradient(loss, values), tensor([[0.0, 2.0, -1.9]]))
    unclipped = clipped_value_loss(values, old, returns, clip=None)
    torch.testing.assert_close(unclipped, tensor([[0.5, 2.0, 1.805]]))


def test_explained_variance_by_hand() -> None:
    returns = tensor([[1.0, 2.0], [3.0, math.nan]])
    mask = tensor([[True, True], [True, False]])
    perfect, constant, opposite = returns.clone(), torch.full((2, 2), 7.0), tensor([[3.0, 2.0], [1.0, 5.0]])
    assert explained_variance(perfect, returns, mask).item() == 1.0
    assert explained_variance(perfect + 9, returns, mask).item() == 1.0  # an offset is no variance
    assert explained_variance(constant, returns, mask).item() == 0.0
    assert explained_variance(opposite, returns, mask).item() == pytest.approx(-3.0)


def test_explained_variance_of_returns_that_do_not_vary() -> None:
    mask = torch.ones(1, 7, dtype=torch.bool)
    assert explained_variance(torch.randn(1, 7), torch.full((1, 7), 0.1), mask).item() == 0.0
    assert explained_variance(torch.randn(1, 7), torch.randn(1, 7), torch.zeros_like(mask)).item() == 0.0
    one = torch.zeros_like(mask).index_fill_(1, tensor(0), True)
    assert explained_variance(torch.randn(1, 7), torch.randn(1, 7), one).item() == 0.0


CLIPS = {"clip_low": 0.2, "clip_high": 0.2}
GRID, COLUMN, FLAT, ROWS = torch.zeros(4, 3), torch.zeros(4, 1), torch.zeros(4), torch.ones(4, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("function", "settings"),
    [(clipped_policy_loss, CLIPS), (clipped_tokens, CLIPS), (cispo_policy_loss, {"clip_high": 0.2})],
)
def test_policy_loss_refusals(function: object, settings: dict[str, float]) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=r"advantages \[4, 1\]"):
        function(GRID, GRID, COLUMN, **settings)
    with pytest.raises(ValueError, match=r"advantages \[4\]"):
        function(GRID, GRID, FLAT, **settings)
    with pytest.raises(ValueError, match=r"2 dimension"):
        function(FLAT, FLAT, FLAT, **settings)
    for name in settings:
        with pytest.raises(ValueError, match=f"{name} must be at least 0, not -0.1"):
            function(GRID, GRID, GRID, **{**settings, name: -0.1})


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match=r"advantages \[4, 1\]"):
        sequence_policy_loss(GRID, GRID, COLUMN, ROWS, **CLIPS)
    with pytest.raises(ValueError, match=r"mask \[4, 1\]"):
        sequence_policy_loss(GRID, GRID, GRID, ROWS[:, :1], **CLIPS)
    with pytest.raises(ValueError, match="must be bool"):
        sequence_policy_loss(GRID, GRID, GRID, ROWS.float(), **CLIPS)
    with pytest.raises(ValueError, match="clip_low"):
        sequence_policy_loss(GRID, GRID, GRID, ROWS, clip_low=-1.0, clip_high=0.2)
    with pytest.raises(ValueError, match=r"returns \[4, 1\]"):
        clipped_value_loss(GRID, GRID, COLUMN, clip=None)
    with pytest.raises(ValueError, match="2 dimension"):
        clipped_value_loss(FLAT, FLAT, FLAT, clip=0.2)
    with pytest.raises(ValueError, match="clip must be positive"):
        clipped_value_loss(GRID, GRID, GRID, clip=0.0)
    with pytest.raises(ValueError, match=r"returns \[4, 1\]"):
        explained_variance(GRID, COLUMN, ROWS)
    with pytest.raises(ValueError, match="must be bool"):
        explained_variance(GRID, GRID, ROWS.long())
