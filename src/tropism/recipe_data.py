"""The data that a recipe names: prompts or demonstrations to train on, and the held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.data.demonstrations import Demonstration, make_demonstrations
from tropism.data.prompts import make_prompts
from tropism.data.split import train_eval_split
from tropism.errors import ConfigError
from tropism.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompts_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Prompts to train on, and held-out ones (none where the recipe holds out nothing).

    Args:
        context_length: most tokens that prompt and completion may have together; None: any number.

    Raises:
        TropismError: unusable data, or a prompt that leaves no room for the completion.
    """

    def read(data: Any) -> list[Prompt]:
        source, settings = _source_and_settings(data)
        return make_prompts(source, tokenizer, settings, max_length=prompt_room(recipe, context_length))

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


def prompt_room(recipe: Recipe, context_length: int | None) -> int | None:
    """Most tokens that a prompt may have beside its completion."""
    if context_length is None:
        return None
    room = context_length - recipe.sampling.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"sampling.max_new_tokens={recipe.sampling.max_new_tokens} leaves no room for a prompt in the model's "
            f"context of {context_length}"
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
