"""Quark: learn from a growing pool in which every completion is preceded by the token of its quantile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tropism.algorithms.base import Ratios, RunFacts, Scorer, count_tokens
from tropism.algorithms.pool import PoolAlgorithm, PoolConfig, PoolPlan
from tropism.errors import ConfigError
from tropism.ops import masked_sum
from tropism.ops.slots import slot_id
from tropism.targets.config import Conditioning
from tropism.types import DemonstrationBatch, Metrics, ScoredText, Sums, Tokens, length_mask, pad_rows


@dataclass(frozen=True, kw_only=True)
class Quark(PoolConfig):
    """Quantised reward conditioning (Quark, https://arxiv.org/abs/2205.13636): sample what the token of the best
    quantile asks for, sort it into a pool, and learn every completion of the pool after its own quantile's token."""

    name: ClassVar[str] = "quark"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "quantiles": 5,
            "group_size": 1,
            "updates": 500,
            "batch_size": 128,
            "kl_coef": 0.05,
            "entropy_coef": 0.06,
            "slot_rate": 1.0,
        },
    }

    quantiles: int = 5
    """Equal shares of the pool, each with a token of its own."""
    group_size: int = 4
    """Completions sampled per prompt in every step."""
    updates: int = 8
    """Optimizer steps between two samplings."""
    batch_size: int = 32
    """Completions of the pool per optimizer step."""
    kl_coef: float = 0.05
    """Weight of the exact KL to the reference, which sees no token; 0 trains without a reference."""
    entropy_coef: float = 0.06
    """Weight of the entropy bonus."""
    slot_rate: float = 10.0
    """Learning rate of the tokens' embeddings as a multiple of the language model's."""

    def __post_init__(self) -> None:
        if self.quantiles < 2:
            raise ValueError("quantiles must be at least 2: a single one tells nothing apart")
        if min(self.group_size, self.updates, self.batch_size) < 1:
            raise ValueError("group_size, updates and batch_size must be at least 1")
        if self.kl_coef < 0:
            raise ValueError("kl_coef must not be negative: it is a penalty")
        if self.entropy_coef < 0:
            raise ValueError("entropy_coef must not be negative: it is a bonus")
        if not self.slot_rate > 0:
            raise ValueError("slot_rate must be positive")

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(mechanism="token", targets=("reward",), bins=self.quantiles)

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def needs_exact_kl(self) -> bool:
        return self.kl_coef > 0

    @property
    def head_rate(self) -> float:
        return self.slot_rate

    def plan(self, prompts_per_step: int) -> PoolPlan:
        """How the pool grows.

        Raises:
            ConfigError: the first step samples fewer completions than there are quantiles.
        """
        if prompts_per_step * self.group_size < self.quantiles:
            raise ConfigError(
                f"a step samples {prompts_per_step} x {self.group_size} completions, which do not fill "
                f"{self.quantiles} quantiles; raise prompts_per_step or algorithm.group_size, or lower "
                "algorithm.quantiles"
            )
        return PoolPlan(per_prompt=self.group_size, once=False, updates=self.updates, batch_size=self.batch_size)

    def build(self, facts: RunFacts) -> QuarkAlgorithm:
        return QuarkAlgorithm(self, facts)


@dataclass(frozen=True, kw_only=True)
class QuarkBatch(DemonstrationBatch):
    """Completions to imitate, each after the token of its quantile."""

    reference_hidden: Tensor | None = None
    """[B, T, H] what the reference, without that token, predicts each completion token from; None without a KL."""


