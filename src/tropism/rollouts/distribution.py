"""From logits to one sampled token per row, with its log-probs: penalties, truncation and the draw itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tropism.ops import truncated
from tropism.rollouts.config import Sampling

LOG2_E = 1 / math.log(2)
BLOCK = 256
"""Tokens per block of the two-level inverse CDF."""


def penalise_repetition(logits: Tensor, ids: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits [R, V] of tokens in ``ids`` divided (positive) or multiplied (negative) by ``penalty``.

    CTRL, https://arxiv.org/abs/1909.05858.
    """
    # Repeats fill the shorter rows up: a token written twice gets the same value twice.
    longest = max(len(seen) for seen in ids)
    index = torch.tensor([[*seen, *[seen[-1]] * (longest - len(seen))] for seen in ids], device=logits.device)
    values = logits.gather(-1, index)
    return logits.scatter(-1, index, torch.where(values > 0, values / penalty, values * penalty))


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Tempered logits [..., V] with -inf outside the top-k, top-p and min-p sets, in that order, as in transformers."""
    return truncated(logits, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row by the inverse CDF of softmax(logits [R, V]) at ``uniforms`` [R] (float64 in [0, 1)).

    Exact to float64 sums: blocks of the vocabulary are summed first, then the block that holds the answer is searched,
    which costs one pass instead of a cumulative sum (or a sort) over the whole vocabulary. A token of probability zero
    is never drawn.

    Returns:
        ids [R] of the tokens, and their log-probs [R], which fall out of the same pass (NaN where the logits are no
        distribution).
    """
    if logits.device.type == "mps":  # has no float64
        tokens, logprobs = draw(logits.cpu(), uniforms)
        return tokens.to(logits.device), logprobs.to(logits.device)
    rows, vocabulary = logits.shape
    logits = logits.float()
    tops = logits.amax(-1, keepdim=True)
    weights = (logits - tops).mul_(LOG2_E).exp2_()  # half the time of exp_
    blocks = -(-vocabulary // BLOCK)
    if vocabulary % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, blocks * BLOCK - vocabulary))
    weights = weights.view(rows, blocks, BLOCK)
    sums = weights.sum(-1, dtype=torch.float64)
    cumulative = sums.cumsum(-1)
    goal = uniforms[:, None].to(cumulative) * cumulative[:, -1:]
    block = _first_above(cumulative, goal, sums)
    before = (cumulative - sums).gather(-1, block)
    inside = weights.gather(1, block[:, :, None].expand(-1, 1, BLOCK)).squeeze(1).double()
    tokens = block * BLOCK + _first_above(inside.cumsum(-1), goal - before, inside)
    logprobs = (logits.gather(-1, tokens) - tops).double() - cumulative[:, -1:].log()
    return tokens.squeeze(-1), logprobs.squeeze(-1).float()


def _first_above(cumulative: Tensor, goal: Tensor, weights: Tensor) -> Tensor:
    """[R, 1] first index with ``cumulative > goal`` and a weight above 0; the last such weight where rounding hides it.

    Index 0 where no weight is above 0 (logits that are not numbers): the caller sees it by the token's log-prob.
    """
    index = torch.arange(cumulative.shape[-1], device=cumulative.device)
    possible = weights > 0
    first = torch.where(possible & (cumulative > goal), index, index.numel()).amin(-1, keepdim=True)
    last = torch.where(possible, index, 0).amax(-1, keepdim=True)
    return torch.where(first < index.numel(), first, last)
