"""Surrogate losses of on-policy methods, and the critic's loss. All are per token; the trainer sums and divides."""

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
from tropism.ops.divergences import LOG_RATIO_LIMIT
from tropism.ops.masking import masked_deviations, masked_mean


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Policy-gradient surrogate whose gain ends once the probability ratio has left its interval.

    max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), rho = exp(log pi - log pi_old), its log clamped to +-20
    PPO, https://arxiv.org/abs/1707.06347; two bounds: DAPO, https://arxiv.org/abs/2503.14476

    Args:
        logprobs: [B, T] log-probs under the policy that learns, in nats.
        old_logprobs: [B, T] of the same tokens under the policy that sampled them, same temperature.
        advantages: [B, T].
        clip_low: >= 0, how far the ratio may fall below 1.
        clip_high: >= 0, how far it may rise above 1.

    Returns:
        [B, T] fp32 losses (fp64 for fp64 inputs), also at padding: mask before summing.

    Raises:
        ValueError: the tensors are not of one shape [B, T], or a clip is negative.
    """
    ratio = _ratio(logprobs, old_logprobs, advantages)
    _require_clips(clip_low, clip_high)
    advantages = upcast(advantages)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))


def clipped_tokens(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Where the clip of ``clipped_policy_loss`` is active, so that the token has no gradient.

    (A > 0 and rho > 1 + clip_high) or (A < 0 and rho < 1 - clip_low)      PPO, https://arxiv.org/abs/1707.06347

    Args:
        logprobs: [B, T] log-probs under the policy that learns, in nats.
        old_logprobs: [B, T] of the same tokens under the policy that sampled them, same temperature.
        advantages: [B, T].
        clip_low: >= 0, how far the ratio may fall below 1.
        clip_high: >= 0, how far it may rise above 1.

    Returns:
        [B, T] bool; ``masked_mean`` of it is the clip fraction.

    Raises:
        ValueError: the tensors are not of one shape [B, T], or a clip is negative.
    """
    ratio = _ratio(logprobs, old_logprobs, advantages)
    _require_clips(clip_low, clip_high)
    return ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean log-ratio of each row's tokens, at every token of the row: the log of GSPO's length-normalised ratio.

    mean(log pi - log pi_old over the row's tokens)      GSPO, https://arxiv.org/abs/2507.18071

    Args:
        logprobs: [B, T] log-probs under the policy that learns, in nats.
        old_logprobs: [B, T] of the same tokens under the policy that sampled them, same temperature.
        mask: [B, T] bool, true at the tokens that count.

    Returns:
        [B, T] fp32 (fp64 for fp64 inputs), 0 at masked entries. ``clipped_tokens(ratio, zeros, ...)`` counts clips.

    Raises:
        ValueError: the tensors are not of one shape [B, T], or the mask is not bool.
    """
    require_rank(2, logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    require_bool(mask=mask)
    log_ratio = upcast(logprobs) - upcast(old_logprobs)
    zero = log_ratio.new_zeros(())
    total = torch.where(mask, log_ratio, zero).sum(-1, keepdim=True)
    return torch.where(mask, total / mask.sum(-1, keepdim=True).clamp_min(1), zero)


def sequence_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Clipped surrogate with one ratio per completion, the geometric mean of its tokens' ratios.

    max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)), s = exp(mean(log pi - log pi_old)), the mean clamped to +-20
    GSPO, https://arxiv.org/abs/2507.18071

    Args:
        logprobs: [B, T] log-probs under the policy that learns, in nats.
        old_logprobs: [B, T] of the same tokens under the policy that sampled them, same temperature.
        advantages: [B, T] one number per row in GSPO itself.
        mask: [B, T] bool, true at the tokens that count.
        clip_low: >= 0, how far the ratio may fall below 1 (the paper: 3e-4).
        clip_high: >= 0, how far it may rise above 1 (the paper: 4e-4).

    Returns:
        [B, T] fp32 losses (fp64 for fp64 inputs), 0 at masked entries; the mean over a row's tokens is the loss of the
        sequence. Every token of a row learns through the ratio of the row.

    Raises:
        ValueError: the tensors are not of one shape [B, T], the mask is not bool, or a clip is negative.
    """
    log_ratio = sequence_log_ratio(logprobs, old_logprobs, mask)
    zeros = torch.zeros_like(log_ratio)
    loss = clipped_policy_loss(log_ratio, zeros, advantages, clip_low=clip_low, clip_high=clip_high)
    return torch.where(mask, loss, zeros)


def cispo_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_high: float) -> Tensor:
    """Policy gradient with an importance weight that is capped and carries no gradient, so that every token learns.

    -stopgrad(min(rho, 1 + clip_high)) A log pi, rho = exp(log pi - log pi_old), its log clamped to +-20
    CISPO, https://arxiv.org/abs/2506.13585

    Args:
        logprobs: [B, T] log-probs under the policy that learns, in nats.
        old_logprobs: [B, T] of the same tokens under the policy that sampled them, same temperature.
        advantages: [B, T].
        clip_high: >= 0, how far above 1 the weight may rise.

    Returns:
        [B, T] fp32 losses (fp64 for fp64 inputs), also at padding: mask before summing.

    Raises:
        ValueError: the tensors are not of one shape [B, T], or the clip is negative.
    """
    require_number("clip_high", clip_high, low=0.0)
    weight = _ratio(logprobs, old_logprobs, advantages).detach().clamp(max=1 + clip_high)
    return -weight * upcast(advantages) * upcast(logprobs)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """Half the squared error of the critic, not lower than it would be had the value stayed near its old one.

    max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2      https://arxiv.org/abs/1909.08593

    Args:
        values: [B, T] the critic that learns.
        old_values: [B, T] the critic at rollout time.
        returns: [B, T] value targets.
        clip: > 0, or None for (V - R)^2 / 2.

    Returns:
        [B, T] fp32 losses (fp64 for fp64 inputs), also at padding: mask before summing.

    Raises:
        ValueError: the tensors are not of one shape [B, T], or the clip is not positive.
    """
    require_rank(2, values=values, old_values=old_values, returns=returns)
    require_same_shape(values=values, old_values=old_values, returns=returns)
    values, old_values, returns = upcast(values), upcast(old_values), upcast(returns)
    error = (values - returns).square()
    if clip is None:
        return 0.5 * error
    require_positive("clip", clip)
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * torch.maximum(error, (clipped - returns).square())


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the variance of the returns that the critic predicts.

    1 - var(returns - values) / var(returns), over the population of unmasked tokens
    https://github.com/openai/baselines/blob/master/baselines/common/math_util.py

    Args:
        values: [B, T] predictions.
        returns: [B, T] what came.
        mask: [B, T] bool, true at the tokens that count.

    Returns:
        [] 1 for a perfect critic, 0 for a constant one, negative for a worse one; 0 when the returns do not vary.

    Raises:
        ValueError: the tensors are not of one shape [B, T], or the mask is not bool.
    """
    require_rank(2, values=values, returns=returns, mask=mask)
    require_same_shape(values=values, returns=returns, mask=mask)
    variance = _variance(upcast(returns), mask)
    residual = _variance(upcast(returns) - upcast(values), mask)
    return torch.where(variance > 0, 1 - residual / variance, torch.zeros_like(variance))


def _variance(values: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(masked_deviations(values.flatten(), mask.flatten()).square(), mask.flatten())


def _require_clips(clip_low: float, clip_high: float) -> None:
    require_number("clip_low", clip_low, low=0.0)
    require_number("clip_high", clip_high, low=0.0)


def _ratio(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """exp of the log-ratio clamped to +-20, after the checks that the losses share."""
    require_rank(2, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    return (upcast(logprobs) - upcast(old_logprobs)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
