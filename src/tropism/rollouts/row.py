"""Completions in the making: one row each, sampled by as many at once as memory holds, and put together at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tropism.ops.slots import without_slots
from tropism.out_of_memory import BatchSize, is_out_of_memory, reason_of
from tropism.rollouts.config import Sampling
from tropism.rollouts.ends import Ends
from tropism.types import FinishReason, Rollouts, pad_rows


@dataclass
class Row:
    """One completion in the making."""

    index: int
    """Its place in the result."""
    prefixes: tuple[tuple[int, ...], ...]
    """Token ids of each stream's prefix; the first is the prompt."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    behaviour_logprobs: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    spelled_stop: bool = False
    """Whether a stop string has appeared, perhaps before the completion may end."""
    state: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def prompt(self) -> Sequence[int]:
        """The ids of the first prefix that are text."""
        return without_slots(self.prefixes[0])

    def restarted(self) -> Row:
        """The same completion with nothing sampled yet."""
        return Row(index=self.index, prefixes=self.prefixes)


def sampled_by_parts(
    rows: Sequence[Row], decode: Callable[[Sequence[Row], int], None], size: BatchSize, batch_size: int
) -> list[Row]:
    """Rows with their completions, in the order given.

    Where memory runs out those that have ended stay, and the others begin again, half as many at once. Randomness is
    keyed, so that they become what they would have become.

    Args:
        decode: gives rows their completions; its second argument is how many may be decoded at once.
        size: how many streams memory has been found to hold. batch_size: how many there shall be at most.

    Raises:
        NoRoomError: a single row does not fit.
    """
    done: dict[int, Row] = {}
    waiting, streams = list(rows), len(rows[0].prefixes)
    while waiting:
        width = min(len(waiting), max(1, size.at_most(batch_size) // streams))
        reason = None
        try:
            decode(waiting, width)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if width == 1:
                raise size.no_room(error) from error
            reason = reason_of(error)
        done |= {row.index: row for row in waiting if row.finish_reason is not None}
        waiting = [row.restarted() for row in waiting if row.finish_reason is None]
        if reason is not None:
            size.halve(width * streams, reason)
    return [done[row.index] for row in rows]


def collected(rows: Sequence[Row], sampling: Sampling, ends: Ends) -> Rollouts:
    """The rollouts that rows with their completions make up."""
    reasons: list[FinishReason] = []
    for row in rows:
        assert row.finish_reason is not None
        reasons.append(row.finish_reason)
    prompts = [row.prefixes[0] for row in rows]
    kept = [ends.kept(row.ids) for row in rows]

    def numbers(name: str) -> Tensor:
        given = [getattr(row, name)[:length] for row, length in zip(rows, kept, strict=True)]
        return pad_rows(given, value=0.0, dtype=torch.float32)

    return Rollouts(
        prompt_ids=pad_rows(prompts, left=True),
        prompt_lengths=torch.tensor([len(ids) for ids in prompts]),
        completion_ids=pad_rows([row.ids[:length] for row, length in zip(rows, kept, strict=True)]),
        completion_lengths=torch.tensor(kept),
        logprobs=numbers("logprobs"),
        behaviour_logprobs=numbers("behaviour_logprobs"),
        values=numbers("values") if rows[0].values else None,
        finish_reasons=tuple(reasons),
        visible_lengths=torch.tensor([ends.visible(row.ids) for row in rows]) if ends.keeps_rest else None,
        temperature=sampling.softmax_temperature,
    )
