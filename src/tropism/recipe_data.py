"""The data that a recipe names: prompts or demonstrations to train on, and the held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tropism.algorithms.base import Reads
from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.data.demonstrations import Demonstration, read_demonstrations
from tropism.data.encoding import room_for_prompt
from tropism.data.episodes import first_turns
from tropism.data.prompts import make_prompts
from tropism.data.readers import Record, locate_records
from tropism.data.scored import read_scored, refuse_equal
from tropism.data.split import PromptsOfTexts, prompt_key, train_eval_split
from tropism.errors import ConfigError
from tropism.types import Prompt, ScoredText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")
Held = tuple[list[Record], DataConfig]
"""Records as ``make_prompts`` reads them."""


@dataclass(frozen=True, kw_only=True)
class Texts(Generic[T]):
    """Texts to learn, parted by their prompts."""

    train: Sequence[T]
    held_out: Sequence[T]
    """Those whose loss is evaluated; none where the recipe holds out nothing, or prompts only."""
    held: Held | None = None
    """The records of the held-out part of ``data``, to be read as prompts; None where nothing of it is held out."""
    trained: Held | None = None
    """The records of what is trained on, where these do not say themselves what their prompt is; else None."""


def prompts_of(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None,
    taken: int = 0,
    texts: Texts[Any] | None = None,
    leave_out: bool = False,
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Prompts to train on, and held-out ones (none where the recipe holds out nothing).

    A method that learns texts samples no training prompts, so there are none of it where others are held out. Its
    held-out prompts are those of its held-out texts, each once, with the columns of its first text.

    Args:
        context_length: most tokens that prompt and completion may have together; None: any number.
        taken: tokens of the context that stand before every prompt.
        texts: of a method that learns texts, where they have been read already.
        leave_out: training prompts of such a method that leave no room for a completion are left out, not refused.

    Raises:
        TropismError: unusable data, or a prompt that leaves no room for the completion.
    """
    room = prompt_room(recipe, tokenizer, context_length, taken=taken)

    def read(source: Any, settings: DataConfig | None, **options: Any) -> list[Prompt]:
        if recipe.algorithm.reads == "episodes":
            source, settings = first_turns(locate_records(source), settings)
        return make_prompts(source, tokenizer, settings, max_length=room, **options)

    if recipe.algorithm.reads == "prompts":
        prompts = read(*source_and_settings(recipe.data))
        if recipe.eval_data is not None:
            return prompts, read(*source_and_settings(recipe.eval_data))
        fraction = _fraction(recipe)
        return train_eval_split(prompts, fraction, seed=recipe.seed) if fraction > 0 else (prompts, [])
    within = recipe.algorithm.reads == "pairs"  # which may hold their prompts in both completions alone
    if recipe.eval_data is not None and not within:
        return [], _distinct(read(*source_and_settings(recipe.eval_data)))
    if recipe.eval_data is not None or _fraction(recipe) > 0:
        of_texts = _reader_of(recipe.algorithm.reads)
        held: Any = (texts or of_texts(recipe, tokenizer, context_length=context_length, taken=taken)).held
        return [], _distinct(read(*held))
    source, settings = (texts and texts.trained) or source_and_settings(recipe.data)
    shortened = settings is not None and settings.overlong != "error"
    return read(source, settings, overlong="leave_out" if leave_out and not shortened else None), []


def _reader_of(reads: Reads) -> Callable[..., Texts[Any]]:
    """What reads the texts of a method."""
    if reads in ("pairs", "opinions"):
        from tropism.recipe_pairs import opinions_of, pairs_of

        return pairs_of if reads == "pairs" else opinions_of
    if reads == "episodes":
        from tropism.recipe_episodes import episodes_of

        return episodes_of
    return scored_of if reads == "scored" else demonstrations_of


def demonstrations_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None, taken: int = 0
) -> Texts[Demonstration]:
    """Demonstrations to train on, and held-out ones; longer ones than the context (or ``max_length``) are cut.

    Args:
        taken: nothing stands before demonstrations.

    Raises:
        TropismError: unusable data.
    """
    config: Any = recipe.algorithm
    limit = config.max_length or context_length

    def read(source: Any, settings: DataConfig | None) -> list[tuple[Record, Demonstration]]:
        return read_demonstrations(
            source, tokenizer, settings, max_length=limit, completion_only=config.completion_only
        )

    return part_texts(recipe, tokenizer, read, recipe.eval_data)


def scored_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None, taken: int
) -> Texts[ScoredText]:
    """Scored texts to train on, and held-out ones; longer ones than the context (or ``max_length``) lose their end.

    ``eval_data`` holds texts with rewards only where the recipe has no reward to score samples by.

    Args:
        taken: tokens of the context that stand before every text.

    Raises:
        TropismError: unusable data, or texts to train on that do not differ in a reward.
    """
    config: Any = recipe.algorithm
    limit = config.max_length or context_length
    room = None if limit is None else limit - taken
    if room is not None and room < 2:
        raise ConfigError(f"what asks for the rewards takes {taken} tokens, which leaves no room for text in {limit}")

    def read(source: Any, settings: DataConfig | None) -> list[tuple[Record, ScoredText]]:
        return read_scored(source, tokenizer, settings, targets=config.targets, max_length=room)

    parted = part_texts(recipe, tokenizer, read, recipe.eval_data if recipe.reward is None else None)
    refuse_equal(parted.train, config.targets)
    return parted


def prompt_room(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context_length: int | None, *, taken: int = 0
) -> int | None:
    """Most tokens that a prompt may have beside its completion and ``taken`` further ones."""
    room = room_for_prompt(tokenizer, context_length, new=recipe.sampling.max_new_tokens, taken=taken)
    if room is not None and room < 1:
        before = f" and {taken} for what asks for the rewards" if taken else ""
        raise ConfigError(
            f"sampling.max_new_tokens={recipe.sampling.max_new_tokens}{before} leaves no room for a prompt in the "
            f"model's context of {context_length}"
        )
    return room


def part_texts(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    read: Callable[[Any, DataConfig | None], list[tuple[Record, T]]],
    held_out: Any,
) -> Texts[T]:
    """Texts of the data, parted by their prompts as the records have them, before these become ids.

    Args:
        held_out: separate data with texts whose loss is evaluated; None: there is none.
    """
    source, settings = source_and_settings(recipe.data)
    fraction = _fraction(recipe)
    if recipe.eval_data is not None or fraction == 0 or settings is None:
        kept = [] if held_out is None else read(*source_and_settings(held_out))
        return Texts(train=[text for _, text in read(source, settings)], held_out=[text for _, text in kept])
    records = locate_records(source)
    prompts = PromptsOfTexts(records, settings, tokenizer)
    train, kept = train_eval_split(
        read(records, settings), fraction, seed=recipe.seed, key=lambda pair: prompts.key(pair[0])
    )
    return Texts(
        train=[text for _, text in train],
        held_out=[text for _, text in kept],
        held=prompts.readable(record for record, _ in kept),
    )


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Every prompt once: the first of those that are equal."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt_key(prompt), prompt)
    return list(first.values())


def _fraction(recipe: Recipe) -> float:
    return recipe.data.eval_fraction if isinstance(recipe.data, DataConfig) else 0.0


def source_and_settings(data: Any) -> tuple[Any, DataConfig | None]:
    """Readers take the data itself, or its configuration."""
    if isinstance(data, DataConfig):
        return data, data
    if isinstance(data, (str, Path)):
        config = DataConfig(path=str(data))
        return config, config
    return data, None
