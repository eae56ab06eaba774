"""From a recipe to its episodes: those to train on, on a common scale, and the held-out ones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tropism.algorithms.ilql import ILQL
from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.data.episodes import ReturnScale, first_turns, read_episodes
from tropism.data.readers import Record, locate_records
from tropism.data.split import PromptsOfTexts, train_eval_split
from tropism.episodes import Episode, collate_episodes
from tropism.evaluation.method_loss import MethodLossEvaluation
from tropism.models.policy import Policy
from tropism.recipe_data import Texts, source_and_settings
from tropism.training.method_losses import MethodLosses
from tropism.training.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def episodes_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None, taken: int = 0
) -> Texts[Episode]:
    """Episodes to train on, and held-out ones, their returns on the scale of the former.

    ``eval_data`` may hold prompts alone where completions of them are measured, by a reward or by metrics; otherwise it
    holds episodes with their rewards.

    Args:
        taken: nothing stands before episodes.

    Raises:
        TropismError: unusable data, or returns that do not differ.
    """
    config = recipe.algorithm
    assert isinstance(config, ILQL)
    limit = config.max_length or context_length

    def read(source: Any, settings: DataConfig | None) -> list[tuple[Record, Episode]]:
        return read_episodes(source, tokenizer, settings, target=config.target, max_length=limit)

    source, settings = source_and_settings(recipe.data)
    records = locate_records(source)
    train, kept = read(records, settings), []
    held = None
    fraction = recipe.data.eval_fraction if isinstance(recipe.data, DataConfig) else 0.0
    if recipe.eval_data is not None:
        apart, its_settings = source_and_settings(recipe.eval_data)
        others = locate_records(apart)
        measured = recipe.reward is not None or bool(recipe.metrics)
        column = config.target.split(".")[0]
        if not measured or any(column in record.columns for record in others):
            kept = read(others, its_settings)
    elif fraction > 0 and settings is not None:
        first, first_settings = first_turns(records, settings)
        assert first_settings is not None
        prompts = PromptsOfTexts(first, first_settings, tokenizer)
        opening = {id(record): one for record, one in zip(records, first, strict=True)}
        train, kept = train_eval_split(
            train, fraction, seed=recipe.seed, key=lambda pair: prompts.key(opening[id(pair[0])])
        )
        held = prompts.readable(opening[id(record)] for record, _ in kept)
    texts = Texts(train=[one for _, one in train], held_out=[one for _, one in kept], held=held)
    if not config.normalise_returns:
        return texts
    scale = ReturnScale.of(texts.train)
    return replace(texts, train=scale.apply(texts.train), held_out=scale.apply(texts.held_out))


def episode_evaluation(
    recipe: Recipe, texts: Texts[Episode], *, algorithm: Any, policy: Policy, processes: Processes
) -> MethodLossEvaluation[Episode]:
    """The method's loss on held-out episodes."""
    trainer = recipe.trainer
    losses = MethodLosses(
        algorithm,
        policy,
        processes,
        max_tokens=2 * trainer.micro_batch_tokens,
        max_rows=trainer.micro_batch_size,
    )
    return MethodLossEvaluation(texts.held_out, collate=collate_episodes, losses=losses, weight=algorithm.weight)
