"""The logit filters that sampling settings ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tropism.errors import ConfigError
from tropism.rollouts.allowed_tokens import read_allowed_tokens
from tropism.rollouts.config import Sampling
from tropism.rollouts.protocol import LogitFilter, SamplingModel
from tropism.rollouts.value_guidance import ValueGuidance


def filters_of(
    sampling: Sampling, model: SamplingModel, tokenizer: Any, eos_ids: Sequence[int], vocabulary: int
) -> list[LogitFilter]:
    """Guidance by values, and after it the transitions that are allowed.

    Raises:
        ConfigError: ``beta`` of a model without Q heads, or an unusable file of allowed tokens.
    """
    filters: list[LogitFilter] = []
    if sampling.beta:
        check_beta(sampling, values_actions=model.values_actions)
        filters.append(ValueGuidance(sampling.beta, model.advantages))
    if sampling.allowed_tokens is not None:
        filters.append(read_allowed_tokens(sampling.allowed_tokens, tokenizer, eos_ids, vocabulary))
    return filters


def check_filters(
    sampling: Sampling, tokenizer: Any, eos_ids: Sequence[int], vocabulary: int, *, values_actions: bool
) -> None:
    """The same checks before anything is sampled; raises what ``filters_of`` raises."""
    check_beta(sampling, values_actions=values_actions)
    if sampling.allowed_tokens is not None:
        read_allowed_tokens(sampling.allowed_tokens, tokenizer, eos_ids, vocabulary)


def check_beta(sampling: Sampling, *, values_actions: bool) -> None:
    """Whether there is something to guide by.

    Raises:
        ConfigError: ``beta`` of a model that does not value its tokens.
    """
    if sampling.beta and not values_actions:
        raise ConfigError(
            f"sampling.beta is {sampling.beta:g}, which weighs what the Q heads of a model make of each token, and "
            "this model has none; train one with algorithm: ilql and name its run folder, or leave beta at 0"
        )
