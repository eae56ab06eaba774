"""Log-probs straight from hidden states: the vocabulary projection and its gradient without a graph of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tropism.ops.arguments import describe_shapes, require_positive, upcast

KEPT_BYTES = 256 * 2**20
"""Up to this much the backward pass finds the probabilities where the forward pass left them; beyond, it computes them
again, chunk by chunk."""
CACHED_BYTES = (256 * 2**20, 2 * 2**20)
"""How much of the logits is exponentiated at a time, on accelerators and on the CPU (what its caches hold)."""
NARROWEST = 16
"""Fewer columns go through products of other kernels, whose rounding depends on where the matrices lie in memory: equal
policies would differ by a rounding error."""


def linear_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, temperature: float = 1.0, chunk_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Log-prob of each id and entropy under softmax(hidden W^T / temperature).

    log p(id) = l_id - logsumexp(l),  H = logsumexp(l) - sum(p_v l_v),  l = hidden W^T / temperature

    Logits of more than ``chunk_size`` rows exist only where the backward pass finds them kept. The gradient with
    respect to the logits, (onehot - p) / temperature, is written over the probabilities and multiplied on at once, so
    that neither log-softmax nor its backward pass keeps copies of [V, N].

    Args:
        hidden: [N, H]. weight: [V, H], of the same dtype, which is that of the products.
        ids: [N] integers in 0..V-1.
        temperature: > 0.

    Returns:
        log-probs [N] and entropies [N], at least fp32, in nats. Entropies carry no gradient.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    require_positive("temperature", temperature)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or ids.shape != hidden.shape[:1]:
        shapes = describe_shapes(hidden=hidden, weight=weight, ids=ids)
        raise ValueError(f"hidden [N, H], weight [V, H] and ids [N] are needed: {shapes}")
    logprobs, entropies = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, ids.long(), temperature, chunk_size, torch.is_grad_enabled()
    )
    return logprobs, entropies


class _LinearLogprobs(torch.autograd.Function):
    """Logits are laid out as [V, n], weight times hidden^T: the CPU's matrix product is up to half faster that way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, chunk_size: int, recorded: bool
    ) -> tuple[Tensor, Tensor]:
        count, vocabulary = len(ids), weight.shape[0]
        wide = upcast(hidden[:0]).dtype
        trained = recorded and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        kept = trained and count * vocabulary * wide.itemsize <= KEPT_BYTES
        step = max(1, count if kept else chunk_size)
        powers = None
        logprobs, entropies, totals = (hidden.new_empty(count, dtype=wide) for _ in range(3))
        for begin in range(0, count, step):
            part = slice(begin, begin + step)
            logits = _logits(hidden[part], weight, temperature)
            tops = logits.amax(0)
            chosen = logits.gather(0, ids[None, part]).squeeze(0) - tops
            total, weighted = _exponentiate(logits, tops)
            log_total = total.log()
            logprobs[part] = chosen - log_total
            entropies[part] = log_total - weighted / total
            totals[part] = total
            powers = logits if kept else None
        ctx.save_for_backward(hidden, weight, ids, totals)
        ctx.powers = powers
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, totals = ctx.saved_tensors
        powers, ctx.powers = ctx.powers, None  # written over below: a second pass computes them again
        step = max(1, ctx.chunk_size if powers is None else len(ids))
        scaled = gradients[0] / ctx.temperature
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for begin in range(0, len(ids), step):
            part = slice(begin, begin + step)
            if powers is None:
                logits = _logits(hidden[part], weight, ctx.temperature)
                power = logits.sub_(logits.amax(0)).exp_()
            else:
                power = powers
            # d log p(id) / d logit_v = onehot_v - p_v
            to_logits = power.mul_(-scaled[part] / totals[part])
            to_logits.scatter_add_(0, ids[None, part], scaled[None, part])
            to_logits = to_logits.to(weight.dtype)
            if to_hidden is not None:
                to_hidden[part] = to_logits.T @ weight
            if to_weight is not None:
                to_weight.addmm_(to_logits, hidden[part])
        return to_hidden, to_weight, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[V, n], at least fp32."""
    count = len(hidden)
    missing = max(0, NARROWEST - count)
    if missing:
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, missing))
    logits = upcast(weight @ hidden.T)[:, :count]
    return logits if temperature == 1.0 else logits.div_(temperature)


def _exponentiate(logits: Tensor, tops: Tensor) -> tuple[Tensor, Tensor]:
    """Writes p = exp(l - top) over the logits [V, n]; gives sum(p) and sum(p (l - top)) over V, each [n]."""
    total, weighted = torch.zeros_like(tops), torch.zeros_like(tops)
    for rows in logits.split(max(1, CACHED_BYTES[logits.device.type == "cpu"] // max(1, tops.nbytes))):
        shifted = rows.sub_(tops)
        powers = shifted.exp()
        total += powers.sum(0)
        weighted += powers.mul(shifted).sum(0)
        rows.copy_(powers)
    return total, weighted
