"""Importance weights of tokens that another arithmetic (or another policy) sampled, and what they leave of a sample."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tropism.ops.arguments import require_bool, require_number, require_rank, require_same_shape, upcast
from tropism.ops.divergences import LOG_RATIO_LIMIT


def truncated_importance_weights(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor,
    *,
    cap: float,
    level: Literal["token", "sequence"] = "token",
) -> Tensor:
    """Weights that make tokens of one distribution stand for tokens of another, capped to bound their variance.

    w_t = min(exp(d_t), cap), d = log pi - log mu clamped to +-20; per sequence: w = min(exp(sum_t d_t), cap)
    Truncated importance sampling, https://doi.org/10.1198/106186008X320456; for the difference between sampling and
    training, https://openreview.net/forum?id=8MHqvb4lK9

    Without the cap, E_mu[w f] = E_pi[f]: per token given the tokens before it, per sequence without condition. The cap
    makes an error only where it is reached.

    Args:
        logprobs: [B, T] log pi of the sampled tokens, in nats.
        behaviour_logprobs: [B, T] log mu of the same tokens, under what sampled them.
        mask: [B, T] bool, true at the tokens that count.
        cap: >= 1, the largest weight; infinity truncates nothing.
        level: "token" for one weight per token, "sequence" for the product over a row, at its every token.

    Returns:
        [B, T] fp32 (fp64 for fp64 inputs), 0 at masked entries; without gradient.

    Raises:
        ValueError: the tensors are not of one shape [B, T], the mask is not bool, or the cap is below 1.
    """
    require_rank(2, logprobs=logprobs, behaviour_logprobs=behaviour_logprobs, mask=mask)
    require_same_shape(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs, mask=mask)
    require_bool(mask=mask)
    require_number("cap", cap, low=1.0)
    log_ratio = (upcast(logprobs) - upcast(behaviour_logprobs)).detach()
    log_ratio = torch.where(mask, log_ratio, log_ratio.new_zeros(()))
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    weights = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=cap)
    return torch.where(mask, weights, weights.new_zeros(()))


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """Share of a weighted sample that an equally weighted one would need for the same variance (Kish).

    (sum w)^2 / (n sum w^2)      https://en.wikipedia.org/wiki/Effective_sample_size

    Args:
        weights: [...] at least 0.
        mask: [...] bool, true at the n entries that count.

    Returns:
        [] from 1/n (one entry has all the weight) to 1 (all are equal); 1 when no weight above 0 is unmasked.

    Raises:
        ValueError: the shapes differ, or the mask is not bool.
    """
    require_same_shape(weights=weights, mask=mask)
    require_bool(mask=mask)
    weights = upcast(weights)
    weights = torch.where(mask, weights, weights.new_zeros(()))
    scaled = weights / weights.max().clamp_min(torch.finfo(weights.dtype).tiny) if weights.numel() else weights
    squares = mask.sum() * scaled.square().sum()
    return torch.where(squares > 0, scaled.sum().square() / squares, torch.ones_like(squares))
