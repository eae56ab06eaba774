"""Where scored texts come from: a data set, or the policy's own completions, kept in a pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tropism.algorithms.base import CollectStats, PoolAlgorithm, PoolPlan, Scorer
from tropism.data.order import PromptStream, epoch_order
from tropism.errors import ConfigError
from tropism.rollouts.randomness import StreamKey
from tropism.training.finite import require_finite
from tropism.training.rollout_maker import RolloutMaker
from tropism.training.sources import Collected, TextSource, rollout_metrics
from tropism.training.stopwatch import Stopwatch
from tropism.types import Batch, Metrics, Prompt, RewardBatch, Rollouts, ScoredText, pad_rows

TOTAL = "reward"
"""The name of the weighted total of all terms, also where a term has it, too."""


def uniforms(seed: int, purpose: Any, first: int, rows: int, columns: int) -> Tensor:
    """[rows, columns] numbers in [0, 1) that depend on the seed, the purpose, and the number of the row alone."""
    samples = np.repeat(np.arange(first, first + rows, dtype=np.int64), columns)
    tokens = np.tile(np.arange(columns, dtype=np.int64), rows)
    drawn = StreamKey(seed=seed, purpose=purpose).uniforms(samples, tokens)
    return torch.from_numpy(drawn).view(rows, columns)


class ScoredSource(TextSource[ScoredText]):
    """Batches of a data set's scored texts."""

    def __init__(
        self,
        texts: Sequence[ScoredText],
        *,
        algorithm: PoolAlgorithm[Any],
        batch_size: int,
        reference: Scorer | None,
        seed: int,
    ) -> None:
        super().__init__(texts, batch_size=batch_size, seed=seed)
        self.algorithm, self.reference, self.seed = algorithm, reference, seed
        algorithm.take_scores([text.rewards for text in texts])

    def batch_of(self, taken: Sequence[tuple[int, ScoredText]], first: int) -> Batch:
        drawn = uniforms(self.seed, "dropout", first, len(taken), len(taken[0][1].rewards))
        places, texts = zip(*taken, strict=True)
        return self.algorithm.make_batch(texts, places, drawn, self.reference)


