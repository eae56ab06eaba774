"""Losses of value functions that learn from logged data."""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.ops.arguments import (
    require_bool,
    require_number,
    require_positive,
    require_rank,
    require_same_shape,
    upcast,
)


def expectile_loss(values: Tensor, targets: Tensor, *, tau: float) -> Tensor:
    """Squared error that weighs targets above the value by tau and targets below it by 1 - tau.

    |tau - 1(target < value)| (target - value)^2      IQL, https://arxiv.org/abs/2110.06169

    Args:
        values: [B, T] (or any one shape) predictions.
        targets: same shape, what they should reach; detach them where they must not learn.
        tau: in (0, 1): 0.5 is half the squared error, towards 1 the prediction approaches the largest target.

    Returns:
        Same shape, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: the shapes differ, or tau is outside (0, 1).
    """
    require_same_shape(values=values, targets=targets)
    if not 0 < tau < 1:
        raise ValueError(f"tau must be between 0 and 1, both excluded, not {tau}")
    error = upcast(targets) - upcast(values)
    return torch.where(error < 0, 1 - tau, tau) * error.square()


def next_action_values(values: Tensor, mask: Tensor) -> Tensor:
    """Value of the state after each action: that of the next action's state, and 0 after the last.

    V(s'_t) = V(s_u) with u the first action after t;  0 where there is none, since the episode ends there

    What is only read between two actions (the prompts of later turns) is a part of the step from one to the other.

    Args:
        values: [B, T] value of the state before each token.
        mask: [B, T] bool, true at the tokens that are actions.

    Returns:
        [B, T] of the type of ``values``, 0 at tokens that are no actions.

    Raises:
        ValueError: the shapes differ, are no [B, T], or the mask is not bool.
    """
    require_same_shape(values=values, mask=mask)
    require_rank(2, values=values)
    require_bool(mask=mask)
    width = values.shape[1]
    if width == 0:
        return values
    places = torch.arange(width, device=values.device).expand_as(mask)
    own = torch.where(mask, places, width)
    here_or_later = own.flip(1).cummin(dim=1).values.flip(1)
    after = torch.nn.functional.pad(here_or_later[:, 1:], (0, 1), value=width)
    found = torch.nn.functional.pad(values, (0, 1)).gather(1, after)
    return torch.where(mask, found, found.new_zeros(()))


def td_targets(rewards: Tensor, next_values: Tensor, *, gamma: float) -> Tensor:
    """What the value of an action should be: its reward and the discounted value of where it leads.

    y = r + gamma V(s')      ILQL, https://arxiv.org/abs/2206.11871

    Args:
        rewards: [B, T].
        next_values: [B, T], 0 after the last action; detach them where they must not learn.
        gamma: discount in [0, 1].

    Returns:
        [B, T], fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: the shapes differ, or gamma is outside [0, 1].
    """
    require_same_shape(rewards=rewards, next_values=next_values)
    require_number("gamma", gamma, low=0.0, high=1.0)
    return upcast(rewards) + gamma * upcast(next_values)


def conservative_loss(q: Tensor, q_logsumexp: Tensor) -> Tensor:
    """Cross-entropy of the action that was taken under the softmax of all action values.

    log sum_a exp Q(s, a) - Q(s, a_taken)      CQL, https://arxiv.org/abs/2006.04779

    It lowers the values of actions that the data never takes, of which nothing else says what they are worth.

    Args:
        q: [B, T] value of the action that was taken.
        q_logsumexp: [B, T] logsumexp of the values of all actions.

    Returns:
        [B, T], at least 0, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(q=q, q_logsumexp=q_logsumexp)
    return upcast(q_logsumexp) - upcast(q)


def advantage_weighted_loss(
    logprobs: Tensor, advantages: Tensor, *, beta: float, max_weight: float | None = None
) -> Tensor:
    """Negative log-likelihood of actions, weighed by what they are worth beyond their state; the weights do not learn.

    -log pi(a | s) min(exp(beta A), max_weight)      AWAC, https://arxiv.org/abs/2006.09359

    Args:
        logprobs: [B, T] of the actions.
        advantages: [B, T] Q(s, a) - V(s).
        beta: 0 weighs all actions alike.
        max_weight: largest weight; None: there is no limit.

    Returns:
        [B, T], fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: the shapes differ, beta is negative, or max_weight is not positive.
    """
    require_same_shape(logprobs=logprobs, advantages=advantages)
    require_number("beta", beta, low=0.0)
    weights = (beta * upcast(advantages.detach())).exp()
    if max_weight is not None:
        require_positive("max_weight", max_weight)
        weights = weights.clamp(max=max_weight)
    return -upcast(logprobs) * weights
