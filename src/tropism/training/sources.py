"""Where batches come from: a data set (SFT), or the policy's own completions (PPO, GRPO, RLOO)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tropism.algorithms.base import CollectStats, OnPolicyAlgorithm, Scorer
from tropism.data.demonstrations import Demonstration, collate_demonstrations
from tropism.data.order import PromptStream, epoch_order
from tropism.errors import ConfigError
from tropism.judgements import ComparisonBatch
from tropism.ops import kl_k1
from tropism.preferences import PairBatch
from tropism.training.correction import sampling_correction
from tropism.training.finite import require_finite
from tropism.training.rollout_maker import RolloutMaker
from tropism.training.stopwatch import Stopwatch
from tropism.types import Batch, Filtering, Metrics, PolicyBatch, Prompt, RewardBatch, RewardInputs, Rollouts, Tokens

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One collect as it is written to the run folder."""

    step: int
    rollouts: Rollouts
    inputs: RewardInputs
    rewards: RewardBatch
    batch: PolicyBatch | None
    """What the method made of them; None where they went into a pool."""
    metrics: Metrics
    timings: Metrics

    @property
    def columns(self) -> dict[str, list[float]]:
        """What is known of each completion beside its rewards."""
        if self.batch is None:
            return {}
        trained = self.batch.loss_mask.sum(-1).clamp(min=1)
        return {
            "advantage": ((self.batch.advantages * self.batch.loss_mask).sum(-1) / trained).tolist(),
            "sequence_kl": _sequence_kls(self.batch).tolist(),
        }


class TrunkScorer(Scorer, Protocol):
    """A scorer of a policy whose frozen blocks may be computed once for all passes over the same rows."""

    def keep_trunk(self, tokens: Tokens) -> None:
        """Compute them for these rows."""
        ...

    def drop_trunk(self) -> None:
        """Forget them."""
        ...


