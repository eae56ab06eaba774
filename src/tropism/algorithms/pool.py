"""What methods have in common that learn from scored texts: those of a data set, or a pool of their own completions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from tropism.algorithms.base import Algorithm, AlgorithmConfig, Scorer, StepSize
from tropism.targets.conditioner import Conditioner
from tropism.types import Batch, Metrics, ScoredText


@dataclass(frozen=True, kw_only=True)
class PoolPlan:
    """How a pool of completions grows, and what is taken from it in a step."""

    per_prompt: int
    """Completions of a prompt."""
    once: bool
    """Sample for all prompts before the first step, and never again; otherwise for some of them time and again."""
    updates: int | None
    """Batches of a step; 1 where the pool no longer grows. None: as many as ``epochs`` take."""
    batch_size: int
    """Texts of a batch; with ``epochs`` at most so many, as even as they come out."""
    every: int = 1
    """Where it grows time and again: in every so many-th step, the first included."""
    epochs: int = 1
    """Where ``updates`` is None: passes over what a step learns from."""
    memory: int | None = None
    """Completions of so many growths are kept; None: of all."""


@dataclass(frozen=True, kw_only=True)
class PooledText(ScoredText):
    """A completion of the policy's own, with its rewards, and where it came from."""

    prompt: int
    """Place of its prompt in the data."""
    growth: int
    """The how-manieth growth of the pool it came in by, from 0."""


class PoolConfig(AlgorithmConfig):
    """What every method has that learns from scored texts."""

    @abstractmethod
    def plan(self, prompts_per_step: int) -> PoolPlan:
        """How it samples its own texts, where it does."""

    def step_size(self, prompts_per_step: int, prompts: int) -> StepSize:
        plan = self.plan(prompts_per_step)
        sampled = prompts if plan.once else prompts_per_step
        completions = sampled * plan.per_prompt
        return StepSize(prompts=sampled, completions=completions, batch=plan.batch_size, every=plan.every)


Q = TypeVar("Q", bound=PoolConfig)


class PoolAlgorithm(Algorithm[Q], Generic[Q]):
    """A method that learns from scored texts: those of a data set, or a pool of its own completions."""

    @property
    def conditioner(self) -> Conditioner:
        """What stands before prompts; the source and the evaluation use it, too."""
        assert self.facts.conditioner is not None
        return self.facts.conditioner

    def take_scores(self, scores: Sequence[tuple[float, ...]]) -> Metrics:
        """Whenever texts have come in, before the batches of a collect; returns what it wants logged.

        Args:
            scores: [N][K] of all texts, oldest first; their number only grows, unless the plan forgets old ones.
        """
        return {}

    def choose(self, texts: Sequence[PooledText], step: int) -> Sequence[int]:
        """Once per step, after what came in: places of the texts of the pool to learn from; here all.

        Where there are none, the step makes no update. A run that is resumed in the middle of a step asks again, so it
        depends on nothing but its arguments.

        Args:
            texts: the pool, oldest first. step: from 0.
        """
        return range(len(texts))

    def ask(self, uniforms: Tensor) -> list[tuple[int, ...]]:
        """What stands before each of P prompts that are sampled for the pool; called where there is a conditioner.

        Args:
            uniforms: [P] in [0, 1), to draw targets by.
        """
        return [()] * len(uniforms)

    @abstractmethod
    def make_batch(
        self, texts: Sequence[ScoredText], places: Sequence[int], uniforms: Tensor, reference: Scorer | None
    ) -> Batch:
        """The batch of one optimizer step.

        Args:
            texts: B of them. places: where each stands among the scores that ``take_scores`` got.
            uniforms: [B, K] in [0, 1), to leave targets out by; K = 0 where nothing is asked for.
            reference: None where ``needs_reference`` is false.
        """
