"""What ends a completion: the model's eos, stop tokens and strings, the token of ``Truncation``, the length limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from tropism.rollouts.config import Sampling
from tropism.rollouts.stops import StopStrings
from tropism.texts import token_of_text
from tropism.types import FinishReason


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What ends completions, of one ``Sampling`` and one model."""

    eos_ids: frozenset[int]
    """The model's; empty where it has none."""
    stop_ids: frozenset[int]
    """Stop tokens."""
    stops: StopStrings | None
    """Stop strings."""
    end_id: int | None
    """The token of ``Truncation``."""
    after: int
    """The first index at which it ends a completion."""
    keeps_rest: bool
    """Whether what follows it stays in the rollouts."""
    fixed_length: bool
    """Whether all completions have ``longest`` tokens while they are sampled, and neither eos nor stops end any."""
    shortest: int
    """No stop string ends a completion of fewer tokens."""
    longest: int

    @classmethod
    def of(cls, sampling: Sampling, eos_ids: Sequence[int], tokenizer: Any) -> Self:
        """Args: eos_ids: the model's. tokenizer: for stop strings and end tokens that are given as text.

        Raises:
            ConfigError: a stop string that no text can hold, or an end that is not one token.
        """
        truncation = sampling.truncation
        return cls(
            eos_ids=frozenset(eos_ids),
            stop_ids=frozenset(sampling.stop_token_ids),
            stops=StopStrings(sampling.stop, tokenizer) if sampling.stop else None,
            end_id=None if truncation is None else end_token_id(truncation.token, tokenizer),
            after=0 if truncation is None else truncation.after,
            keeps_rest=truncation is not None and truncation.beyond == "train",
            fixed_length=sampling.fixed_length,
            shortest=sampling.min_new_tokens,
            longest=sampling.max_new_tokens,
        )

    def reason(self, ids: Sequence[int], *, spelled_stop: bool) -> FinishReason | None:
        """Why the completion ``ids`` ends with its newest token; None where it goes on.

        Args:
            spelled_stop: whether a stop string has appeared.
        """
        full = len(ids) == self.longest
        if self.fixed_length:
            return None if not full else "stop" if self._place(ids) is not None else "length"
        if ids[-1] in self.eos_ids:
            return "eos"
        if ids[-1] in self.stop_ids or (spelled_stop and len(ids) >= self.shortest):
            return "stop"
        if ids[-1] == self.end_id and len(ids) > self.after:
            return "stop"
        return "length" if full else None

    def visible(self, ids: Sequence[int]) -> int:
        """How many tokens of a whole completion rewards see: up to the end token, itself included, or all of them."""
        place = self._place(ids)
        return len(ids) if place is None else place + 1

    def kept(self, ids: Sequence[int]) -> int:
        """How many of them stay in the rollouts."""
        return len(ids) if self.keeps_rest else self.visible(ids)

    def _place(self, ids: Sequence[int]) -> int | None:
        if self.end_id is None:
            return None
        return next((index for index in range(self.after, len(ids)) if ids[index] == self.end_id), None)


def end_token_id(token: str | int, tokenizer: Any) -> int:
    """The id of ``Truncation.token``.

    Raises:
        ConfigError: a text that is not one token of the tokenizer.
    """
    return token if isinstance(token, int) else token_of_text(token, tokenizer, setting="sampling.truncation.token")
