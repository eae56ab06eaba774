"""Rewards per token: the score of a whole completion at its last token, less a penalty for leaving the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.ops.arguments import describe_shapes, require_bool, require_rank, require_same_shape, upcast


def penalised_rewards(token_rewards: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each token less its share of the KL divergence from the reference.

    r_t - kl_coef * kl_t      https://arxiv.org/abs/1909.08593

    Args:
        token_rewards: [B, T] reward of token t.
        kl: [B, T] KL estimate at token t in nats, as ``kl_k1`` gives it.
        mask: [B, T] bool, true at real tokens.
        kl_coef: reward that one nat costs.

    Returns:
        [B, T] fp32 rewards (fp64 for fp64 inputs), 0 at masked entries.

    Raises:
        ValueError: the tensors are not of one shape [B, T], or the mask is not bool.
    """
    require_rank(2, token_rewards=token_rewards, kl=kl, mask=mask)
    require_same_shape(token_rewards=token_rewards, kl=kl, mask=mask)
    require_bool(mask=mask)
    penalised = upcast(token_rewards) - kl_coef * upcast(kl)
    return torch.where(mask, penalised, penalised.new_zeros(()))


def score_at_last_token(scores: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Each completion's score as a reward of its last real token.

    r_t = score if t = length - 1 else 0      https://arxiv.org/abs/1909.08593

    Args:
        scores: [B] one score per completion.
        lengths: [B] integer number of real tokens, 0..width.
        width: T, the padded length.

    Returns:
        [B, width] fp32 rewards (fp64 for fp64 scores); a row of length 0 is all zero, its score is dropped.

    Raises:
        ValueError: the tensors are not of one shape [B], ``lengths`` are no integers, or one is outside 0..width.
    """
    require_rank(1, scores=scores, lengths=lengths)
    require_same_shape(scores=scores, lengths=lengths)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths {list(lengths.shape)} must be integers, not {lengths.dtype}")
    if bool(((lengths < 0) | (lengths > width)).any()):
        shapes = describe_shapes(scores=scores, lengths=lengths)
        raise ValueError(f"lengths must be between 0 and width {width}, not {lengths.tolist()} ({shapes})")
    last = torch.arange(width, device=lengths.device)[None, :] == lengths[:, None] - 1
    scores = upcast(scores)
    return torch.where(last, scores[:, None], scores.new_zeros(()))
