"""KL divergence of the policy from the reference: three estimates from sampled tokens, and the exact sum."""

from __future__ import annotations

from torch import Tensor

from tropism.ops.arguments import require_same_shape, upcast
from tropism.ops.logprobs import tempered
from tropism.ops.masking import masked_mean

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to plus and minus this before they are exponentiated (e^20 is 4.9e8); no gradient beyond."""


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(policy || reference) by the log-ratio itself: unbiased, may be negative.

    k1 = log pi - log ref      http://joschu.net/blog/kl-approx.html

    Args:
        logprobs: [B, T] (or any one shape) log-probs of tokens sampled from the policy, in nats.
        ref_logprobs: same shape, of the same tokens under the reference at the same temperature.

    Returns:
        Same shape, fp32 (fp64 for fp64 inputs), in nats.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return upcast(logprobs) - upcast(ref_logprobs)


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(policy || reference) by half the squared log-ratio: biased, never negative, low variance.

    k2 = (log pi - log ref)^2 / 2      http://joschu.net/blog/kl-approx.html

    Args:
        logprobs: [B, T] (or any one shape) log-probs of tokens sampled from the policy, in nats.
        ref_logprobs: same shape, of the same tokens under the reference at the same temperature.

    Returns:
        Same shape, fp32 (fp64 for fp64 inputs), in nats.

    Raises:
        ValueError: the shapes differ.
    """
    return 0.5 * kl_k1(logprobs, ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(policy || reference) by the log-ratio with a control variate: unbiased, never negative.

    k3 = exp(d) - d - 1, d = log ref - log pi clamped to +-20      http://joschu.net/blog/kl-approx.html

    Args:
        logprobs: [B, T] (or any one shape) log-probs of tokens sampled from the policy, in nats.
        ref_logprobs: same shape, of the same tokens under the reference at the same temperature.

    Returns:
        Same shape, fp32 (fp64 for fp64 inputs), in nats; see ``clamped_fraction`` for how often the clamp acted.

    Raises:
        ValueError: the shapes differ.
    """
    log_ratio = (-kl_k1(logprobs, ref_logprobs)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    # expm1 rather than exp - 1: for small log-ratios the digits that exp - 1 loses are all there is.
    return log_ratio.expm1() - log_ratio


def clamped_fraction(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Fraction of unmasked tokens whose log-ratio the clamp at +-20 cuts, and which therefore have no gradient in k3.

    mean(|log pi - log ref| > 20)

    Args:
        logprobs: [B, T] (or any one shape) log-probs under the policy, in nats.
        ref_logprobs: same shape, of the same tokens under the reference.
        mask: same shape, bool, true at the tokens that count.

    Returns:
        [] between 0 and 1; 0 when nothing is unmasked.

    Raises:
        ValueError: the shapes differ, or the mask is not bool.
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    return masked_mean(kl_k1(logprobs, ref_logprobs).abs() > LOG_RATIO_LIMIT, mask)


def full_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Exact KL(policy || reference) of two next-token distributions, summed over the vocabulary.

    sum(p_v (log p_v - log q_v)), p = softmax(l / temperature), q = softmax(l_ref / temperature)
    http://joschu.net/blog/kl-approx.html

    Args:
        logits: [..., V] of the policy; -inf forbids a token.
        ref_logits: [..., V] of the reference.
        temperature: > 0, divides both.

    Returns:
        [...] fp32 KL in nats (fp64 for fp64 logits). A token of policy probability 0 adds 0; one that only the
        reference forbids makes the KL infinite.

    Raises:
        ValueError: the shapes differ, the logits are scalars, or the temperature is not positive.
    """
    require_same_shape(logits=logits, ref_logits=ref_logits)
    logprobs = tempered(logits, temperature).log_softmax(-1)
    ref_logprobs = tempered(ref_logits, temperature).log_softmax(-1)
    probs = logprobs.exp()
    return (probs * (logprobs - ref_logprobs).masked_fill(probs == 0, 0.0)).sum(-1)
