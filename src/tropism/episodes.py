"""Episodes: texts of one or several turns with what was paid for them, as records and as batches: the data of ILQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.types import Batch, pad_rows


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One text: a prompt, and what follows it, of which some tokens are actions.

    ``[bos] Hi [Hello eos] How are you? [Fine eos]``, with the outputs in brackets, is the prompt ``(bos, Hi)`` and the
    completion ``(Hello, eos, How, are, you, ?, Fine, eos)``; the mask is true at the first two and the last two.
    """

    prompt_ids: tuple[int, ...]
    """Token ids that are read only; never empty."""
    completion_ids: tuple[int, ...]
    """Token ids that follow; never empty."""
    loss_mask: tuple[bool, ...]
    """Which of them are actions; at least one, and the last."""
    rewards: tuple[float, ...]
    """Of each completion token; 0 at those that are no actions."""

    @property
    def total(self) -> float:
        """The return of the whole episode, undiscounted."""
        return sum(self.rewards)


@dataclass(frozen=True, kw_only=True)
class EpisodeBatch(Batch):
    """Episodes to learn from; the actions are where ``loss_mask`` is true."""

    rewards: Tensor
    """[B, T] fp32, 0 at tokens that are no actions."""


def collate_episodes(items: Sequence[Episode]) -> EpisodeBatch:
    """A batch of episodes: prompts padded on the left, completions on the right."""
    if not items:
        raise ValueError("no episodes to collate")
    return EpisodeBatch(
        prompt_ids=pad_rows([item.prompt_ids for item in items], left=True),
        prompt_lengths=torch.tensor([len(item.prompt_ids) for item in items]),
        completion_ids=pad_rows([item.completion_ids for item in items]),
        completion_lengths=torch.tensor([len(item.completion_ids) for item in items]),
        loss_mask=pad_rows([item.loss_mask for item in items], value=False, dtype=torch.bool),
        rewards=pad_rows([item.rewards for item in items], value=0.0, dtype=torch.float32),
    )
