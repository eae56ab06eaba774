"""Sampling and scoring of completions, shared among processes: what every source does that has no texts of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tropism.rewards import RewardHarness
from tropism.rollouts.config import Sampling
from tropism.rollouts.protocol import Sampler
from tropism.rollouts.randomness import Purpose, StreamKey
from tropism.training.processes import Processes
from tropism.types import Prompt, RewardBatch, RewardInputs, Rollouts


class Transcribe(Protocol):
    """Rollouts as reward functions see them: text, ids, finish reasons and columns."""

    def __call__(
        self, rollouts: Rollouts, prompts: Sequence[Prompt], trainer_state: Mapping[str, int]
    ) -> RewardInputs: ...


@dataclass(frozen=True, kw_only=True)
class CompletionMaker:
    """Completions. Every process gets all of them, and makes its share."""

    sampler: Sampler
    sampling: Sampling
    transcribe: Transcribe
    policy: Any
    processes: Processes
    seed: int

    def sample(
        self, prompts: Sequence[Prompt], n: int = 1, *, purpose: Purpose = "training", collect: int = 0
    ) -> Rollouts:
        """``n`` completions of each prompt, contiguous; equal keys give equal completions."""
        first, mine = self.processes.share(prompts)
        key = StreamKey(seed=self.seed, purpose=purpose, collect=collect)

        def sample() -> list[Rollouts]:
            if not mine:
                return []
            with self.processes.accelerator.autocast():
                own = self.sampler.generate(self.policy, mine, self.sampling, n, key=key, first_index=first * n)
            return [own.to("cpu")]

        with self.processes.entered(self.policy.whole()):
            parts = self.processes.together(sample)
        return Rollouts.concat([rollouts for part in parts for rollouts in part])


@dataclass(frozen=True, kw_only=True)
class RolloutMaker(CompletionMaker):
    """Completions and their rewards. Every process gets all of them, and makes its share."""

    harness: RewardHarness

    def score(
        self, rollouts: Rollouts, prompts: Sequence[Prompt], state: Mapping[str, int], *, raw: bool = False
    ) -> tuple[RewardInputs, RewardBatch]:
        """Each process scores its share of the completions; all combine the same raw rewards.

        Args:
            prompts: one per completion, as rewards shall see them.
            raw: leave the running scale of the reward out, and as it is.
        """
        inputs = self.transcribe(rollouts, prompts, state)
        first, mine = self.processes.share(range(len(rollouts)))
        own = inputs.rows(first, first + len(mine))
        parts = self.processes.together(lambda: self.harness.evaluate(own, first_row=first))
        merged = type(parts[0]).concat(parts)
        lengths, width = rollouts.seen_lengths, rollouts.completion_ids.shape[1]
        return inputs, self.harness.combine(merged, lengths, width, update_moments=not raw, unscaled=raw)
