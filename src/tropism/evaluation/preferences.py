"""Held-out preferences: the method's loss on them, and what its implicit reward makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from tropism.algorithms.base import Ratios, Scorer
from tropism.types import Metrics, Sums

Table = dict[str, list[Any]]


class Judge(Protocol):
    """A method that turns log-probs of whole completions into its loss."""

    def judge(self, logprobs: Tensor, batch: Any) -> tuple[Sums, Ratios]:
        """Named sums over the items of a batch, and numbers for the log under ``implicit/``."""
        ...

    def weight(self, batch: Any) -> dict[str, float]:
        """What each sum is divided by."""
        ...


class HeldOut(Protocol):
    """Items as batches that lack nothing but the log-probs of the policy."""

    def __len__(self) -> int: ...

    def batches(self) -> Iterable[Any]:
        """All items."""
        ...


class PreferenceEvaluation:
    """The loss of held-out preferences, and means of their implicit rewards."""

    def __init__(self, held_out: HeldOut, *, algorithm: Judge, scorer: Scorer) -> None:
        self.held_out, self.algorithm, self.scorer = held_out, algorithm, scorer

    def __len__(self) -> int:
        return len(self.held_out)

    def __call__(self, step: int) -> tuple[Metrics, Table | None]:
        """``eval/loss`` per item, and ``eval/<name>`` for each ``implicit/<name>`` of training."""
        loss = weight = 0.0
        totals: dict[str, tuple[float, float]] = {}
        for batch in self.held_out.batches():
            logprobs = batch.per_item(self.scorer.logprobs(batch.rows, temperature=1.0))
            sums, ratios = self.algorithm.judge(logprobs, batch)
            loss += sum(float(value) for value in sums.values())
            weight += sum(self.algorithm.weight(batch).values())
            for name, (numerator, denominator) in ratios.items():
                before, count = totals.get(name, (0.0, 0.0))
                totals[name] = before + float(numerator), count + float(denominator)
        means = {
            f"eval/{name.removeprefix('implicit/')}": numerator / denominator
            for name, (numerator, denominator) in totals.items()
            if denominator
        }
        return {"eval/loss": loss / weight, **means}, None
