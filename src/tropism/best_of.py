"""The best of several completions of a prompt by a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from tropism.errors import ConfigError, RewardError
from tropism.rewards import RewardConfig, RewardHarness
from tropism.texts import plain_text
from tropism.types import RewardInputs


@dataclass(frozen=True, kw_only=True)
class BestCompletion:
    """The best of n completions of one prompt."""

    prompt: Any
    """As it was given: text, or chat messages."""
    completion: str
    """The one with the highest reward; the first of equals."""
    reward: float
    """The plain weighted sum of its terms, neither clipped nor scaled."""
    rewards: tuple[float, ...] = field(repr=False)
    """Of all n, in the order in which they were sampled; NaN where the reward had no opinion."""


def best_completions(
    sample: Callable[[int], RewardInputs], reward: Any, *, n: int, allow_code: bool = False
) -> list[BestCompletion]:
    """The best completion of each prompt.

    Args:
        sample: gives so many completions of every prompt, those of one prompt together; called once.
        reward: what a recipe's reward may be.
        allow_code: let the reward name code: ``module:function`` or ``file.py:function``.

    Raises:
        ConfigError: n < 1, or a reward that cannot work; before anything is sampled.
        RewardError: a function failed, or had no opinion on any completion of a prompt.
    """
    if n < 1:
        raise ConfigError(f"n must be at least 1, got {n}")
    with closing(RewardHarness(RewardConfig.of(reward), allow_code=allow_code)) as harness:
        inputs = sample(n)
        scored = harness.score(inputs, update_moments=False, unscaled=True)
    totals = scored.totals.double().masked_fill(~scored.scored, math.nan).tolist()
    return [_best(inputs, totals, begin, begin + n) for begin in range(0, len(inputs), n)]


def _best(inputs: RewardInputs, totals: Sequence[float], begin: int, end: int) -> BestCompletion:
    known = [place for place in range(begin, end) if not math.isnan(totals[place])]
    if not known:
        raise RewardError(
            f"the reward had no opinion on any of the {end - begin} completions of prompt {begin // (end - begin)} "
            f"({plain_text(inputs.prompts[begin])!r:.80}), so none is the best; leave the prompt out, or let the "
            "reward return a number"
        )
    best = max(known, key=totals.__getitem__)
    return BestCompletion(
        prompt=inputs.prompts[begin],
        completion=text_of(inputs.completions[best]),
        reward=totals[best],
        rewards=tuple(totals[begin:end]),
    )


def text_of(completion: Any) -> str:
    """The text of a completion, also of one that is an assistant's message."""
    return completion if isinstance(completion, str) else str(completion[0]["content"])
