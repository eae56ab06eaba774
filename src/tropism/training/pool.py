"""Where scored texts come from: a data set, or the policy's own completions, kept in a pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tropism.algorithms.base import CollectStats, Scorer
from tropism.algorithms.pool import PoolAlgorithm, PooledText, PoolPlan
from tropism.data.order import PromptStream, epoch_order
from tropism.errors import ConfigError, ModelError
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
    """A pool of the policy's own completions with their rewards, which grows once or time and again.

    Its state is the pool, the position in the prompts, and the cursor in the batches of a step. What the method chooses
    of the pool follows from these.

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
        self.pool: list[PooledText] = []
        self.chosen: Sequence[int] = ()
        """Places in the pool of what the step in progress, or the last one, learns from."""
        self.collects = 0
        self.cursor: int | None = None
        """Batches of this step that were given out; None between steps."""
        self.sampled = CollectStats(samples=0, tokens=0)
        self._tensors: dict[str, Tensor] = {}
        self._ordered: tuple[tuple[int, int, int], list[int]] = ((0, 0, 0), [])

    @property
    def done(self) -> bool:
        return self.cursor is None or self.cursor >= self.updates

    @property
    def updates(self) -> int:
        """Batches of the step in progress; a single one where there is nothing to learn."""
        if not self.chosen:
            return 1
        if self.plan.updates is not None:
            return self.plan.updates
        return -(-self.plan.epochs * len(self.chosen) // self.plan.batch_size)

    def collect(self, policy: Any) -> Iterator[Batch]:
        """The remaining batches of the step in progress, or all of a new one."""
        if self.cursor is None:
            collected = self._begun()
            self.cursor = 0
            if collected is not None:
                self.on_collect(collected)
        while not self.done:
            assert self.cursor is not None
            self.cursor += 1
            yield self._batch(self.cursor - 1)

    def _begun(self) -> Collected | None:
        """What comes into the pool, and what is learned from; where either fails or is interrupted, it is as if this
        step had not begun."""
        stream, pool, chosen, sampled = self.stream.state_dict(), list(self.pool), self.chosen, self.sampled
        due = not self.pool if self.plan.once else self.collects % self.plan.every == 0
        try:
            collected = self._grow() if due else None
            self.chosen = self.algorithm.choose(self.pool, self.collects)
        except BaseException:
            self.stream.load_state_dict(stream)
            self._keep(pool)
            self.chosen, self.sampled = chosen, sampled
            raise
        return collected

    def _batch(self, cursor: int) -> Batch:
        """One batch of this step, by its number; where nothing was chosen a text of which nothing is learned."""
        # A pool that grows is dealt anew in every step.
        era = 0 if self.plan.once else self.collects
        dealt, first = self._dealt(cursor)
        places = [] if self.chosen else [0]
        for number in dealt:
            epoch, offset = divmod(number, len(self.chosen))
            places.append(self.chosen[self._order(era, epoch)[offset]])
        conditioner = self.algorithm.facts.conditioner
        drawn = uniforms(self.maker.seed, "dropout", first, len(places), 0 if conditioner is None else len(self.names))
        batch = self.algorithm.make_batch([self.pool[i] for i in places], places, drawn, self.reference)
        return batch if self.chosen else batch.emptied()

    def _dealt(self, cursor: int) -> tuple[range, int]:
        """The numbers of a batch's texts, counted from where the pool was last dealt, and a number for the first of
        them that no other batch of the run has."""
        plan = self.plan
        if plan.updates is None or not self.chosen:
            total, parts = plan.epochs * len(self.chosen), self.updates
            begin = cursor * total // parts
            return range(begin, (cursor + 1) * total // parts), (self.collects << 32) + begin
        place = (self.collects * plan.updates + cursor) * plan.batch_size
        begin = place if plan.once else cursor * plan.batch_size
        return range(begin, begin + plan.batch_size), place

    def _order(self, era: int, epoch: int) -> list[int]:
        """Of what is learned from; of a large pool it takes longer than a batch, so the last is kept."""
        key = (era, epoch, len(self.chosen))
        if self._ordered[0] != key:
            self._ordered = key, epoch_order(len(self.chosen), seed=self.maker.seed, epoch=era * 1000 + epoch)
        return self._ordered[1]

    def _grow(self) -> Collected:
        watch = Stopwatch()
        with watch.measure("rollout"):
            taken = [*enumerate(self.prompts)] if self.plan.once else self.stream.take(self.prompts_per_step)
            prompts = self._asking([prompt for _, prompt in taken])
            rollouts = self.maker.sample(prompts, self.plan.per_prompt, collect=self.collects)
        origins = [one for one in taken for _ in range(self.plan.per_prompt)]
        per_row = [prompt for _, prompt in origins]
        state = {"step": self.collects, "total_steps": self.total_steps}
        with watch.measure("reward"):
            inputs, rewards = self.maker.score(rollouts, per_row, state, raw=True)
        require_finite(
            {"the reward": rewards.totals}, f"at step {self.collects + 1}, before its first update; nothing is changed"
        )
        added = self._texts(rollouts, rewards, origins)
        oldest = -1 if self.plan.memory is None else self._growth - self.plan.memory + 1
        pool = [*(text for text in self.pool if text.growth >= oldest), *added]
        if not pool:
            raise ConfigError("no completion got a reward, so there is nothing to learn from; see the reward's errors")
        self._keep(pool)
        noted = self.algorithm.take_scores([text.rewards for text in self.pool])
        self.sampled = CollectStats(samples=len(rollouts), tokens=int(rollouts.completion_lengths.sum()))
        seconds = watch.take("rollout")
        return Collected(
            step=self.collects + 1,
            rollouts=rollouts,
            inputs=inputs,
            rewards=rewards,
            batch=None,
            metrics=rollout_metrics(rollouts, rewards) | self._of_groups(rewards) | self._metrics() | noted,
            timings={
                "time/rollout": seconds,
                "time/reward": watch.take("reward"),
                "throughput/rollout_tokens_per_second": float(rollouts.completion_lengths.sum()) / seconds,
            },
        )

    @property
    def _growth(self) -> int:
        """The number of the growth in this step."""
        return 0 if self.plan.once else self.collects // self.plan.every

    def _asking(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """The prompts after what asks for rewards, where the method asks for any."""
        conditioner = self.algorithm.facts.conditioner
        if conditioner is None:
            return prompts
        drawn = uniforms(self.maker.seed, "targets", self.collects * self.prompts_per_step, len(prompts), 1)
        return [
            replace(prompt, ids=conditioner.apply(prompt.ids, prefix))
            for prompt, prefix in zip(prompts, self.algorithm.ask(drawn[:, 0]), strict=True)
        ]

    def _texts(
        self, rollouts: Rollouts, rewards: RewardBatch, origins: Sequence[tuple[int, Prompt]]
    ) -> list[PooledText]:
        """The completions that every reward has scored, after their plain prompts.

        Args:
            origins: of each, the prompt and its place in the data.
        """
        columns = [rewards.totals if name == TOTAL else rewards.terms[name] for name in self.names]
        table = torch.stack(columns, dim=1).double()
        known = rewards.scored & table.isfinite().all(1) & (rollouts.completion_lengths > 0)
        ids = [row[:n] for row, n in zip(rollouts.completion_ids, rollouts.completion_lengths.tolist(), strict=True)]
        return [
            PooledText(
                prompt_ids=origins[place][1].ids,
                completion_ids=tuple(ids[place].tolist()),
                rewards=tuple(table[place].tolist()),
                prompt=origins[place][0],
                growth=self._growth,
            )
            for place in torch.nonzero(known).squeeze(-1).tolist()
        ]

    def _of_groups(self, rewards: RewardBatch) -> Metrics:
        """Of methods that compare the completions of a prompt: the share of prompts with nothing to compare."""
        if self.algorithm.facts.conditioner is not None or self.plan.per_prompt < 2:
            return {}
        groups = rewards.totals.view(-1, self.plan.per_prompt)
        return {"reward/zero_variance_groups": float((groups.amax(1) == groups.amin(1)).float().mean())}

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

    def _keep(self, pool: list[PooledText]) -> None:
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
                "prompts": torch.tensor([text.prompt for text in pool]),
                "growths": torch.tensor([text.growth for text in pool]),
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
        if tensors and "prompts" not in tensors:
            raise ModelError(
                "the checkpoint was written by an earlier version, which did not note the prompts of its pool; finish "
                "the run with that version, or start a new one"
            )
        self.stream.load_state_dict(values["stream"])
        self.collects, self.cursor = int(values["collects"]), values["cursor"]
        self.sampled = CollectStats(**values["sampled"])
        self._keep(_texts_of(tensors) if tensors else [])
        if self.pool:
            self.algorithm.take_scores([text.rewards for text in self.pool])
        if self.cursor is not None:
            self.chosen = self.algorithm.choose(self.pool, self.collects)


def _texts_of(tensors: Mapping[str, Tensor]) -> list[PooledText]:
    def rows(name: str) -> list[tuple[int, ...]]:
        lengths = tensors[f"{name}_lengths"].tolist()
        return [tuple(row[:n]) for row, n in zip(tensors[f"{name}_ids"].tolist(), lengths, strict=True)]

    columns = (tensors[name].tolist() for name in ("rewards", "prompts", "growths"))
    return [
        PooledText(
            prompt_ids=prompt_ids, completion_ids=completion_ids, rewards=tuple(rewards), prompt=prompt, growth=growth
        )
        for prompt_ids, completion_ids, rewards, prompt, growth in zip(
            rows("prompt"), rows("completion"), *columns, strict=True
        )
    ]
