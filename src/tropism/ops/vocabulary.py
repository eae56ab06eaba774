"""Log-probs straight from hidden states: the vocabulary projection and its gradient without a graph of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tropism.ops.arguments import describe_shapes, require_positive, upcast

KEPT_BYTES = 256 * 2**20
"""Up to this much the backward pass finds the probabilities where the forward pass left them; beyond, it computes them
again, chunk by chunk."""


def linear_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, temperature: float = 1.0, chunk_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Log-prob of each id and entropy under softmax(hidden W^T / temperature).

    log p(id) = l_id - logsumexp(l),  H = logsumexp(l) - sum(p_v l_v),  l = hidden W^T / temperature

    Logits of more than ``chunk_size`` rows never exist in the forward pass. The gradient with respect to the logits,
    (onehot - p) / temperature, is written over the probabilities and multiplied on at once, so that neither log-softmax
    nor its backward pass keeps copies of [N, V].

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
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, chunk_size: int, recorded: bool
    ) -> tuple[Tensor, Tensor]:
        count, vocabulary = len(ids), weight.shape[0]
        wide = upcast(hidden[:0]).dtype
        trained = recorded and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        kept = trained and count * vocabulary * wide.itemsize <= KEPT_BYTES
        powers = hidden.new_empty((count if kept else 0, vocabulary), dtype=wide)
        logprobs, entropies, totals = (hidden.new_empty(count, dtype=wide) for _ in range(3))
        for begin in range(0, count, chunk_size):
            part = slice(begin, begin + chunk_size)
            logits = _logits(hidden[part], weight, temperature)
            tops = logits.amax(-1, keepdim=True)
            logits.sub_(tops)
            power = torch.exp(logits, out=powers[part]) if kept else logits.exp()
            total = power.sum(-1)
            log_total = total.log()
            logprobs[part] = logits.gather(-1, ids[part, None]).squeeze(-1) - log_total
            entropies[part] = log_total - torch.bmm(power[:, None], logits[:, :, None]).view(-1) / total
            totals[part] = total
        ctx.save_for_backward(hidden, weight, ids, totals)
        ctx.powers = powers if kept else None
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, totals = ctx.saved_tensors
        powers, ctx.powers = ctx.powers, None  # written over below: a second pass computes them again
        chunk_size = len(ids) if powers is not None else ctx.chunk_size
        scaled = gradients[0] / ctx.temperature
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for begin in range(0, len(ids), max(1, chunk_size)):
            part = slice(begin, begin + chunk_size)
            if powers is None:
                logits = _logits(hidden[part], weight, ctx.temperature)
                power = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
            else:
                power = powers
            # d log p(id) / d logit_v = onehot_v - p_v
            to_logits = power.mul_((-scaled[part] / totals[part])[:, None])
            to_logits.scatter_add_(-1, ids[part, None], scaled[part, None])
            to_logits = to_logits.to(weight.dtype)
            if to_hidden is not None:
                to_hidden[part] = to_logits @ weight
            if to_weight is not None:
                to_weight.addmm_(to_logits.T, hidden[part])
        return to_hidden, to_weight, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = upcast(hidden @ weight.T)
    return logits if temperature == 1.0 else logits.div_(temperature)