def quantiles_of(scores: Tensor, count: int) -> Tensor:
    """The quantile of each score: equal shares from the best down, and what is left over to the worst.

    q_i = min(floor(rank_i / floor(N / K)), K - 1), rank 0 the highest score   Quark, https://arxiv.org/abs/2205.13636

    Args:
        scores: [N] finite; of equal ones the earlier ranks higher.
        count: K, from 2 to N.

    Returns:
        [N] integers from 0, the best, to K - 1.

    Raises:
        ValueError: ``scores`` is no vector, or has fewer than K entries.
    """
    if scores.dim() != 1 or not 2 <= count <= len(scores):
        raise ValueError(f"{count} quantiles need at least 2 and as many scores [N]; these are {tuple(scores.shape)}")
    ranks = torch.empty(len(scores), dtype=torch.long)
    ranks[scores.argsort(descending=True, stable=True)] = torch.arange(len(scores))
    return (ranks // (len(scores) // count)).clamp(max=count - 1)


class QuarkAlgorithm(PoolAlgorithm[Quark]):
    """Quark in a run; its only state are the quantiles of the pool, which follow from the scores."""

    def __init__(self, config: Quark, facts: RunFacts) -> None:
        super().__init__(config, facts)
        self.quantiles: list[int] = []
        """Of every text of the pool, 0 the best; empty before the first growth."""

    def take_scores(self, scores: Sequence[tuple[float, ...]]) -> Metrics:
        """Rank the whole pool anew.

        Raises:
            ConfigError: fewer scores than quantiles, or all of them equal.
        """
        count = self.config.quantiles
        if len(scores) < count:
            raise ConfigError(
                f"only {len(scores)} completions got a reward, which do not fill {count} quantiles; see the reward's "
                "errors, raise prompts_per_step or algorithm.group_size, or lower algorithm.quantiles"
            )
        self.conditioner.fit(scores)
        column = torch.tensor([score for (score,) in scores], dtype=torch.float64)
        # So that generation without a target asks for the best.
        self.conditioner.default = float(column.max())
        quantiles = quantiles_of(column, count)
        self.quantiles = quantiles.tolist()
        return {f"pool/quantile_{number}": float(column[quantiles == number].mean()) for number in range(count)}

    def ask(self, uniforms: Tensor) -> list[tuple[int, ...]]:
        """The best token; none before the first growth, which samples the model as it is."""
        best = self._token(0) if self.conditioner.fitted else ()
        return [best] * len(uniforms)

    def _token(self, quantile: int) -> tuple[int, ...]:
        """The slot of a quantile. Quantiles count from the best, and bins from the lowest rewards."""
        return (slot_id(0, float(self.config.quantiles - 1 - quantile)),)

    def make_batch(
        self, texts: Sequence[ScoredText], places: Sequence[int], uniforms: Tensor, reference: Scorer | None
    ) -> QuarkBatch:
        """Each completion after the token of its quantile; the reference reads it without."""
        completions = {
            "completion_ids": pad_rows([text.completion_ids for text in texts]),
            "completion_lengths": torch.tensor([len(text.completion_ids) for text in texts]),
        }
        plain = [text.prompt_ids for text in texts]
        told = [
            self.conditioner.apply(ids, self._token(self.quantiles[place]))
            for ids, place in zip(plain, places, strict=True)
        ]
        hidden = None if reference is None else reference.hidden_states(Tokens(**_prompts(plain), **completions))
        mask = length_mask(completions["completion_lengths"], completions["completion_ids"].shape[1])
        return QuarkBatch(**_prompts(told), **completions, loss_mask=mask, reference_hidden=hidden)

    def loss(self, policy: Any, batch: QuarkBatch) -> tuple[Sums, Ratios]:
        """-log-prob of the tokens + kl_coef * exact KL(policy || reference) - entropy_coef * entropy, summed."""
        config, mask = self.config, batch.loss_mask
        with_kl = batch.reference_hidden is not None
        output = policy(
            **batch.inputs,
            mask=mask,
            want=frozenset({"logprobs", "entropy", "reference_kl"} if with_kl else {"logprobs", "entropy"}),
            entropy_gradient=config.entropy_coef > 0,
            reference_hidden=batch.reference_hidden,
        )
        sums = {"nll": -masked_sum(output.logprobs, mask)}
        ratios = {"policy/entropy": (masked_sum(output.entropy.detach(), mask), mask.sum())}
        if with_kl:
            sums["kl"] = config.kl_coef * masked_sum(output.reference_kl, mask)
            ratios["policy/ref_kl"] = (masked_sum(output.reference_kl.detach(), mask), mask.sum())
        if config.entropy_coef > 0:
            sums["entropy"] = -config.entropy_coef * masked_sum(output.entropy, mask)
        return sums, ratios

    def weight(self, batch: QuarkBatch) -> dict[str, float]:
        count = count_tokens(batch)
        return {"nll": count, "kl": count, "entropy": count}


def _prompts(rows: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    return {"prompt_ids": pad_rows(rows, left=True), "prompt_lengths": torch.tensor([len(ids) for ids in rows])}
