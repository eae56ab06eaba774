"""KTO: single completions that were liked or not, weighed as people weigh gains and losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tropism.algorithms.base import Algorithm, AlgorithmConfig, Ratios, RunFacts, count_sequences
from tropism.ops import kto_loss
from tropism.preferences import OpinionBatch
from tropism.types import Sums


@dataclass(frozen=True, kw_only=True)
class KTO(AlgorithmConfig):
    """Kahneman-Tversky optimisation (https://arxiv.org/abs/2402.01306) on completions that were each liked or not."""

    name: ClassVar[str] = "kto"
    learns_from: ClassVar[str] = "completions that were liked or not"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"beta": 0.1}, "trl": {"max_length": 1024}}

    beta: float = 0.1
    """How strongly the reference holds: the smaller, the further the policy goes for the same opinions."""
    desirable_weight: float = 1.0
    """Of completions that were liked; raise it where they are few."""
    undesirable_weight: float = 1.0
    """Of completions that were not."""
    max_length: int | None = None
    """Longer texts are cut at this many tokens (their end is then not learned); None: the model's context."""
    shuffle: bool = True
    """A new order in every pass over the data; False keeps the order of the file."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError("beta must be positive and finite")
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError("max_length must be at least 2, or None for the model's context")

    @property
    def reads(self) -> Literal["opinions"]:
        return "opinions"

    @property
    def needs_reference(self) -> bool:
        return True

    def build(self, facts: RunFacts) -> KTOAlgorithm:
        return KTOAlgorithm(self, facts)


class KTOAlgorithm(Algorithm[KTO]):
    """KTO in a run; it has no state of its own. The reference point comes with the batch."""

    def loss(self, policy: Any, batch: OpinionBatch) -> tuple[Sums, Ratios]:
        """The loss of every opinion."""
        output = policy(**batch.inputs, mask=batch.loss_mask, want=frozenset({"logprobs"}))
        return self.judge(batch.per_item(output.logprobs), batch)

    def judge(self, logprobs: Tensor, batch: OpinionBatch) -> tuple[Sums, Ratios]:
        """Sums over opinions, and the numbers for the log.

        Args:
            logprobs: [B] of the completions under the policy, each summed over its tokens.
        """
        config = self.config
        losses = kto_loss(
            logprobs,
            batch.ref_logprobs,
            batch.liked,
            reference_points=batch.reference_points,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        counted = batch.loss_mask.any(1)
        return {"opinion": (losses * counted).sum()}, self._ratios(logprobs, batch, counted)

    @torch.no_grad()
    def _ratios(self, logprobs: Tensor, batch: OpinionBatch, counted: Tensor) -> Ratios:
        """Implicit rewards, beta times the log-ratio, and on which side of the reference point they lie."""
        rewards = self.config.beta * (logprobs - batch.ref_logprobs)
        points = self.config.beta * batch.reference_points
        ahead = torch.where(batch.liked, rewards - points, points - rewards)
        liked, disliked = counted & batch.liked, counted & ~batch.liked
        return {
            "implicit/liked": (rewards[liked].sum(), liked.sum()),
            "implicit/disliked": (rewards[disliked].sum(), disliked.sum()),
            "implicit/margin": (ahead[counted].sum(), counted.sum()),
            "implicit/accuracy": ((ahead[counted] > 0).sum(), counted.sum()),
            "implicit/reference_point": (points[counted].sum(), counted.sum()),
        }

    def weight(self, batch: OpinionBatch) -> dict[str, float]:
        return {"opinion": count_sequences(batch)}
