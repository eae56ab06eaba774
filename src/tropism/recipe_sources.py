"""From a recipe to the source of its batches, and to what it holds out for evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from tropism.algorithms.base import OnPolicyAlgorithm
from tropism.algorithms.pool import PoolAlgorithm, PoolConfig
from tropism.config import Recipe
from tropism.data.demonstrations import collate_demonstrations
from tropism.data.order import fingerprint
from tropism.errors import ConfigError
from tropism.evaluation.heldout import LossEvaluation, Measures
from tropism.models.loading import LoadedModel
from tropism.models.policy import Policy
from tropism.models.sampling_model import check_compiled
from tropism.recipe_data import Texts, demonstrations_of, prompts_of, scored_of
from tropism.recipe_episodes import episode_evaluation, episodes_of
from tropism.recipe_evaluation import evaluation_of, refuse_idle_settings, settings_of
from tropism.recipe_pairs import preferences
from tropism.rollouts.checks import check_ends
from tropism.rollouts.config import Sampling
from tropism.rollouts.sampling_filters import check_filters
from tropism.targets.conditioner import Conditioner
from tropism.training.episodes import EpisodeSource
from tropism.training.pairs import OpinionSource, PairSource
from tropism.training.pool import TOTAL, PoolSource, ScoredSource
from tropism.training.rollout_maker import CompletionMaker, RolloutMaker
from tropism.training.run import Evaluation
from tropism.training.scoring import ModelScorer
from tropism.training.sources import Collected, DemonstrationSource, RolloutSource
from tropism.types import Batch, Prompt, ScoredText

logger = logging.getLogger("tropism")

T = TypeVar("T")


@dataclass(kw_only=True)
class RecipeSource:
    """Reads the data of a recipe and makes the source that its method needs.

    Args:
        maker: None where the recipe has no reward. reference: None where no reference is kept.
        exact: whether sampling and training compute in fp32.
    """

    recipe: Recipe
    loaded: LoadedModel
    policy: Policy
    algorithm: Any
    conditioner: Conditioner | None
    maker: RolloutMaker | None
    scorer: ModelScorer
    reference: ModelScorer | None
    exact: bool
    on_collect: Callable[[Collected], None]
    unscored: CompletionMaker | None = None
    """Completes held-out prompts where the recipe has metrics or a gold reward, and no reward."""
    metrics: Measures | None = None

    prompts: Sequence[Prompt] = ()
    """Prompts to sample completions of: those to train on, or of a method that learns texts the held-out ones, or else
    those of its texts that leave room; none where the recipe has no reward."""
    evaluations: list[Evaluation] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    """Fingerprints of what each evaluation is about."""

    def make(self) -> Any:
        """The source; with it prompts and evaluations are there.

        Raises:
            TropismError: unusable data, or a recipe that does not fit it.
        """
        self._check_eval_target()
        self._check_ends()
        source = self._source()
        self._tell_passes(source)
        refuse_idle_settings(self.recipe, self.evaluations)
        return source

    @property
    def answers(self) -> CompletionMaker | None:
        """What completes held-out prompts; None where nothing is asked of completions."""
        return self.maker or self.unscored

    def _source(self) -> Any:
        reads = self.recipe.algorithm.reads
        if reads == "demonstrations":
            return self._demonstrations()
        if reads == "scored":
            return self._scored()
        if reads in ("pairs", "opinions"):
            return self._preferences()
        if reads == "episodes":
            return self._episodes()
        self.prompts, held_out = self._read_prompts()
        if held_out:
            self._evaluate_reward(held_out)
        return self._pool() if isinstance(self.algorithm, PoolAlgorithm) else self._rollouts()

    def _tell_passes(self, source: Any) -> None:
        """How often the steps go through the data; those of a method with a pool do not all draw from it."""
        stream = getattr(source, "stream", None)
        if stream is not None and not isinstance(self.algorithm, PoolAlgorithm):
            recipe = self.recipe
            passes = recipe.total_steps * recipe.prompts_per_step / len(stream.items)
            what = "prompts" if recipe.algorithm.reads == "prompts" else "texts"
            steps = f"total_steps {recipe.total_steps} x prompts_per_step {recipe.prompts_per_step}"
            logger.info("%s: %.3g passes over %d %s", steps, passes, len(stream.items), what)

    def _check_eval_target(self) -> None:
        """Before anything is sampled, as evaluation first asks for it when there are rewards."""
        target = self.recipe.algorithm.evaluated_at
        if target is None or self.conditioner is None:
            return
        try:
            self.conditioner.values(target)
        except ConfigError as error:
            raise ConfigError(f"algorithm.eval_target: {error}") from error

    def _check_ends(self) -> None:
        """Before anything is sampled: whether completions can end.

        Raises:
            ConfigError: not where they should, or not at all, and the method then replaces every reward.
        """
        recipe = self.recipe
        if self.answers is None:
            return
        self._check_sampling(recipe.sampling)
        for label, sampling in settings_of(recipe).items():
            try:
                self._check_sampling(sampling)
            except ConfigError as error:
                raise ConfigError(f"trainer.evaluation.sampling ({label}): {error}") from error
        score = recipe.algorithm.score_without_end
        if score is not None and not recipe.sampling.can_end(eos=bool(self.loaded.tokens.eos_ids)):
            raise ConfigError(
                f"algorithm.missing_eos.score={score:g} replaces the reward of completions that lack an end, and here "
                "all would: the model has no eos token, and sampling names no other end. Name one, for example "
                'sampling.truncation: {token: ".", after: 16}, or set algorithm.missing_eos.score to null'
            )

    def _check_sampling(self, sampling: Sampling) -> None:
        tokenizer, vocabulary = self.loaded.tokenizer, int(self.policy.config.vocab_size)
        check_ends(sampling, tokenizer, vocabulary)
        if sampling.compile:
            check_compiled(self.policy.device.type)
        valued = self.policy.q_heads is not None
        check_filters(sampling, tokenizer, self.loaded.tokens.eos_ids, vocabulary, values_actions=valued)

    # Data ------------------------------------------------------------------------------------------------------------

    def _read_prompts(self, texts: Texts[Any] | None = None) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
        return prompts_of(
            self.recipe,
            self.loaded.tokenizer,
            context_length=self.policy.context_length,
            taken=0 if self.conditioner is None else self.conditioner.width,
            texts=texts,
            leave_out=True,
        )

    def _evaluate_texts(self, texts: Texts[T], collate: Callable[[Sequence[T]], Batch]) -> None:
        """The loss of held-out texts, and the reward of completions of their prompts where the recipe has one."""
        if texts.held_out:
            self._hold_out(texts.held_out, LossEvaluation(texts.held_out, collate=collate, scorer=self.scorer))
        self._evaluate_answers(texts)

    def _evaluate_answers(self, texts: Texts[Any]) -> None:
        """What is asked of completions of held-out prompts."""
        if self.answers is None:
            return
        train, held_out = self._read_prompts(texts)
        self.prompts = held_out or train
        if held_out:
            self._evaluate_reward(held_out)

    def _evaluate_reward(self, prompts: Sequence[Prompt]) -> None:
        assert self.answers is not None
        evaluation = evaluation_of(
            self.recipe,
            prompts,
            maker=self.answers,
            tokenizer=self.loaded.tokenizer,
            reference=self.reference,
            condition=None if self.conditioner is None else self._ask,
            measures=self.metrics,
        )
        self._hold_out(prompts, evaluation)

    def _ask(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        assert self.conditioner is not None
        return self.conditioner.for_evaluation(prompts, self.recipe.algorithm.evaluated_at)

    def _hold_out(self, items: Sequence[object], evaluation: Evaluation) -> None:
        self.held_out.append(fingerprint(items))
        self.evaluations.append(evaluation)

    # Sources ---------------------------------------------------------------------------------------------------------

    def _rollouts(self) -> RolloutSource:
        recipe = self.recipe
        assert self.maker is not None and isinstance(self.algorithm, OnPolicyAlgorithm)
        recompute, cap = recipe.trainer.correction(exact=self.exact)
        return RolloutSource(
            algorithm=self.algorithm,
            prompts=self.prompts,
            prompts_per_step=recipe.prompts_per_step,
            maker=self.maker,
            scorer=self.scorer,
            reference=self.reference if recipe.algorithm.needs_reference else None,
            total_steps=recipe.total_steps,
            recompute_logprobs=recompute,
            importance_cap=cap,
            on_collect=self.on_collect,
        )

    def _pool(self) -> PoolSource:
        recipe, config = self.recipe, self.recipe.algorithm
        assert self.maker is not None and isinstance(config, PoolConfig)
        names = (TOTAL,) if self.conditioner is None else self.conditioner.names
        self._check_names(names)
        return PoolSource(
            algorithm=self.algorithm,
            prompts=self.prompts,
            prompts_per_step=recipe.prompts_per_step,
            names=names,
            plan=config.plan(recipe.prompts_per_step),
            maker=self.maker,
            reference=self.reference if config.needs_reference else None,
            total_steps=recipe.total_steps,
            on_collect=self.on_collect,
        )

    def _check_names(self, names: Sequence[str]) -> None:
        assert self.recipe.reward is not None
        known = {"reward", *self.recipe.reward.terms}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ConfigError(
                f"algorithm.targets names {unknown[0]!r}, which is no term of the reward; its terms are "
                f"{', '.join(sorted(self.recipe.reward.terms))}, and reward is their total"
            )

    def _scored(self) -> ScoredSource:
        recipe, conditioner = self.recipe, self.conditioner
        assert conditioner is not None
        texts = scored_of(
            recipe,
            self.loaded.tokenizer,
            context_length=self.policy.context_length,
            taken=conditioner.width,
        )
        source = ScoredSource(
            texts.train,
            algorithm=self.algorithm,
            batch_size=recipe.prompts_per_step,
            reference=self.reference if recipe.algorithm.needs_reference else None,
            seed=recipe.seed,
        )
        self._evaluate_texts(texts, self._told)
        return source

    def _told(self, texts: Sequence[ScoredText]) -> Batch:
        """A batch of texts that are told every reward."""
        assert self.conditioner is not None
        nothing_left_out = torch.ones(len(texts), len(self.conditioner.names))
        batch: Batch = self.algorithm.make_batch(texts, range(len(texts)), nothing_left_out, None)
        return batch

    def _preferences(self) -> PairSource | OpinionSource:
        made = preferences(
            self.recipe,
            self.loaded.tokenizer,
            algorithm=self.algorithm,
            scorer=self.scorer,
            reference=self.reference,
            context_length=self.policy.context_length,
        )
        if made.evaluation is not None:
            self._hold_out(made.texts.held_out, made.evaluation)
        self._evaluate_answers(made.texts)
        return made.source

    def _episodes(self) -> EpisodeSource:
        recipe = self.recipe
        texts = episodes_of(recipe, self.loaded.tokenizer, context_length=self.policy.context_length)
        if texts.held_out:
            evaluation = episode_evaluation(
                recipe, texts, algorithm=self.algorithm, policy=self.policy, processes=self.scorer.processes
            )
            self._hold_out(texts.held_out, evaluation)
        self._evaluate_answers(texts)
        return EpisodeSource(texts.train, batch_size=recipe.prompts_per_step, seed=recipe.seed)

    def _demonstrations(self) -> DemonstrationSource:
        recipe = self.recipe
        texts = demonstrations_of(recipe, self.loaded.tokenizer, context_length=self.policy.context_length)
        self._evaluate_texts(texts, collate_demonstrations)
        return DemonstrationSource(
            texts.train,
            batch_size=recipe.prompts_per_step,
            seed=recipe.seed,
            shuffle=recipe.algorithm.shuffle,  # type: ignore[attr-defined]
        )
