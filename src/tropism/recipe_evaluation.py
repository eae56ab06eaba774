"""From a recipe to the evaluation of held-out completions: several ways to sample, the reward, metrics of the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from tropism.algorithms.base import Scorer
from tropism.config import Recipe
from tropism.errors import ConfigError
from tropism.evaluation.heldout import Measures, RewardEvaluation
from tropism.evaluation.over_optimisation import evaluations_in
from tropism.evaluation.sampling_settings import PLACE, sampling_settings
from tropism.gold_reward import PLACE as GOLD
from tropism.rollouts.config import Sampling
from tropism.rollouts.transcribe import Transcriber
from tropism.training.rollout_maker import CompletionMaker
from tropism.types import Prompt

M = TypeVar("M", bound=CompletionMaker)


def evaluation_of(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    *,
    maker: CompletionMaker,
    tokenizer: Any,
    reference: Scorer | None,
    condition: Callable[[Sequence[Prompt]], Sequence[Prompt]] | None,
    measures: Measures | None,
) -> RewardEvaluation:
    """The evaluation of completions of held-out prompts, by the recipe's sampling and every change to it.

    Args:
        maker: samples as the recipe says. The others: as of ``RewardEvaluation``.
    """
    return RewardEvaluation(
        prompts,
        maker=maker,
        reference=reference,
        condition=condition,
        measures=measures,
        settings={label: _sampling(maker, changed, tokenizer) for label, changed in settings_of(recipe).items()},
    )


def settings_of(recipe: Recipe) -> dict[str, Sampling]:
    """The ways to sample held-out completions beside the recipe's own, by label."""
    return sampling_settings(recipe.sampling, recipe.trainer.evaluation.sampling)


def planned_evaluations(recipe: Recipe) -> int:
    """How often a run is evaluated: before its first step, after every so many, and after the last."""
    return evaluations_in(recipe.total_steps, recipe.trainer.evaluation.every)


def refuse_idle_settings(recipe: Recipe, evaluations: Sequence[object]) -> None:
    """Refuse settings of an evaluation that is never made.

    Args:
        evaluations: all that are made.

    Raises:
        ConfigError: names the setting, and what is missing.
    """
    if any(isinstance(evaluation, RewardEvaluation) for evaluation in evaluations):
        return
    measured = bool(recipe.metrics) or recipe.trainer.evaluation.gold is not None
    given = {
        "metrics": bool(recipe.metrics),
        GOLD: recipe.trainer.evaluation.gold is not None,
        PLACE: bool(recipe.trainer.evaluation.sampling),
    }
    for name, is_given in given.items():
        if is_given and recipe.reward is None and not measured:
            raise ConfigError(
                f"{name}: without a reward and metrics no held-out completion is sampled; give one of them, or leave "
                "it out"
            )
        if is_given:
            raise ConfigError(
                f"{name}: held-out completions are measured, and nothing is held out; give eval_data (or "
                "eval_fraction of data), or leave it out"
            )


def _sampling(maker: M, sampling: Sampling, tokenizer: Any) -> M:
    """The same maker with other sampling."""
    return replace(maker, sampling=sampling, transcribe=Transcriber(tokenizer, sampling.stop))
