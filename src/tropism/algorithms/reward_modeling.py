"""Reward modelling: scores that say what people would choose, from their choices or ratings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tropism.algorithms.base import Algorithm, AlgorithmConfig, Ratios, RunFacts
from tropism.judgements import ComparisonBatch
from tropism.ops import best_of_k_loss, bradley_terry_loss
from tropism.types import Sums


@dataclass(frozen=True, kw_only=True)
class RewardModeling(AlgorithmConfig):
    """A reward model from human judgements: best of K, pairs, ratings or differences, whatever the data holds."""

    name: ClassVar[str] = "reward-model"
    learns_from: ClassVar[str] = "choices or ratings of completions"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"lm-human-preferences": {}}

    text: Literal["prompt+completion", "completion"] = "prompt+completion"
    """What the model reads: both, or the completion alone."""
    label_smoothing: float = 0.0
    """Assumed probability that a choice is wrong and fell on any of the others alike; at most one half."""
    margin: float = 0.0
    """By how much the score of the chosen one should lead; a column `margin` of the data adds to it."""
    annotator_weights: Mapping[str, float] | None = None
    """How much each annotator's judgements count, by the column `annotator`; None: all alike."""
    varied_k: bool = False
    """Records may hold different numbers of completions; otherwise that is taken for damage."""
    max_length: int | None = None
    """Longer texts lose the beginning of their prompt, then the end of the completion, at this many tokens; None: what
    the model's body takes."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 0.5:
            raise ValueError("label_smoothing must lie between 0 and 0.5")
        if self.text not in ("prompt+completion", "completion"):
            raise ValueError(f"text must be prompt+completion or completion, not {self.text!r}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError("max_length must be at least 1, or None for what the model takes")
        for annotator, weight in (self.annotator_weights or {}).items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ValueError(f"annotator_weights: {annotator!r} has {weight!r}; give a number above 0")

    @property
    def reads(self) -> Literal["comparisons"]:
        return "comparisons"

    def build(self, facts: RunFacts) -> RewardModelingAlgorithm:
        return RewardModelingAlgorithm(self, facts)


class RewardModelingAlgorithm(Algorithm[RewardModeling]):
    """Reward modelling in a run; it has no state of its own."""

    def loss(self, policy: Any, batch: ComparisonBatch) -> tuple[Sums, Ratios]:
        """Sums over judgements, each times its weight.

        choice       -log softmax(scores)[chosen], the chosen score less its margin     https://arxiv.org/abs/1909.08593
        rating       (score - rating)^2
        difference   (difference - (score_2 - score_1))^2
        """
        scores = scores_of(policy, batch)
        losses = self._losses(scores, batch)
        sums: Sums = {batch.kind: (losses * batch.weights).sum()}
        return sums, _ratios(scores.detach(), batch)

    def _losses(self, scores: Tensor, batch: ComparisonBatch) -> Tensor:
        """[B] from scores [B, K]."""
        if batch.kind == "rating":
            return (scores[:, 0] - batch.targets).square()
        if batch.kind == "difference":
            return (batch.targets - (scores[:, 1] - scores[:, 0])).square()
        smoothing, margins = self.config.label_smoothing, batch.margins + self.config.margin
        told = best_of_k_loss(
            scores, batch.choices.clamp(min=0), margin=margins, label_smoothing=smoothing, present=batch.present
        )
        # A tie of two is the one choice as much as the other; there is no margin between equals.
        tied = bradley_terry_loss(scores[:, 0], scores[:, 1], label_smoothing=0.5)
        return torch.where(batch.choices < 0, tied, told)

    def weight(self, batch: ComparisonBatch) -> dict[str, float]:
        return {batch.kind: float(batch.weights.sum())}


def scores_of(model: Any, batch: ComparisonBatch) -> Tensor:
    """[B, K] scores; -inf where there is no completion."""
    present = batch.present
    scores = model(batch.ids[present], batch.lengths[present])
    return torch.full(present.shape, -torch.inf, device=scores.device).masked_scatter(present, scores)


@torch.no_grad()
def _ratios(scores: Tensor, batch: ComparisonBatch) -> Ratios:
    counted, present = batch.weights > 0, batch.present & (batch.weights > 0)[:, None]
    ratios: Ratios = {"score/mean": (scores[present].sum(), present.sum())}
    if batch.kind == "choice":
        told = counted & (batch.choices >= 0)
        right = scores.argmax(1) == batch.choices
        ratios["choice/accuracy"] = ((right & told).sum(), told.sum())
    return ratios
