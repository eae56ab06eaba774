"""Log-probs under the distribution that remains after a repetition penalty, top-k, top-p and min-p."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tropism.ops import entropy, penalised, tempered, token_logprobs, truncated
from tropism.types import Filtering


@dataclass(frozen=True)
class Before:
    """What stands before each of N chosen completion tokens of a batch."""

    prompt_ids: Tensor
    """[B, P] padded on the left; of an encoder-decoder what its decoder reads before the completion."""
    prompt_lengths: Tensor
    """[B]."""
    completion_ids: Tensor
    """[B, T]."""
    rows: Tensor
    """[N] row of each chosen token."""
    tokens: Tensor
    """[N] its index in the completion."""

    def seen(self, part: slice, vocabulary: int) -> Tensor:
        """[n, V] bool: tokens of the prompt, or of the completion before the chosen one."""
        rows, tokens = self.rows[part], self.tokens[part]
        wide = self.prompt_ids.shape[1]
        ids = torch.cat([self.prompt_ids, self.completion_ids], dim=1)[rows]
        columns = torch.arange(ids.shape[1], device=ids.device)[None, :]
        real = (columns >= wide - self.prompt_lengths[rows][:, None]) & (columns < wide + tokens[:, None])
        # Pads are counted in a column of their own.
        seen = torch.zeros(len(rows), vocabulary + 1, dtype=torch.bool, device=ids.device)
        return seen.scatter_(1, torch.where(real, ids, vocabulary), True)[:, :vocabulary]


def filtered_logprobs(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    ids: Tensor,
    before: Before,
    filtering: Filtering,
    *,
    temperature: float,
    chunk_size: int,
    entropy_gradient: bool,
) -> dict[str, Tensor]:
    """Log-probs of ``ids`` [N] and entropies [N] of the filtered distribution, from hidden states [N, H] by chunks.

    Which tokens remain has no gradient. A token outside the set has the log-prob -inf, and no gradient either.

    Args:
        logits_of: the vocabulary projection, [n, H] -> [n, V].
        chunk_size: tokens whose logits exist at once; several chunks are computed again in the backward pass.
        entropy_gradient: whether the entropy has one.
    """

    def chunk(part: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        span = slice(begin, begin + len(part))
        logits = logits_of(part).float()
        if filtering.repetition_penalty != 1:
            seen = before.seen(span, logits.shape[-1])
            logits = penalised(logits, seen, penalty=filtering.repetition_penalty)
        logits = truncated(
            tempered(logits, temperature), top_k=filtering.top_k, top_p=filtering.top_p, min_p=filtering.min_p
        )
        spread = entropy(logits if entropy_gradient else logits.detach())
        return token_logprobs(logits, ids[span]), spread

    pieces = [(piece, chunk_size * index) for index, piece in enumerate(hidden.split(chunk_size))]
    if len(pieces) > 1 and torch.is_grad_enabled():
        parts = [checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces]
    else:
        parts = [chunk(*piece) for piece in pieces]
    logprobs, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
    return {"logprobs": logprobs, "entropy": entropies}
