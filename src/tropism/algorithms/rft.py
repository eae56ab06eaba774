"""RFT: learn from the best of one's own completions, and of those from ever fewer before sampling anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tropism.algorithms.base import CollectStats, Ratios, RunFacts, Scorer, count_tokens
from tropism.algorithms.pool import PoolAlgorithm, PoolConfig, PooledText, PoolPlan
from tropism.ops import masked_sum
from tropism.types import DemonstrationBatch, Metrics, ScoredText, Sums, length_mask, pad_rows


@dataclass(frozen=True, kw_only=True)
class RFT(PoolConfig):
    """Rejection sampling fine-tuning (RAFT, https://arxiv.org/abs/2304.06767; ReST, https://arxiv.org/abs/2308.08998):
    sample, keep what scores best among the completions of its own prompt, and imitate it."""

    name: ClassVar[str] = "rft"
    learns_from: ClassVar[str] = "the best of its own completions"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "trlx": {"start_percentile": 0.7, "end_percentile": 0.95, "improve_steps": 4, "group_size": 32},
        "trlx/example": {"start_percentile": 0.9, "end_percentile": 0.95, "improve_steps": 1, "group_size": 4},
        "best-of-n": {
            "start_percentile": 1.0,
            "end_percentile": 1.0,
            "improve_steps": 1,
            "group_size": 16,
            "keep": "best",
            "memory": 1,
        },
    }

    start_percentile: float = 0.7
    """Share of a prompt's completions that lies below its threshold, in the first step after sampling."""
    end_percentile: float = 0.95
    """The same in the last step before sampling anew; in between it rises evenly."""
    improve_steps: int = 4
    """Steps from one sampling to the next. With 1 there is only a last one, so end_percentile holds."""
    group_size: int = 8
    """Completions sampled per prompt."""
    keep: Literal["threshold", "best"] = "threshold"
    """threshold: what reaches its prompt's threshold and is better than the prompt's worst; best: the single best
    completion of each prompt, whatever it scores (best-of-n distillation)."""
    memory: int | None = None
    """Learn from the completions of so many samplings, the last included; None: of all so far."""
    batch_size: int = 32
    """Most completions per optimizer step."""
    epochs: int = 1
    """Passes over what is kept, in every step."""
    updates: int | None = None
    """Optimizer steps of a step, each of batch_size completions, in place of passes; None: as many as epochs take."""

    def __post_init__(self) -> None:
        if not 0 <= self.start_percentile <= self.end_percentile <= 1:
            raise ValueError("start_percentile and end_percentile must lie in [0, 1], and the end not below the start")
        if min(self.improve_steps, self.group_size, self.batch_size, self.epochs) < 1:
            raise ValueError("improve_steps, group_size, batch_size and epochs must be at least 1")
        if self.keep == "threshold" and self.group_size < 2 and self.memory == 1:
            raise ValueError("group_size must be at least 2: a prompt's only completion is its best and its worst")
        if self.keep == "best" and self.start_percentile < 1:
            raise ValueError(
                "keep: best knows no percentiles; set start_percentile and end_percentile to 1, or use the preset "
                "best-of-n"
            )
        if self.memory is not None and self.memory < 1:
            raise ValueError("memory must be at least 1, or None for all completions so far")
        if self.updates is not None and self.updates < 1:
            raise ValueError("updates must be at least 1, or None for as many as the epochs take")
        if self.updates is not None and self.epochs > 1:
            raise ValueError("updates takes the place of epochs; leave one of them out")

    def plan(self, prompts_per_step: int) -> PoolPlan:
        return PoolPlan(
            per_prompt=self.group_size,
            once=False,
            updates=self.updates,
            batch_size=self.batch_size,
            every=self.improve_steps,
            epochs=self.epochs,
            memory=self.memory,
        )

    def percentile(self, step: int) -> float:
        """Of a step, counted from 0: it rises evenly from start to end, and reaches the end before sampling anew."""
        place, last = step % self.improve_steps, self.improve_steps - 1
        if place == last:
            return self.end_percentile
        return self.start_percentile + (self.end_percentile - self.start_percentile) * place / last

    def build(self, facts: RunFacts) -> RFTAlgorithm:
        return RFTAlgorithm(self, facts)


class RFTAlgorithm(PoolAlgorithm[RFT]):
    """RFT in a run; what it has of state follows from the pool."""

    def __init__(self, config: RFT, facts: RunFacts) -> None:
        super().__init__(config, facts)
        self.noted: Metrics = {}

    def choose(self, texts: Sequence[PooledText], step: int) -> list[int]:
        """The completions that this step imitates, oldest first; none where no prompt has one better than others."""
        percentile = self.config.percentile(step) if self.config.keep == "threshold" else None
        groups = places_by_prompt(texts)
        thresholds: list[float] = []
        kept: list[int] = []
        for places in groups:
            scores = [texts[place].rewards[0] for place in places]
            if percentile is None:
                kept.append(places[scores.index(max(scores))])
                continue
            threshold, worst = threshold_of(scores, percentile), min(scores)
            good = [p for p, score in zip(places, scores, strict=True) if score >= threshold and score > worst]
            kept += distinct(good, texts)
            thresholds += [threshold] if good else []
        self.noted = {
            "pool/kept": float(len(kept)),
            "pool/kept_prompts": len({texts[place].prompt for place in kept}) / len(groups),
        }
        if kept:
            self.noted["pool/kept_reward"] = fmean(texts[place].rewards[0] for place in kept)
        if percentile is not None:
            self.noted["pool/percentile"] = percentile
        if thresholds:
            self.noted["pool/threshold"] = fmean(thresholds)
        return sorted(kept)

    def after_collect(self, stats: CollectStats) -> Metrics:
        return self.noted

    def make_batch(
        self, texts: Sequence[ScoredText], places: Sequence[int], uniforms: Tensor, reference: Scorer | None
    ) -> DemonstrationBatch:
        """The completions, of which every token is learned, after prompts, of which none is."""
        prompts, completions = [text.prompt_ids for text in texts], [text.completion_ids for text in texts]
        lengths, ids = torch.tensor([len(row) for row in completions]), pad_rows(completions)
        return DemonstrationBatch(
            prompt_ids=pad_rows(prompts, left=True),
            prompt_lengths=torch.tensor([len(row) for row in prompts]),
            completion_ids=ids,
            completion_lengths=lengths,
            loss_mask=length_mask(lengths, ids.shape[1]),
        )

    def loss(self, policy: Any, batch: DemonstrationBatch) -> tuple[Sums, Ratios]:
        """-sum of log-probs of the completion tokens."""
        logprobs = policy(**batch.inputs, mask=batch.loss_mask, want=frozenset({"logprobs"})).logprobs
        return {"nll": -masked_sum(logprobs, batch.loss_mask)}, {}

    def weight(self, batch: DemonstrationBatch) -> dict[str, float]:
        return {"nll": count_tokens(batch)}


def threshold_of(scores: Sequence[float], percentile: float) -> float:
    """The quantile of one prompt's scores, linear between neighbours.

    With the scores in ascending order s_0 .. s_(N-1) and h = percentile (N - 1):

        s_floor(h) + (h - floor(h)) (s_(floor(h)+1) - s_floor(h))      definition 7 of Hyndman and Fan 1996

    Args:
        scores: N >= 1 of them.
        percentile: in [0, 1].
    """
    ordered = sorted(scores)
    # 0.07 * 100 is 7.000000000000001: a score that is the quantile may not fall below it by rounding.
    height = round(percentile * (len(ordered) - 1), 9)
    below = int(height)
    if height == below:
        return ordered[below]
    low, high = ordered[below : below + 2]
    return min(high, low + (height - below) * (high - low))


def places_by_prompt(texts: Sequence[PooledText]) -> list[list[int]]:
    """Places of the completions of each prompt of the data, oldest first; prompts in the order they were met."""
    groups: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        groups.setdefault(text.prompt, []).append(place)
    return list(groups.values())


def distinct(places: Sequence[int], texts: Sequence[PooledText]) -> list[int]:
    """The first place of each different completion."""
    first: dict[tuple[int, ...], int] = {}
    for place in places:
        first.setdefault(texts[place].completion_ids, place)
    return list(first.values())