class TimedScorer:
    """A scorer whose seconds count as stage ``logprobs``."""

    def __init__(self, scorer: Scorer, watch: Stopwatch) -> None:
        self.scorer, self.watch = scorer, watch

    def logprobs(self, tokens: Tokens, *, temperature: float, filtering: Filtering | None = None) -> Tensor:
        with self.watch.measure("logprobs"):
            return self.scorer.logprobs(tokens, temperature=temperature, filtering=filtering)

    def values(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        with self.watch.measure("logprobs"):
            return self.scorer.values(tokens)

    def hidden_states(self, tokens: Tokens) -> Tensor:
        with self.watch.measure("logprobs"):
            return self.scorer.hidden_states(tokens)


class RolloutSource:
    """Samples completions, scores them, lets the method make a batch, and yields its minibatches epoch by epoch.

    Its state is the position in the prompts and, inside a collect, the batch in use with the cursor in it.
    """

    def __init__(
        self,
        *,
        algorithm: OnPolicyAlgorithm[Any],
        prompts: Sequence[Prompt],
        prompts_per_step: int,
        maker: RolloutMaker,
        scorer: TrunkScorer,
        reference: Scorer | None,
        total_steps: int,
        recompute_logprobs: bool,
        importance_cap: float | None,
        on_collect: Callable[[Collected], None],
    ) -> None:
        self.algorithm, self.maker = algorithm, maker
        self.scorer, self.reference = scorer, reference
        self.prompts_per_step, self.total_steps = prompts_per_step, total_steps
        self.recompute_logprobs, self.importance_cap = recompute_logprobs, importance_cap
        self.on_collect = on_collect
        self.stream = PromptStream(prompts, seed=maker.seed)
        self.collects = 0
        self.batch: PolicyBatch | None = None
        self.cursor = 0
        self.kept = False
        """Whether the frozen blocks have been seen to for the batch in use; no checkpoint holds what they give."""
        size, total = algorithm.config.minibatch_size, prompts_per_step * algorithm.config.group_size
        if size is not None and total % size:
            raise ConfigError(
                f"minibatch_size={size} does not divide the {total} completions of a step "
                f"({prompts_per_step} prompts x {algorithm.config.group_size}): choose a divisor"
            )
        self.minibatch_size: int = size or total
        self.filtering = Filtering.of(maker.sampling)
        if self.filtering is not None and recompute_logprobs:
            raise ConfigError(
                "policy_distribution='filtered' needs sampling and training to find the same tokens inside the set, "
                "and here log-probs are computed anew after sampling. Train in fp32 (model.dtype and "
                "trainer.precision) without recompute_logprobs, or set policy_distribution to 'tempered'"
            )

    @property
    def updates_per_collect(self) -> int:
        epochs: int = self.algorithm.config.num_epochs
        rows = 0 if self.batch is None else len(self.batch)
        return epochs * (rows // self.minibatch_size)

    @property
    def done(self) -> bool:
        return self.cursor >= self.updates_per_collect

    def collect(self, policy: Any) -> Iterator[Batch]:
        """The remaining minibatches of the collect in progress, or all of a new one."""
        if self.batch is None:
            stream, moments = self.stream.state_dict(), self.maker.harness.state_dict()
            try:
                collected = self._collect_anew()
            except BaseException:  # interrupted or failed: as if this collect had not begun
                self._drop_trunk()
                self.stream.load_state_dict(stream)
                self.maker.harness.load_state_dict(moments)
                raise
            self.batch, self.cursor = collected.batch, 0
            self.on_collect(collected)
        assert self.batch is not None
        self._keep_trunk(self.batch)
        per_epoch = len(self.batch) // self.minibatch_size
        while not self.done:
            epoch, place = divmod(self.cursor, per_epoch)
            self.cursor += 1
            yield self.batch.select(self._order(epoch)[place * self.minibatch_size : (place + 1) * self.minibatch_size])

    def _order(self, epoch: int) -> Tensor:
        """Rows of the batch in the order of this epoch; keyed, so a resumed run finds the same."""
        assert self.batch is not None
        if self.minibatch_size == len(self.batch):
            return torch.arange(len(self.batch))
        return torch.tensor(epoch_order(len(self.batch), seed=self.maker.seed, epoch=self.collects * 1000 + epoch))

    def finish(self) -> CollectStats:
        """Forget the batch; the next ``collect`` samples anew."""
        assert self.batch is not None
        stats = CollectStats(
            samples=len(self.batch),
            tokens=int(self.batch.completion_lengths.sum()),
            sequence_kl=_sequence_kl(self.batch),
        )
        self.batch = None
        self.cursor = 0
        self.collects += 1
        self._drop_trunk()
        return stats

    def _keep_trunk(self, tokens: Tokens) -> None:
        """Let frozen blocks be computed once for these rows, where more than one pass over them follows.

        A resumed run computes them anew, from the same rows in the same passes, so that it goes on bit for bit.
        """
        passes = self.algorithm.config.num_epochs + self.recompute_logprobs + (self.reference is not None)
        if not self.kept and passes > 1:
            self.scorer.keep_trunk(tokens)
        self.kept = True

    def _drop_trunk(self) -> None:
        self.scorer.drop_trunk()
        self.kept = False

    def _collect_anew(self) -> Collected:
        watch = Stopwatch()
        group = self.algorithm.config.group_size
        with watch.measure("rollout"):
            prompts = [prompt for _, prompt in self.stream.take(self.prompts_per_step)]
            rollouts = _as_trained(self.maker.sample(prompts, group, collect=self.collects), self.filtering)
        state = {"step": self.collects, "total_steps": self.total_steps}
        per_row = [prompt for prompt in prompts for _ in range(group)]
        with watch.measure("reward"):
            inputs, rewards = self.maker.score(rollouts, per_row, state)
        with watch.measure("make_batch"):
            rollouts, batch, metrics = self._make_batch(rollouts, rewards, watch)
        rollout_seconds = watch.take("rollout")
        timings = {
            "time/rollout": rollout_seconds,
            "time/reward": watch.take("reward"),
            "time/logprobs": watch.take("logprobs"),
            "time/make_batch": watch.take("make_batch"),
            "throughput/rollout_tokens_per_second": float(rollouts.completion_lengths.sum()) / rollout_seconds,
        }
        return Collected(
            step=self.collects + 1,
            rollouts=rollouts,
            inputs=inputs,
            rewards=rewards,
            batch=batch,
            metrics=metrics,
            timings=timings,
        )

    def _make_batch(
        self, rollouts: Rollouts, rewards: RewardBatch, watch: Stopwatch
    ) -> tuple[Rollouts, PolicyBatch, Metrics]:
        """The rollouts with their old log-probs, what the method makes of them, and the numbers about both."""
        scorer = TimedScorer(self.scorer, watch)
        reference = None if self.reference is None else TimedScorer(self.reference, watch)
        with watch.measure("logprobs"):
            self._keep_trunk(rollouts)
        sampled_logprobs = rollouts.logprobs
        if self.recompute_logprobs:
            logprobs = scorer.logprobs(rollouts, temperature=rollouts.temperature)
            rollouts = replace(rollouts, logprobs=logprobs)
        step = self.collects + 1
        require_finite(
            {"the log-prob while sampling": rollouts.logprobs, "the value": rollouts.values},
            f"at step {step}, before its first update; the weights are unchanged",
        )
        require_finite(
            {"the reward": rewards.per_completion, "the reward per token": rewards.per_token},
            f"at step {step}, before its first update; the weights are unchanged. Clip or normalise the reward",
        )
        with torch.no_grad():
            batch = self.algorithm.make_batch(scorer, reference, rollouts, rewards)
        require_finite(
            {
                "the log-prob under the reference": batch.ref_logprobs,
                "the value": batch.old_values,
                "the return": batch.returns,
                "the advantage": batch.advantages,
            },
            f"at step {step}, before its first update; the weights are unchanged. Clip or normalise the reward",
        )
        group = self.algorithm.config.group_size
        metrics = collect_metrics(rollouts, rewards, batch, group) | self.algorithm.collect_metrics(batch)
        if self.recompute_logprobs:
            action = self.algorithm.config.action
            correction, weights = sampling_correction(
                rollouts, sampled_logprobs, action=action, cap=self.importance_cap
            )
            metrics |= correction
            batch = replace(batch, importance_weights=weights)
        return rollouts, batch, metrics

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able values, and the tensors of the batch in use."""
        values: dict[str, Any] = {
            "stream": self.stream.state_dict(),
            "collects": self.collects,
            "collecting": self.batch is not None,
            "cursor": self.cursor,
            "rewards": self.maker.harness.state_dict(),
            "batch": None,
        }
        if self.batch is None:
            return values, {}
        tensors = self.batch.tensors()
        values["batch"] = {f.name: getattr(self.batch, f.name) for f in fields(self.batch) if f.name not in tensors}
        if self.batch.filtering is not None:
            values["batch"]["filtering"] = asdict(self.batch.filtering)
        return values, tensors

    def load_state_dict(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.stream.load_state_dict(values["stream"])
        self.collects, self.cursor = int(values["collects"]), int(values["cursor"])
        self.maker.harness.load_state_dict(values["rewards"])
        fields_of_batch: dict[str, Any] = {**tensors, **(values["batch"] or {})}
        if fields_of_batch.get("filtering") is not None:
            fields_of_batch["filtering"] = Filtering(**fields_of_batch["filtering"])
        self.batch = None if values["batch"] is None else PolicyBatch(**fields_of_batch)


def _as_trained(rollouts: Rollouts, filtering: Filtering | None) -> Rollouts:
    """Rollouts whose log-probs are those of the distribution that is trained."""
    if filtering is None:
        return rollouts
    return replace(rollouts, logprobs=rollouts.behaviour_logprobs, filtering=filtering)


def _sequence_kls(batch: PolicyBatch) -> Tensor:
    """[B]."""
    return (kl_k1(batch.old_logprobs, batch.ref_logprobs) * batch.completion_mask).sum(-1)


def _sequence_kl(batch: PolicyBatch) -> float:
    return float(_sequence_kls(batch).mean())


def rollout_metrics(rollouts: Rollouts, rewards: RewardBatch) -> Metrics:
    """What is logged about the completions of one collect, whatever is made of them."""
    seen = rollouts.seen_lengths.float()
    distinct = {
        tuple(row[:n].tolist()) for row, n in zip(rollouts.completion_ids, rollouts.completion_lengths, strict=True)
    }
    return {
        "rollout/length_mean": float(seen.mean()),
        "rollout/tokens": float(rollouts.completion_lengths.sum()),
        "rollout/eos_fraction": sum(reason == "eos" for reason in rollouts.finish_reasons) / len(rollouts),
        "rollout/truncated_fraction": float(rollouts.truncated.float().mean()),
        "rollout/empty_fraction": float((rollouts.completion_lengths <= 1).float().mean()),
        "rollout/distinct": len(distinct) / len(rollouts),
        **rewards.metrics,
    }


def collect_metrics(rollouts: Rollouts, rewards: RewardBatch, batch: PolicyBatch, group_size: int) -> Metrics:
    """What is logged about one collect."""
    groups = rewards.totals.view(-1, group_size)
    surprise = -(batch.old_logprobs * batch.completion_mask).sum(-1)
    metrics = {
        **rollout_metrics(rollouts, rewards),
        "policy/sequence_kl": _sequence_kl(batch),
        "policy/sequence_entropy": float(surprise.mean()),
    }
    if group_size > 1:
        metrics["reward/zero_variance_groups"] = float((groups.amax(1) == groups.amin(1)).float().mean())
    return metrics


class TextSource(ABC, Generic[T]):
    """Batches of a data set's texts, in a new keyed order every epoch. One batch is one step."""

    done = True

    def __init__(self, texts: Sequence[T], *, batch_size: int, seed: int, shuffle: bool = True) -> None:
        self.stream = PromptStream(texts, seed=seed, shuffle=shuffle)
        self.batch_size = batch_size
        self.seen = CollectStats(samples=0, tokens=0)
        self.watch = Stopwatch()

    @abstractmethod
    def batch_of(self, taken: Sequence[tuple[int, T]], first: int) -> Batch | ComparisonBatch | PairBatch:
        """What is made of texts.

        Args:
            taken: each with its place in the data.
            first: how many were taken before them, over all epochs.
        """

    def collect(self, policy: Any) -> Iterator[Batch | ComparisonBatch | PairBatch]:
        first = self.stream.position
        batch = self.batch_of(self.stream.take(self.batch_size), first)
        seconds = self.watch.take("logprobs")
        timings = {"time/logprobs": seconds} if seconds else {}
        self.seen = CollectStats(samples=len(batch), tokens=int(batch.loss_mask.sum()), timings=timings)
        yield batch

    def finish(self) -> CollectStats:
        return self.seen

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-able values, and no tensors."""
        return {"stream": self.stream.state_dict(), "collecting": False}, {}

    def load_state_dict(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.stream.load_state_dict(values["stream"])


class DemonstrationSource(TextSource[Demonstration]):
    """Batches of demonstrations."""

    def batch_of(self, taken: Sequence[tuple[int, Demonstration]], first: int) -> Batch:
        return collate_demonstrations([demonstration for _, demonstration in taken])
