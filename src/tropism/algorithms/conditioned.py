"""Reward-conditioned fine-tuning: maximum likelihood of texts that are told their own reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tropism.algorithms.base import Ratios, RunFacts, Scorer
from tropism.algorithms.pool import PoolAlgorithm, PoolConfig, PoolPlan
from tropism.ops import masked_sum
from tropism.targets.conditioner import Targets
from tropism.targets.config import Conditioning, Mechanism, ScalerName
from tropism.types import DemonstrationBatch, Metrics, ScoredText, Sums, pad_rows


@dataclass(frozen=True, kw_only=True)
class Online:
    """Upside-down reinforcement learning: the model goes on to sample what it is asked for, and learns from that."""

    group_size: int = 4
    """Completions sampled per prompt in every step."""
    updates: int = 8
    """Optimizer steps between two samplings."""
    batch_size: int = 32
    """Texts of the pool per optimizer step."""
    top: float = 0.2
    """The share of the pool, best first, whose rewards are asked for when sampling."""

    def __post_init__(self) -> None:
        if min(self.group_size, self.updates, self.batch_size) < 1:
            raise ValueError("group_size, updates and batch_size must be at least 1")
        if not 0 < self.top <= 1:
            raise ValueError("top must lie in (0, 1]: it is a share of the pool")


@dataclass(frozen=True, kw_only=True)
class RewardConditioned(PoolConfig):
    """Reward-conditioned training (upside-down RL, https://arxiv.org/abs/1912.02877): every text is preceded by its own
    reward, so that the model can later be asked for one. Texts come with rewards, or are sampled and scored first."""

    name: ClassVar[str] = "conditioned"
    learns_from: ClassVar[str] = "texts with their rewards, from a file or its own"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "conditionme": {"scaler": "none", "prompt_loss_weight": 1.0, "target_dropout": 0.0, "slot_rate": 1.0},
    }

    mechanism: Mechanism = "linear"
    """linear, add, replace, token or text: how the model is told (docs/methods/conditioned.md)."""
    targets: tuple[str, ...] = ("reward",)
    """Rewards that can be asked for: numeric columns of the data, or, of its own samples, terms of the recipe's reward
    (``reward`` is their weighted total)."""
    scaler: ScalerName = "standard"
    """Scale of the numbers in the slots: standard, min_max, quantile, standard_times_1000, times_1000 or none."""
    bins: int = 10
    """Control tokens per reward, for the mechanism token: equal shares of the training rewards."""
    direction: Literal["random", "ones"] = "random"
    """Of add and replace: a fixed random direction, or 1 everywhere as the original has it."""
    target_dropout: float = 0.1
    """Share of the training texts that are not told a reward, each reward by itself; so it may be left open later."""
    prompt_loss_weight: float = 0.0
    """Weight of the prompt's tokens in the loss: 0 learns the completion alone, 1 the whole text alike."""
    samples_per_prompt: int | None = None
    """Sample so many completions of each prompt before training and learn from them; None: the data has rewards."""
    online: Online | None = None
    """Sample and learn in turns; None: the texts are what they are."""
    eval_target: float | dict[str, float] | None = None
    """What is asked for in held-out evaluation; None: the 95th percentile of the training rewards."""
    max_length: int | None = None
    """Longer texts are cut at this many tokens, slots included; None: the model's context."""
    slot_rate: float = 3.0
    """Learning rate of the slots as a multiple of the language model's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", self.conditioning.targets)  # which checks its fields
        if not 0 <= self.target_dropout < 1:
            raise ValueError("target_dropout must lie in [0, 1)")
        if self.prompt_loss_weight < 0:
            raise ValueError("prompt_loss_weight must not be negative")
        if self.samples_per_prompt is not None and self.samples_per_prompt < 1:
            raise ValueError("samples_per_prompt must be at least 1, or None for data that has rewards")
        if self.samples_per_prompt is not None and self.online is not None:
            raise ValueError("samples_per_prompt samples once and online in every step; leave one of them out")
        if self.max_length is not None and self.max_length < 3:
            raise ValueError("max_length must be at least 3, or None for the model's context")
        if not self.slot_rate > 0:
            raise ValueError("slot_rate must be positive")

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(
            mechanism=self.mechanism,
            targets=self.targets,
            scaler=self.scaler,
            bins=self.bins,
            direction=self.direction,
        )

    @property
    def reads(self) -> Literal["prompts", "scored"]:
        return "scored" if self.samples_per_prompt is None and self.online is None else "prompts"

    @property
    def on_policy(self) -> bool:
        return self.online is not None

    @property
    def evaluated_at(self) -> Targets:
        return self.eval_target

    @property
    def leaves_open(self) -> bool:
        return self.target_dropout > 0

    @property
    def head_rate(self) -> float:
        return self.slot_rate

    def plan(self, prompts_per_step: int) -> PoolPlan:
        if self.online is None:
            per_prompt = self.samples_per_prompt or 1
            return PoolPlan(per_prompt=per_prompt, once=True, updates=1, batch_size=prompts_per_step)
        online = self.online
        return PoolPlan(per_prompt=online.group_size, once=False, updates=online.updates, batch_size=online.batch_size)

    def build(self, facts: RunFacts) -> RewardConditionedAlgorithm:
        return RewardConditionedAlgorithm(self, facts)


@dataclass(frozen=True, kw_only=True)
class WeightedBatch(DemonstrationBatch):
    """Texts to imitate, some tokens more than others."""

    token_weights: Tensor
    """[B, T] weight of each token's loss; above 0 exactly where ``loss_mask`` is true."""


class RewardConditionedAlgorithm(PoolAlgorithm[RewardConditioned]):
    """The method in a run; its state is the scale of the rewards, which the first texts settle."""

    def __init__(self, config: RewardConditioned, facts: RunFacts) -> None:
        super().__init__(config, facts)
        self.scores: Sequence[tuple[float, ...]] = ()

    def take_scores(self, scores: Sequence[tuple[float, ...]]) -> Metrics:
        # Numbers in slots keep their scale, or they would lie; tokens follow the pool, or all texts end up in the last.
        if self.conditioner.fitted and not (self.config.online is not None and self.config.mechanism == "token"):
            self.conditioner.see(scores)
        else:
            self.conditioner.fit(scores)
        self.scores = scores
        return {}

    def ask(self, uniforms: Tensor) -> list[tuple[int, ...]]:
        """The rewards of texts from the upper end of the pool; before there is one, of what an earlier run has seen."""
        if not self.scores:
            return [self._ask_of_seen(float(u)) for u in uniforms]
        columns = torch.tensor(self.scores, dtype=torch.float64)
        # Rewards have scales of their own, so the best are those that rank best, over all rewards together.
        ranks = columns.argsort(dim=0, stable=True).argsort(dim=0, stable=True).sum(-1)
        count = len(self.scores)
        best = ranks.argsort(descending=True, stable=True)[: max(1, round(self._top * count))]
        chosen = best[(uniforms.double() * len(best)).long()]
        return [self.conditioner.prefix(self.scores[place], warn=False) for place in chosen.tolist()]

    def _ask_of_seen(self, uniform: float) -> tuple[int, ...]:
        """Nothing where no earlier run has seen any."""
        share = 1.0 - self._top * (1.0 - uniform)
        return self.conditioner.prefix(tuple(seen.quantile(share) for seen in self.conditioner.seen), warn=False)

    @property
    def _top(self) -> float:
        return 1.0 if self.config.online is None else self.config.online.top

    def make_batch(
        self, texts: Sequence[ScoredText], places: Sequence[int], uniforms: Tensor, reference: Scorer | None
    ) -> WeightedBatch:
        """Each text after its own rewards, some of which are left open."""
        told = (uniforms >= self.config.target_dropout).tolist()
        prompts, completions, weights = [], [], []
        for text, kept in zip(texts, told, strict=True):
            asked = tuple(r if keep else None for r, keep in zip(text.rewards, kept, strict=True))
            prompt, weighed = self._conditioned(text, asked)
            ids = (*prompt, *text.completion_ids)
            first = max(1, len(ids) - len(weighed))  # at least one id stays to predict from
            prompts.append(ids[:first])
            completions.append(ids[first:])
            weights.append(weighed[first - len(ids) :] if first < len(ids) else [])
        token_weights = pad_rows(weights, value=0.0, dtype=torch.float32)
        return WeightedBatch(
            prompt_ids=pad_rows(prompts, left=True),
            prompt_lengths=torch.tensor([len(ids) for ids in prompts]),
            completion_ids=pad_rows(completions),
            completion_lengths=torch.tensor([len(ids) for ids in completions]),
            loss_mask=token_weights > 0,
            token_weights=token_weights,
        )

    def _conditioned(self, text: ScoredText, asked: tuple[float | None, ...]) -> tuple[tuple[int, ...], list[float]]:
        """The prompt's ids after what asks for these rewards, and the weights of the last ids of the whole text."""
        conditioner, weight = self.conditioner, self.config.prompt_loss_weight
        prefix = conditioner.prefix(asked, warn=False)
        # What a text begins with in any case is not learned: bos, or what says the reward.
        learned = len(text.prompt_ids) - (text.prompt_ids[:1] == (conditioner.bos_id,)) if weight > 0 else 0
        return conditioner.apply(text.prompt_ids, prefix), [weight] * learned + [1.0] * len(text.completion_ids)

    def loss(self, policy: Any, batch: WeightedBatch) -> tuple[Sums, Ratios]:
        """-sum of log-probs of the learned tokens, each times its weight."""
        logprobs = policy(**batch.inputs, mask=batch.loss_mask, want=frozenset({"logprobs"})).logprobs
        return {"nll": -masked_sum(batch.token_weights * logprobs, batch.loss_mask)}, {}

    def weight(self, batch: WeightedBatch) -> dict[str, float]:
        return {"nll": float(batch.token_weights.sum())}

    def state_dict(self) -> dict[str, Any]:
        return {"conditioner": self.conditioner.to_dict() if self.conditioner.fitted else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["conditioner"] is not None:
            self.conditioner.load_dict(state["conditioner"])
