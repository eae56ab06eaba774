"""Held-out comparisons with their scores, as rows of the table that an evaluation of a reward model writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tropism.errors import DataError

if TYPE_CHECKING:
    from tropism.judgements import Kind

Table = dict[str, list[Any]]
KINDS: tuple[Kind, ...] = ("choice", "rating", "difference")


@dataclass(frozen=True, kw_only=True)
class ScoredComparison:
    """K completions of one prompt, what a person said about them, and what the reward model says."""

    prompt: str
    completions: tuple[str, ...]
    scores: tuple[float, ...]
    """K finite numbers."""
    choice: int | None = None
    """Index of the best; None for a tie, and where a number was given instead."""
    target: float | None = None
    """The rating, or by how much the second is better; None where one was chosen."""
    weight: float = 1.0
    """How much it counts in the loss."""
    ratings: tuple[float, ...] | None = None
    """How good each completion was found; None where nobody said."""

    @property
    def characters(self) -> tuple[int, ...]:
        """Length of each completion."""
        return tuple(map(len, self.completions))

    @property
    def predicted(self) -> int | None:
        """Index of the highest score, of equal ones the first; None for a single completion."""
        return self.scores.index(max(self.scores)) if len(self.scores) > 1 else None

    @property
    def probability(self) -> float | None:
        """By the softmax over the scores, of the choice; None where there is none."""
        if self.choice is None:
            return None
        top = max(self.scores)
        return math.exp(self.scores[self.choice] - top) / math.fsum(math.exp(score - top) for score in self.scores)


def table_of(items: Sequence[ScoredComparison], kind: Kind) -> Table:
    """One row per comparison; ``scores`` and ``completions`` tell the table from that of sampled completions."""
    return {
        "kind": [kind for _ in items],
        "prompt": [_storable(item.prompt) for item in items],
        "completions": [[_storable(text) for text in item.completions] for item in items],
        "scores": [list(item.scores) for item in items],
        "choice": [item.choice for item in items],
        "predicted": [item.predicted for item in items],
        "probability": [item.probability for item in items],
        "target": [item.target for item in items],
        "characters": [list(item.characters) for item in items],
        "ratings": [None if item.ratings is None else list(item.ratings) for item in items],
        "weight": [item.weight for item in items],
    }


def is_comparison_table(columns: Mapping[str, Any]) -> bool:
    """Whether a table is one of comparisons."""
    return {"kind", "completions", "scores"} <= set(columns)


def comparisons_in(columns: Mapping[str, Sequence[Any]], where: str) -> tuple[Kind, list[ScoredComparison]]:
    """What ``table_of`` was given.

    Args:
        where: names the table in errors.

    Raises:
        DataError: it is damaged.
    """
    names = ("kind", "prompt", "completions", "scores", "choice", "target", "ratings", "weight")
    missing = [name for name in names if name not in columns]
    if missing:
        raise DataError(f"{where}: the column {missing[0]!r} is missing; it has {sorted(columns)}")
    kinds = set(columns["kind"])
    if len(kinds) != 1 or not kinds <= set(KINDS):
        raise DataError(f"{where}: the column 'kind' holds no or several kinds of comparisons; it is damaged")
    items = []
    for number, row in enumerate(zip(*(columns[name] for name in names), strict=True), start=1):
        try:
            items.append(_comparison(*row[1:]))
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}, row {number} is damaged: {error}") from error
    return kinds.pop(), items


def _comparison(
    prompt: Any, completions: Any, scores: Any, choice: Any, target: Any, ratings: Any, weight: Any
) -> ScoredComparison:
    item = ScoredComparison(
        prompt=str(prompt),
        completions=tuple(str(text) for text in completions),
        scores=tuple(float(score) for score in scores),
        choice=None if choice is None else int(choice),
        target=None if target is None else float(target),
        weight=float(weight),
        ratings=None if ratings is None else tuple(float(rating) for rating in ratings),
    )
    numbers = (*item.scores, *(item.ratings or ()), item.weight, item.target or 0.0)
    if not item.scores or len(item.completions) != len(item.scores):
        raise ValueError(f"{len(item.completions)} completions and {len(item.scores)} scores")
    if item.ratings is not None and len(item.ratings) != len(item.scores):
        raise ValueError(f"{len(item.ratings)} ratings of {len(item.scores)} completions")
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("it holds a number that is not finite")
    if item.choice is not None and not 0 <= item.choice < len(item.scores):
        raise ValueError(f"the choice {item.choice} of {len(item.scores)} completions")
    return item


def _storable(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which files cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
