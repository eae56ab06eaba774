"""Log-probs of chosen tokens and entropy, from logits that already stand at the positions of those tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.ops.arguments import describe_shapes, require_positive, upcast


def token_logprobs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-prob of each given token under the softmax of its logits.

    log p(id) = l_id / temperature - logsumexp(l / temperature)

    Args:
        logits: [..., V] unnormalised log-probs; -inf forbids a token.
        ids: [...] integer token ids, each in 0..V-1. No shift happens here: ``logits[i]`` is what predicts ``ids[i]``.
        temperature: > 0, divides the logits.

    Returns:
        [...] fp32 log-probs in nats (fp64 for fp64 logits); -inf for a forbidden token.

    Raises:
        ValueError: ``ids`` has not the shape of ``logits`` without its last dimension or is not of an integer type, or
            the temperature is not positive.
    """
    if logits.dim() < 1 or ids.shape != logits.shape[:-1]:
        raise ValueError(f"ids must have the shape of logits without V: {describe_shapes(logits=logits, ids=ids)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids {list(ids.shape)} must be integers, not {ids.dtype}")
    scaled = tempered(logits, temperature)
    return scaled.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy of the softmax of the logits, where a token of probability 0 adds 0.

    H = -sum(p_v log p_v), p = softmax(l / temperature)

    Args:
        logits: [..., V] unnormalised log-probs; -inf forbids a token, at least one of each row is finite.
        temperature: > 0, divides the logits.

    Returns:
        [...] fp32 entropy in nats (fp64 for fp64 logits), between 0 and log V, with a finite gradient.

    Raises:
        ValueError: the logits are a scalar, or the temperature is not positive.
    """
    logprobs = tempered(logits, temperature).log_softmax(-1)
    probs = logprobs.exp()
    # The fill keeps 0 * -inf = NaN out of the sum and out of its gradient.
    return -(probs * logprobs.masked_fill(probs == 0, 0.0)).sum(-1)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits of the tempered distribution, at least fp32.

    l / temperature

    Args:
        logits: [..., V] unnormalised log-probs.
        temperature: > 0.

    Returns:
        [..., V] fp32 (fp64 for fp64 logits); the same tensor where nothing changes.

    Raises:
        ValueError: the logits are a scalar, or the temperature is not positive.
    """
    require_positive("temperature", temperature)
    if logits.dim() < 1:
        raise ValueError(f"logits need a last dimension V: {describe_shapes(logits=logits)}")
    # A division by 1 would copy the largest tensor there is.
    return upcast(logits) if temperature == 1.0 else upcast(logits) / temperature
