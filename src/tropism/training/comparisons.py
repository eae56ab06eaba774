"""Batches of what people said about completions."""

from __future__ import annotations

from collections.abc import Sequence

from tropism.judgements import Comparison, ComparisonBatch, Kind, collate_comparisons
from tropism.training.sources import TextSource


class ComparisonSource(TextSource[Comparison]):
    """Batches of judgements, dealt by one permutation of all of them, whatever the number of processes."""

    def __init__(self, items: Sequence[Comparison], *, kind: Kind, batch_size: int, seed: int) -> None:
        super().__init__(items, batch_size=batch_size, seed=seed)
        self.kind = kind

    def batch_of(self, taken: Sequence[tuple[int, Comparison]], first: int) -> ComparisonBatch:
        return collate_comparisons([item for _, item in taken], kind=self.kind)
