"""Rewards of completions in the making: after every token, and once a completion has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tropism.errors import RewardError
from tropism.rewards import RewardConfig, RewardHarness
from tropism.rewards.raw import ReturnError, checked_values
from tropism.types import FinishReason, Messages, Prompt, RewardInputs

TokenReward = Callable[[Any, list[list[str]], bool], Any]
"""``get_reward(input_item, predicted_list, finish)``."""


@dataclass(kw_only=True)
class Sample:
    """One completion in the making."""

    row: int
    """Its row in the decoding."""
    ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    """The same as the vocabulary's strings."""
    text: str | Messages = ""
    """As rewards see it."""
    rewards: list[float] = field(default_factory=list)
    """One per token."""
    finish_reason: FinishReason | None = None
    spelled_stop: bool = False


def checked_rewards(returned: Any, samples: int, where: str) -> list[float]:
    """What ``get_reward`` returned, as one number per sample.

    Args:
        returned: a number, which then counts for every sample, or a list, tuple, array or tensor of one number per
            sample; None among them is no opinion, and counts as 0.
        where: begins error messages.

    Raises:
        RewardError: anything else, or a number that is not finite.
    """
    several = isinstance(returned, str | bytes | dict) or getattr(returned, "ndim", 1) != 0
    single = isinstance(returned, (bool, int, float)) or not several
    try:
        values = checked_values([returned] * samples if single else returned, [None] * samples)
    except ReturnError as error:
        hint = " A number by itself would count for every sample." if samples > 1 and not single else ""
        raise RewardError(f"{where}: {str(error).replace('completion', 'sample')}.{hint}") from error
    return [0.0 if value is None else float(value) for value in values]  # type: ignore[arg-type]


def asked(function: TokenReward, item: Any, samples: Sequence[Sample], finish: bool, where: str) -> list[float]:
    """What ``get_reward`` says, one number per sample.

    Raises:
        RewardError: it raised, or returned something unusable.
    """
    try:
        returned = function(item, [list(sample.tokens) for sample in samples], finish)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"{where} raised {type(error).__name__}: {error}") from error
    return checked_rewards(returned, len(samples), where)


class Judge:
    """A recipe's reward, of completions that have ended.

    Args:
        reward: what a recipe's reward may be.
        allow_code: let it name code: ``module:function`` or ``file.py:function``.

    Raises:
        ConfigError: a reward that cannot work.
    """

    def __init__(self, reward: Any, *, allow_code: bool) -> None:
        self._harness = RewardHarness(RewardConfig.of(reward), allow_code=allow_code)

    def rewards(self, ended: Sequence[tuple[Prompt, Sample]]) -> list[list[float]]:
        """One number per token of each sample: its per-token rewards, and at the last token that of the whole.

        Raises:
            RewardError: a function raised or returned something unusable.
        """
        prompts = [prompt for prompt, _ in ended]
        samples = [sample for _, sample in ended]
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        reasons = [sample.finish_reason for sample in samples]
        inputs = RewardInputs(
            prompts=[prompt.text for prompt in prompts],
            completions=[sample.text for sample in samples],
            completion_ids=[list(sample.ids) for sample in samples],
            finish_reasons=[reason for reason in reasons if reason is not None],
            columns={name: [prompt.columns.get(name) for prompt in prompts] for name in names},
        )
        scored = self._harness.score(inputs)
        found: list[list[float]] = []
        for row, sample in enumerate(samples):
            per_token = [0.0] * len(sample.ids)
            if scored.per_token is not None:
                per_token = scored.per_token[row, : len(sample.ids)].double().tolist()
            per_token[-1] += float(scored.per_completion[row])
            found.append(per_token)
        return found

    def close(self) -> None:
        """End what the reward has running."""
        self._harness.close()
