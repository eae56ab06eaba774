"""What is left out of a next-token distribution: top-k, top-p and min-p sets, and the penalty on repeated tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.ops.arguments import describe_shapes, require_bool, require_positive, require_same_shape

NUCLEUS_HEAD = 1024
"""Top-p looks at this many most likely tokens before it sorts the whole vocabulary."""


def truncated(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Logits with -inf outside the top-k, top-p and min-p sets, each of what the one before left, as in transformers.

    top-k: the k largest, ties included. top-p: the smallest set of the most likely tokens with probability at least
    top_p, https://arxiv.org/abs/1904.09751. min-p: p_v >= min_p max(p), https://arxiv.org/abs/2407.01082

    Args:
        logits: [..., V] tempered, of any rank.
        top_k: 0 keeps all. top_p: in (0, 1]. min_p: in [0, 1].

    Returns:
        [..., V]; the most likely token always stays.

    Raises:
        ValueError: the logits are a scalar.
    """
    if logits.dim() < 1:
        raise ValueError(f"logits need a last dimension V: {describe_shapes(logits=logits)}")
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        logits = logits.masked_fill(logits < _nucleus_threshold(logits.detach(), top_p), -torch.inf)
    if min_p > 0:
        probabilities = logits.detach().softmax(-1)
        floor = min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < floor, -torch.inf)
    return logits


def penalised(logits: Tensor, seen: Tensor, *, penalty: float) -> Tensor:
    """Logits of tokens that have appeared, divided (positive) or multiplied (negative) by ``penalty``.

    l_v / penalty where l_v > 0, l_v penalty elsewhere, for v seen      CTRL, https://arxiv.org/abs/1909.05858

    Args:
        logits: [..., V] as the model gives them, not yet tempered.
        seen: [..., V] bool, true at tokens that have appeared.
        penalty: > 0; 1 changes nothing.

    Returns:
        [..., V].

    Raises:
        ValueError: the shapes differ, ``seen`` is not bool, or the penalty is not positive.
    """
    require_same_shape(logits=logits, seen=seen)
    require_bool(seen=seen)
    require_positive("penalty", penalty)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _nucleus_threshold(logits: Tensor, top_p: float) -> Tensor:
    """[..., 1] smallest logit of the smallest set with probability at least ``top_p``; sorts the head if it can."""
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    for head in (min(NUCLEUS_HEAD, logits.shape[-1]), logits.shape[-1]):
        top = logits.topk(head, dim=-1).values
        before = (top - total).exp().cumsum(-1)
        if bool((before[..., -1] >= top_p).all()):
            break
    # The crossing token stays: count the tokens before which less than top_p has been gathered.
    kept = 1 + (before[..., :-1] < top_p).sum(-1, keepdim=True)
    return top.gather(-1, kept - 1)
