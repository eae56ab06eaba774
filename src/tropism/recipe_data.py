"""The data that a recipe names: prompts or demonstrations to train on, and the held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.data.demonstrations import Demonstration, make_demonstrations
from tropism.data.prompts import make_prompts
from tropism.data.scored import make_scored
from tropism.data.split import train_eval_split
from tropism.errors import ConfigError
from tropism.types import Prompt, ScoredText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompts_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None, taken: int = 0
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Prompts to train on, and held-out ones (none where the recipe holds out nothing).

    Args:
        context_length: most tokens that prompt and completion may have together; None: any number.
        taken: tokens of the context that stand before every prompt.

    Raises:
        TropismError: unusable data, or a prompt that leaves no room for the completion.
    """

    def read(data: Any) -> list[Prompt]:
        source, settings = _source_and_settings(data)
        return make_prompts(source, tokenizer, settings, max_length=prompt_room(recipe, context_length, taken=taken))

    return _parts(recipe, read)


def demonstrations_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None
) -> tuple[Sequence[Demonstration], Sequence[Demonstration]]:
    """Demonstrations to train on, and held-out ones; longer ones than the context (or ``max_length``) are cut.

    Raises:
        TropismError: unusable data.
    """
    config: Any = recipe.algorithm
    limit = config.max_length or context_length

    def read(data: Any) -> list[Demonstration]:
        source, settings = _source_and_settings(data)
        return make_demonstrations(
            source, tokenizer, settings, max_length=limit, completion_only=config.completion_only
        )

    return _parts(recipe, read)


def scored_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None, taken: int
) -> tuple[Sequence[ScoredText], Sequence[ScoredText]]:
    """Scored texts to train on, and held-out ones; longer ones than the context (or ``max_length``) lose their end.

    ``eval_data`` holds texts with rewards only where the recipe has no reward to score samples by.

    Args:
        taken: tokens of the context that stand before every text.

    Raises:
        TropismError: unusable data.
    """
    config: Any = recipe.algorithm
    limit = config.max_length or context_length
    room = None if limit is None else limit - taken
    if room is not None and room < 2:
        raise ConfigError(f"what asks for the rewards takes {taken} tokens, which leaves no room for text in {limit}")

    def read(data: Any) -> list[ScoredText]:
        source, settings = _source_and_settings(data)
        return make_scored(source, tokenizer, settings, targets=config.targets, max_length=room)

    if recipe.eval_data is not None and recipe.reward is not None:
        return read(recipe.data), []
    return _parts(recipe, read)


def prompt_room(recipe: Recipe, context_length: int | None, *, taken: int = 0) -> int | None:
    """Most tokens that a prompt may have beside its completion and ``taken`` further ones."""
    if context_length is None:
        return None
    room = context_length - recipe.sampling.max_new_tokens - taken
    if room < 1:
        before = f" and {taken} for what asks for the rewards" if taken else ""
        raise ConfigError(
            f"sampling.max_new_tokens={recipe.sampling.max_new_tokens}{before} leaves no room for a prompt in the "
            f"model's context of {context_length}"
        )
    return room


def _parts(recipe: Recipe, read: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    items = read(recipe.data)
    if recipe.eval_data is not None:
        return items, read(recipe.eval_data)
    fraction = recipe.data.eval_fraction if isinstance(recipe.data, DataConfig) else 0.0
    return train_eval_split(items, fraction, seed=recipe.seed) if fraction > 0 else (items, [])


def _source_and_settings(data: Any) -> tuple[Any, DataConfig | None]:
    """Readers take the data itself, or its configuration."""
    if isinstance(data, DataConfig):
        return data, data
    if isinstance(data, (str, Path)):
        config = DataConfig(path=str(data))
        return config, config
    return data, None
