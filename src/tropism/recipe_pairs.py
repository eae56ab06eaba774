"""From a recipe to its preferences: pairs or opinions to train on, and the held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tropism.algorithms.dpo import DPO
from tropism.algorithms.kto import KTO
from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.data.opinions import read_opinions, refuse_one_kind
from tropism.data.pairs import read_pairs
from tropism.data.readers import Record
from tropism.data.split import prompt_key, train_eval_split
from tropism.evaluation.preferences import HeldOut, PreferenceEvaluation
from tropism.preferences import Opinion, Pair
from tropism.recipe_data import Held, Texts, part_texts, source_and_settings
from tropism.texts import plain_text
from tropism.training.pairs import HeldOutOpinions, HeldOutPairs, OpinionSource, PairSource
from tropism.training.scoring import ModelScorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """What a method that learns preferences needs."""

    texts: Texts[Any]
    source: PairSource | OpinionSource
    evaluation: PreferenceEvaluation | None
    """None where the recipe holds out nothing."""


def preferences(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    algorithm: Any,
    scorer: ModelScorer,
    reference: ModelScorer | None,
    context_length: int | None,
) -> Preferences:
    """Preferences to train on, and the evaluation of the held-out ones.

    Args:
        algorithm: the method in its run.
        reference: None where no reference is kept.

    Raises:
        TropismError: unusable data.
    """
    config = recipe.algorithm
    held_out: HeldOut
    source: PairSource | OpinionSource
    if isinstance(config, DPO):
        pairs = pairs_of(recipe, tokenizer, context_length=context_length)
        compared = None if config.reference_free else reference
        source = PairSource(pairs.train, **_order(recipe, config), reference=compared)
        texts: Texts[Any] = pairs
        held_out = HeldOutPairs(pairs.held_out, reference=compared)
    else:
        assert isinstance(config, KTO) and reference is not None
        opinions = opinions_of(recipe, tokenizer, context_length=context_length)
        refuse_one_kind(opinions.train)
        scored: dict[str, Any] = {
            "scorer": scorer,
            "reference": reference,
            "max_length": config.max_length or context_length,
        }
        source = OpinionSource(opinions.train, **_order(recipe, config), **scored)
        texts = opinions
        held_out = HeldOutOpinions(opinions.held_out, **scored)
    evaluation = PreferenceEvaluation(held_out, algorithm=algorithm, scorer=scorer) if texts.held_out else None
    return Preferences(texts=texts, source=source, evaluation=evaluation)


def _order(recipe: Recipe, config: DPO | KTO) -> dict[str, Any]:
    return {"batch_size": recipe.prompts_per_step, "seed": recipe.seed, "shuffle": config.shuffle}


def pairs_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None, taken: int = 0
) -> Texts[Pair]:
    """Pairs to train on, and held-out ones; longer ones than the context (or ``max_length``) lose their end.

    Args:
        taken: nothing stands before pairs.

    Raises:
        TropismError: unusable data.
    """
    limit = recipe.algorithm.max_length or context_length  # type: ignore[attr-defined]

    def read(data: Any) -> list[tuple[Record, Pair]]:
        source, settings = source_and_settings(data)
        return read_pairs(source, tokenizer, settings, max_length=limit)

    train = read(recipe.data)
    kept: Sequence[tuple[Record, Pair]] = []
    fraction = recipe.data.eval_fraction if isinstance(recipe.data, DataConfig) else 0.0
    if recipe.eval_data is not None:
        kept = read(recipe.eval_data)
    elif fraction > 0:
        train, kept = train_eval_split(train, fraction, seed=recipe.seed, key=lambda item: _key(item[0]))
    return Texts(
        train=[pair for _, pair in train],
        held_out=[pair for _, pair in kept],
        held=_as_prompts(kept, recipe.data) if kept else None,
        trained=_as_prompts(train, recipe.data),
    )


def _key(record: Record) -> str:
    """What pairs share that must stay on one side: the prompt, however it is spaced; without one, the record."""
    prompt = record.columns["prompt"]
    if not plain_text(prompt).strip():
        return prompt_key({name: value for name, value in record.columns.items() if name != "prompt"})
    return prompt_key(" ".join(prompt.split()) if isinstance(prompt, str) else prompt)


def _as_prompts(pairs: Sequence[tuple[Record, Pair]], data: Any) -> Held:
    """The prompts of pairs for ``make_prompts``: as they were read, so that only ``overlong`` is left to apply."""
    distinct = {id(record): record for record, _ in pairs}
    overlong = data.overlong if isinstance(data, DataConfig) else "error"
    return list(distinct.values()), DataConfig(path="pairs", prompt_column="prompt", overlong=overlong)


def opinions_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None, taken: int = 0
) -> Texts[Opinion]:
    """Opinions to train on, and held-out ones; longer ones than the context (or ``max_length``) lose their end.

    Args:
        taken: nothing stands before opinions.

    Raises:
        TropismError: unusable data.
    """
    limit = recipe.algorithm.max_length or context_length  # type: ignore[attr-defined]

    def read(source: Any, settings: DataConfig | None) -> list[tuple[Record, Opinion]]:
        return read_opinions(source, tokenizer, settings, max_length=limit)

    return part_texts(recipe, tokenizer, read, recipe.eval_data)
