"""What a sampler refuses before it computes anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tropism.errors import ConfigError
from tropism.ops.slots import without_slots
from tropism.rollouts.config import Sampling
from tropism.rollouts.ends import end_token_id


def check_context(
    prefixes: Sequence[tuple[tuple[int, ...], ...]],
    sampling: Sampling,
    limit: int | None,
    *,
    decoder_prefix: Sequence[int] | None = None,
) -> None:
    """Whether every prompt has tokens, and room for its completion.

    Args:
        limit: most tokens of a row; None: any number.
        decoder_prefix: of an encoder-decoder, whose prompts and completions (behind this prefix) are rows of their own.

    Raises:
        ConfigError: names the first that has not.
    """
    apart, new = decoder_prefix is not None, sampling.max_new_tokens
    if apart and limit is not None and len(decoder_prefix or ()) + new > limit:
        raise ConfigError(
            f"max_new_tokens={new} and the {len(decoder_prefix or ())} tokens that the decoder begins with exceed the "
            f"{limit} tokens that it may read; lower sampling.max_new_tokens"
        )
    for index, prefix in enumerate(prefixes):
        longest = max(len(ids) for ids in prefix)
        if min(len(ids) for ids in prefix) == 0:
            raise ConfigError(f"prompt {index} has no tokens; the model needs at least one to start from")
        if apart and limit is not None and longest > limit:
            raise ConfigError(
                f"prompt {index} has {longest} tokens, and the encoder reads {limit} at most; shorten the prompt"
            )
        if not apart and limit is not None and longest + new > limit:
            raise ConfigError(
                f"prompt {index} has {longest} tokens; with max_new_tokens={new} that exceeds the "
                f"model's context of {limit}: shorten the prompt or lower sampling.max_new_tokens"
            )


def check_ids(prefixes: Sequence[tuple[tuple[int, ...], ...]], vocabulary: int, *, slots: bool) -> None:
    """Whether the model has an embedding for every id.

    Args:
        slots: whether reward slots may stand in front of a prompt.

    Raises:
        ConfigError: names the first prompt with an id of its own.
    """
    for index, prefix in enumerate(prefixes):
        place = f"prompt {index}"
        _check_known([i for ids in prefix for i in (_text(ids, place) if slots else ids)], place, vocabulary)


def check_ends(sampling: Sampling, tokenizer: Any, vocabulary: int) -> None:
    """Whether the tokens that end completions are tokens of the model.

    Raises:
        ConfigError: names the setting that is not.
    """
    _check_known(sampling.stop_token_ids, "sampling.stop_token_ids", vocabulary)
    if sampling.truncation is not None:
        end = end_token_id(sampling.truncation.token, tokenizer)
        _check_known([end], "sampling.truncation.token", vocabulary)


def _check_known(ids: Sequence[int], place: str, vocabulary: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ConfigError(f"{place} names a token beyond the model's vocabulary, the ids 0 to {vocabulary - 1}")


def _text(ids: Sequence[int], where: str) -> Sequence[int]:
    try:
        return without_slots(ids)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
