"""From a recipe to the source of its batches, and to what it holds out for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from tropism.algorithms.base import OnPolicyAlgorithm, PoolAlgorithm, PoolConfig
from tropism.config import Recipe
from tropism.data.demonstrations import collate_demonstrations
from tropism.data.order import fingerprint
from tropism.errors import ConfigError
from tropism.evaluation.heldout import LossEvaluation, RewardEvaluation
from tropism.models.loading import LoadedModel
from tropism.models.policy import Policy
from tropism.recipe_data import Texts, demonstrations_of, prompts_of, scored_of
from tropism.rollouts.checks import check_ends
from tropism.targets.conditioner import Conditioner
from tropism.training.pool import PoolSource, ScoredSource
from tropism.training.rollout_maker import RolloutMaker
from tropism.training.run import Evaluation
from tropism.training.scoring import ModelScorer
from tropism.training.sources import Collected, DemonstrationSource, RolloutSource
from tropism.types import Batch, Prompt, ScoredText

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
        reads = self.recipe.algorithm.reads
        if reads == "demonstrations":
            return self._demonstrations()
        if reads == "scored":
            return self._scored()
        self.prompts, held_out = self._read_prompts()
        if held_out:
            self._evaluate_reward(held_out)
        return self._pool() if isinstance(self.algorithm, PoolAlgorithm) else self._rollouts()

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
        if self.maker is None:
            return
        check_ends(recipe.sampling, self.loaded.tokenizer, int(self.policy.config.vocab_size))
        score = recipe.algorithm.score_without_end
        if score is not None and not recipe.sampling.can_end(eos=bool(self.loaded.tokens.eos_ids)):
            raise ConfigError(
                f"algorithm.missing_eos.score={score:g} replaces the reward of completions that lack an end, and here "
                "all would: the model has no eos token, and sampling names no other end. Name one, for example "
                'sampling.truncation: {token: ".", after: 16}, or set algorithm.missing_eos.score to null'
            )

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
        if self.maker is None:
            return
        train, held_out = self._read_prompts(texts)
        self.prompts = held_out or train
        if held_out:
            self._evaluate_reward(held_out)

    def _evaluate_reward(self, prompts: Sequence[Prompt]) -> None:
        assert self.maker is not None
        condition = None if self.conditioner is None else self._ask
        self._hold_out(
            prompts, RewardEvaluation(prompts, maker=self.maker, reference=self.reference, condition=condition)
        )

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
        assert self.maker is not None and self.conditioner is not None
        self._check_names(self.conditioner.names)
        assert isinstance(config, PoolConfig)
        return PoolSource(
            algorithm=self.algorithm,
            prompts=self.prompts,
            prompts_per_step=recipe.prompts_per_step,
            names=self.conditioner.names,
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
