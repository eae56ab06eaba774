"""Held-out evaluation of a reward model: its scores of completions that people have judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from tropism.errors import NumericsError
from tropism.evaluation.comparison_numbers import RATING_GAP, ComparisonNumbers, measure
from tropism.evaluation.comparison_table import ScoredComparison, Table, table_of
from tropism.judgements import Comparison, Kind
from tropism.types import Metrics


class ComparisonEvaluation:
    """Loss, accuracy beside trivial rules and calibration on held-out comparisons, from one pass of scores.

    Args:
        items: at least one.
        kind: of all of them.
        score: rows of ids -> [N] scores; called once per evaluation, with all texts.
        rating_gap: pairs whose ratings differ by at least this are compared, where the items have ratings.
    """

    def __init__(
        self,
        items: Sequence[Comparison],
        *,
        kind: Kind,
        score: Callable[[Sequence[Sequence[int]]], Tensor],
        rating_gap: float = RATING_GAP,
    ) -> None:
        self.items, self.kind, self.score, self.rating_gap = items, kind, score, rating_gap

    def __len__(self) -> int:
        return len(self.items)

    def __call__(self, step: int) -> tuple[Metrics, Table]:
        """Metrics, and one row per comparison in their order.

        Raises:
            NumericsError: a score is not finite.
        """
        scored = scored_comparisons(self.items, self.score)
        result = measure(scored, self.kind, rating_gap=self.rating_gap, resamples=0)
        return metrics_of(result), table_of(scored, self.kind)


def scored_comparisons(
    items: Sequence[Comparison], score: Callable[[Sequence[Sequence[int]]], Tensor]
) -> list[ScoredComparison]:
    """The comparisons with their scores, all of which are asked for at once.

    Raises:
        NumericsError: a score is not finite.
    """
    scores = iter(score([row for item in items for row in item.ids]).tolist())
    scored = [
        ScoredComparison(
            prompt=item.prompt,
            completions=item.completions,
            scores=tuple(next(scores) for _ in item.ids),
            choice=item.choice,
            target=item.target,
            weight=item.weight,
            ratings=item.ratings,
        )
        for item in items
    ]
    for number, item in enumerate(scored, start=1):
        if not all(map(math.isfinite, item.scores)):
            raise NumericsError(
                f"the reward model's scores of the {number}. held-out comparison are {list(item.scores)}; lower the "
                "learning rate, or look for damaged weights"
            )
    return scored


def metrics_of(result: ComparisonNumbers) -> Metrics:
    """Every number under its name in ``metrics.jsonl``."""
    return {"eval/" + name: interval.mean for name, interval in result.numbers.items()}
