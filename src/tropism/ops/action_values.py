"""Values of all actions, of which few are asked for: a projection onto the vocabulary without a graph of [N, V]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tropism.ops.arguments import describe_shapes


def taken_and_logsumexp(
    hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, *, chunk_size: int = 128
) -> tuple[Tensor, Tensor]:
    """The value of each taken action, and the logsumexp of the values of all actions.

    q = hidden W^T + b;  taken = q_id,  total = log sum_v exp q_v

    Values of more than ``chunk_size`` rows never exist at once. The backward pass computes them again, chunk by chunk:
    d taken / d q_v = onehot_v and d total / d q_v = softmax(q)_v.

    Args:
        hidden: [N, H]. weight: [V, H] and bias: [V], of the same dtype.
        ids: [N] integers in 0..V-1.
        chunk_size: rows at a time.

    Returns:
        Two tensors [N] of the dtype of ``hidden``.

    Raises:
        ValueError: shapes that do not fit.
    """
    fits = hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or bias.shape != weight.shape[:1] or ids.shape != hidden.shape[:1]:
        shapes = describe_shapes(hidden=hidden, weight=weight, bias=bias, ids=ids)
        raise ValueError(f"hidden [N, H], weight [V, H], bias [V] and ids [N] are needed: {shapes}")
    taken, totals = _TakenAndLogsumexp.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, ids.long(), chunk_size
    )
    return taken, totals


class _TakenAndLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        taken, totals = hidden.new_empty(len(ids)), hidden.new_empty(len(ids))
        for begin in range(0, len(ids), chunk_size):
            part = slice(begin, begin + chunk_size)
            values = torch.addmm(bias, hidden[part], weight.T)
            taken[part] = values.gather(-1, ids[part, None]).squeeze(-1)
            totals[part] = values.logsumexp(-1)
        ctx.save_for_backward(hidden, weight, bias, ids, totals)
        ctx.chunk_size = chunk_size
        return taken, totals

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, totals = ctx.saved_tensors
        of_taken, of_totals = gradients
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for begin in range(0, len(ids), ctx.chunk_size):
            part = slice(begin, begin + ctx.chunk_size)
            to_values = torch.addmm(bias, hidden[part], weight.T).sub_(totals[part, None]).exp_()
            to_values.mul_(of_totals[part, None]).scatter_add_(-1, ids[part, None], of_taken[part, None])
            if to_hidden is not None:
                to_hidden[part] = to_values @ weight
            if to_weight is not None:
                to_weight.addmm_(to_values.T, hidden[part])
            if to_bias is not None:
                to_bias += to_values.sum(0)
        return to_hidden, to_weight, to_bias, None, None
