"""What people said about completions, as records and as batches: the data of reward models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from tropism.types import length_mask

Kind = Literal["choice", "rating", "difference"]
"""What people said: which of K completions is best, how good one is, or by how much the second of two is better."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Completions of one prompt, and what a person said about them: which is best, or how good, or how different."""

    ids: tuple[tuple[int, ...], ...]
    """K rows: prompt and completion as the reward model reads them, special tokens included; none is empty."""
    prompt: str
    """What all of them answer, of a chat its messages as plain text; empty where the data has no prompts."""
    chat: bool = False
    """Whether the prompt is a chat."""
    completions: tuple[str, ...]
    """K texts, for the table of held-out comparisons and for the rules that the model is measured against."""
    choice: int | None = None
    """Index of the best; None for a tie (of two), and where a number was given instead."""
    target: float | None = None
    """The rating (K = 1), or by how much the second is better than the first (K = 2); None where one was chosen."""
    margin: float = 0.0
    """By how much the score of the chosen one should lead."""
    weight: float = 1.0
    """How much this judgement counts, above 0."""
    ratings: tuple[float, ...] | None = None
    """How good each completion was found; only for measuring. None where nobody said."""


@dataclass(frozen=True, kw_only=True)
class ComparisonBatch:
    """B comparisons of up to K completions each. An item is never split over micro-batches.

    Two comparisons, the first of three completions, the second of two::

        ids      [[[5, 8], [5, 9], [5, 7]], [[6, 4], [6, 0], [0, 0]]]
        lengths  [[2, 2, 2], [2, 1, 0]]          choices  [2, 0]
    """

    ids: Tensor
    """[B, K, L] padded on the right, and with empty rows where an item has fewer completions."""
    lengths: Tensor
    """[B, K] 0 where there is no completion."""
    choices: Tensor
    """[B] index of the best; -1 for a tie, and where ``targets`` say it."""
    targets: Tensor
    """[B] fp32 rating, or difference; 0 where one was chosen."""
    margins: Tensor
    """[B] fp32."""
    weights: Tensor
    """[B] fp32; 0 takes an item out of the loss."""
    kind: Kind = "choice"
    """Of all items."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def present(self) -> Tensor:
        """[B, K] bool: where there is a completion."""
        return self.lengths > 0

    @property
    def loss_mask(self) -> Tensor:
        """[B, K * L] bool: the tokens that are read, of items that count."""
        read = length_mask(self.lengths.flatten(), self.ids.shape[2]).view(len(self), -1)
        return read & (self.weights > 0)[:, None]

    @property
    def total_lengths(self) -> Tensor:
        """[B] tokens that computing an item takes, pads included."""
        return self.lengths.amax(1) * self.present.sum(1)

    def select(self, rows: Tensor) -> Self:
        """The given items (index tensor [N]), trimmed to the longest text among them."""
        chosen = {name: value[rows.to(value.device)] for name, value in self.tensors().items()}
        width = int(chosen["lengths"].max()) if len(rows) else 0
        return replace(self, **{**chosen, "ids": chosen["ids"][:, :, :width]})  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Self:
        changes: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **changes)

    def tensors(self) -> dict[str, Tensor]:
        """All tensor fields by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def emptied(self) -> Self:
        """The same rows, of which nothing is learned."""
        return replace(self, weights=torch.zeros_like(self.weights))


def collate_comparisons(items: Sequence[Comparison], *, kind: Kind) -> ComparisonBatch:
    """A batch of comparisons, all of one kind."""
    most = max(len(item.ids) for item in items)
    width = max(len(row) for item in items for row in item.ids)
    ids = torch.zeros(len(items), most, width, dtype=torch.long)
    lengths = torch.zeros(len(items), most, dtype=torch.long)
    for place, item in enumerate(items):
        for k, row in enumerate(item.ids):
            ids[place, k, : len(row)] = torch.tensor(row)
            lengths[place, k] = len(row)
    return ComparisonBatch(
        ids=ids,
        lengths=lengths,
        choices=torch.tensor([-1 if item.choice is None else item.choice for item in items]),
        targets=torch.tensor([item.target or 0.0 for item in items]),
        margins=torch.tensor([item.margin for item in items]),
        weights=torch.tensor([item.weight for item in items]),
        kind=kind,
    )