class PoolSource:
    """A pool of the policy's own completions with their rewards, which grows once or in every step.

    Its state is the pool, the position in the prompts, and the cursor in the batches of a step.

    Args:
        names: of the rewards that the pool keeps: terms, or ``reward`` for their total.
    """

    def __init__(
        self,
        *,
        algorithm: PoolAlgorithm[Any],
        prompts: Sequence[Prompt],
        prompts_per_step: int,
        names: Sequence[str],
        plan: PoolPlan,
        maker: RolloutMaker,
        reference: Scorer | None,
        total_steps: int,
        on_collect: Callable[[Collected], None],
    ) -> None:
        self.algorithm, self.maker, self.reference = algorithm, maker, reference
        self.names, self.plan = names, plan
        self.total_steps, self.on_collect = total_steps, on_collect
        self.prompts, self.prompts_per_step = prompts, prompts_per_step
        self.stream = PromptStream(prompts, seed=maker.seed)
        self.pool: list[ScoredText] = []
        self.collects = 0
        self.cursor: int | None = None
        """Batches of this step that were given out; None between steps."""
        self.sampled = CollectStats(samples=0, tokens=0)
        self._tensors: dict[str, Tensor] = {}
        self._ordered: tuple[tuple[int, int, int], list[int]] = ((0, 0, 0), [])

    @property
    def done(self) -> bool:
        return self.cursor is None or self.cursor >= self.plan.updates

    def collect(self, policy: Any) -> Iterator[Batch]:
        """The remaining batches of the step in progress, or all of a new one."""
        if self.cursor is None:
            collected = None if self.plan.once and self.pool else self._grown()
            self.cursor = 0
            if collected is not None:
                self.on_collect(collected)
        while not self.done:
            assert self.cursor is not None
            place = (self.collects * self.plan.updates + self.cursor) * self.plan.batch_size
            self.cursor += 1
            yield self._batch(place)

    def _grown(self) -> Collected:
        """What came into the pool; where that fails or is interrupted, it is as if this step had not begun."""
        stream, pool = self.stream.state_dict(), list(self.pool)
        try:
            return self._grow()
        except BaseException:
            self.stream.load_state_dict(stream)
            self._keep(pool)
            raise

    def _batch(self, place: int) -> Batch:
        """The texts from ``place`` on, counted from the start of the run."""
        # A pool that grows is dealt anew in every step.
        era = 0 if self.plan.once else self.collects
        begin = era * self.plan.updates * self.plan.batch_size
        chosen = []
        for number in range(place - begin, place - begin + self.plan.batch_size):
            epoch, offset = divmod(number, len(self.pool))
            chosen.append(self._order(era, epoch)[offset])
        drawn = uniforms(self.maker.seed, "dropout", place, len(chosen), len(self.names))
        return self.algorithm.make_batch([self.pool[i] for i in chosen], chosen, drawn, self.reference)

    def _order(self, era: int, epoch: int) -> list[int]:
        """Of the pool; of a large one it takes longer than a batch, so the last is kept."""
        key = (era, epoch, len(self.pool))
        if self._ordered[0] != key:
            self._ordered = key, epoch_order(len(self.pool), seed=self.maker.seed, epoch=era * 1000 + epoch)
        return self._ordered[1]

    def _grow(self) -> Collected:
        watch = Stopwatch()
        with watch.measure("rollout"):
            if self.plan.once:
                prompts: Sequence[Prompt] = self.prompts
            else:
                prompts = [prompt for _, prompt in self.stream.take(self.prompts_per_step)]
            drawn = uniforms(self.maker.seed, "targets", self.collects * self.prompts_per_step, len(prompts), 1)
            asked = self.algorithm.ask(drawn[:, 0])
            conditioner = self.algorithm.conditioner
            preceded = [
                replace(prompt, ids=conditioner.apply(prompt.ids, prefix))
                for prompt, prefix in zip(prompts, asked, strict=True)
            ]
            rollouts = self.maker.sample(preceded, self.plan.per_prompt, collect=self.collects)
        per_row = [prompt for prompt in prompts for _ in range(self.plan.per_prompt)]
        state = {"step": self.collects, "total_steps": self.total_steps}
        with watch.measure("reward"):
            inputs, rewards = self.maker.score(rollouts, per_row, state, raw=True)
        require_finite(
            {"the reward": rewards.totals}, f"at step {self.collects + 1}, before its first update; nothing is changed"
        )
        added = self._texts(rollouts, rewards, per_row)
        if not self.pool and not added:
            raise ConfigError("no completion got a reward, so there is nothing to learn from; see the reward's errors")
        self._keep([*self.pool, *added])
        noted = self.algorithm.take_scores([text.rewards for text in self.pool])
        self.sampled = CollectStats(samples=len(rollouts), tokens=int(rollouts.completion_lengths.sum()))
        seconds = watch.take("rollout")
        return Collected(
            step=self.collects + 1,
            rollouts=rollouts,
            inputs=inputs,
            rewards=rewards,
            batch=None,
            metrics=rollout_metrics(rollouts, rewards) | self._metrics() | noted,
            timings={
                "time/rollout": seconds,
                "time/reward": watch.take("reward"),
                "throughput/rollout_tokens_per_second": float(rollouts.completion_lengths.sum()) / seconds,
            },
        )

    def _texts(self, rollouts: Rollouts, rewards: RewardBatch, prompts: Sequence[Prompt]) -> list[ScoredText]:
        """The completions that every reward has scored, after their plain prompts."""
        columns = [rewards.totals if name == TOTAL else rewards.terms[name] for name in self.names]
        table = torch.stack(columns, dim=1).double()
        known = rewards.scored & table.isfinite().all(1) & (rollouts.completion_lengths > 0)
        ids = [row[:n] for row, n in zip(rollouts.completion_ids, rollouts.completion_lengths.tolist(), strict=True)]
        return [
            ScoredText(
                prompt_ids=prompts[place].ids,
                completion_ids=tuple(ids[place].tolist()),
                rewards=tuple(table[place].tolist()),
            )
            for place in torch.nonzero(known).squeeze(-1).tolist()
        ]

    def _metrics(self) -> Metrics:
        table = torch.tensor([text.rewards for text in self.pool], dtype=torch.float64)
        means = {f"pool/{name}": float(column.mean()) for name, column in zip(self.names, table.unbind(1), strict=True)}
        return {"pool/size": float(len(self.pool)), **means}

    def finish(self) -> CollectStats:
        """End the step; what was sampled for it stays in the pool."""
        seen, self.sampled = self.sampled, CollectStats(samples=0, tokens=0)
        self.cursor = None
        self.collects += 1
        return seen

    # State -----------------------------------------------------------------------------------------------------------

    def _keep(self, pool: list[ScoredText]) -> None:
        """Take a pool, and lay it out as tensors once, since the state is asked for after every update."""
        self.pool = pool
        self._tensors = {}
        if pool:
            self._tensors = {
                "prompt_ids": pad_rows([text.prompt_ids for text in pool]),
                "prompt_lengths": torch.tensor([len(text.prompt_ids) for text in pool]),
                "completion_ids": pad_rows([text.completion_ids for text in pool]),
                "completion_lengths": torch.tensor([len(text.completion_ids) for text in pool]),
                "rewards": torch.tensor([text.rewards for text in pool], dtype=torch.float64),
            }

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able values, and the tensors of the pool."""
        values = {
            "stream": self.stream.state_dict(),
            "collects": self.collects,
            "collecting": self.cursor is not None,
            "cursor": self.cursor,
            "sampled": vars(self.sampled),
        }
        return values, self._tensors

    def load_state_dict(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.stream.load_state_dict(values["stream"])
        self.collects, self.cursor = int(values["collects"]), values["cursor"]
        self.sampled = CollectStats(**values["sampled"])
        self._keep(_texts_of(tensors) if tensors else [])
        if self.pool:
            self.algorithm.take_scores([text.rewards for text in self.pool])


def _texts_of(tensors: Mapping[str, Tensor]) -> list[ScoredText]:
    def rows(name: str) -> list[tuple[int, ...]]:
        lengths = tensors[f"{name}_lengths"].tolist()
        return [tuple(row[:n]) for row, n in zip(tensors[f"{name}_ids"].tolist(), lengths, strict=True)]

    return [
        ScoredText(prompt_ids=prompt, completion_ids=completion, rewards=tuple(rewards))
        for prompt, completion, rewards in zip(
            rows("prompt"), rows("completion"), tensors["rewards"].tolist(), strict=True
        )
    ]
