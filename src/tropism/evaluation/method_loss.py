"""Held-out evaluation by the loss that a method trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from tropism.types import Batch, Metrics

T = TypeVar("T")
AT_ONCE = 256
"""Texts that are collated together."""


class MethodLossEvaluation(Generic[T]):
    """The parts of a method's loss on held-out texts, each a mean as in training, and their sum.

    Args:
        collate: texts -> a batch, as in training.
        losses: a batch -> named sums over it.
        weight: a batch -> what each sum is divided by.
    """

    def __init__(
        self,
        texts: Sequence[T],
        *,
        collate: Callable[[Sequence[T]], Batch],
        losses: Callable[[Any], dict[str, float]],
        weight: Callable[[Any], dict[str, float]],
    ) -> None:
        self.texts, self.collate, self.losses, self.weight = texts, collate, losses, weight

    def __len__(self) -> int:
        return len(self.texts)

    def __call__(self, step: int) -> tuple[Metrics, dict[str, list[Any]] | None]:
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for begin in range(0, len(self.texts), AT_ONCE):
            batch = self.collate(self.texts[begin : begin + AT_ONCE])
            for name, value in self.losses(batch).items():
                sums[name] = sums.get(name, 0.0) + value
            for name, value in self.weight(batch).items():
                weights[name] = weights.get(name, 0.0) + value
        parts = {name: value / weights[name] if weights[name] else 0.0 for name, value in sums.items()}
        return {"eval/loss": sum(parts.values()), **{f"eval/loss/{name}": v for name, v in parts.items()}}, None
