"""What reward functions returned, checked and as plain Python, so that processes can gather it."""

from __future__ import annotations

import collections
import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from tropism.errors import RewardError

Value = float | list[float] | None
"""The reward of one completion by one term: a number, one number per token, or None for no opinion."""

_NO_ROWS = (str, bytes, bytearray, memoryview, Mapping, set, frozenset)
"""Iterable, and yet no list of rewards."""

_FP32_MAX = 3.4028234663852886e38


COUNTS = ("failed", "skipped", "timeouts", "retries", "cached")
"""Calls that failed for good; completions left unscored by them; attempts that took too long; attempts made again;
completions whose reward came from the cache."""


@dataclass(frozen=True, kw_only=True)
class RawRewards:
    """What every term said of B completions, before weights, clipping and scaling. Plain Python throughout."""

    values: Mapping[str, list[Value]]
    """Term -> B values."""
    metrics: Mapping[str, list[float]] = field(default_factory=dict)
    """Name -> every value given to ``log_metric``."""
    extras: Mapping[str, list[Any]] = field(default_factory=dict)
    """Column -> B values given to ``log_extra``."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Term -> what happened to its calls, of ``COUNTS``; what is 0 is left out."""
    errors: Mapping[str, list[str | None]] = field(default_factory=dict)
    """Term of which a call failed (``on_error="skip"``) -> B reasons, None for rows that it scored."""

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @classmethod
    def concat(cls, parts: Sequence[RawRewards]) -> RawRewards:
        """The rows of several parts in order. A column that a part did not log is None in its rows.

        Raises:
            ValueError: no parts, or parts with different terms.
        """
        if not parts:
            raise ValueError("no parts to join")
        names = list(parts[0].values)
        for part in parts[1:]:
            if set(part.values) != set(names):
                raise ValueError(f"cannot join rewards with different terms: {names} and {list(part.values)}")
        columns = sorted({column for part in parts for column in part.extras})
        metrics = sorted({name for part in parts for name in part.metrics})
        failed = [name for name in names if any(name in part.errors for part in parts)]
        return cls(
            values={name: [value for part in parts for value in part.values[name]] for name in names},
            metrics={name: [value for part in parts for value in part.metrics.get(name, [])] for name in metrics},
            extras={
                column: [value for part in parts for value in part.extras.get(column, [None] * len(part))]
                for column in columns
            },
            counts={name: counts for name in names if (counts := _sums(part.counts.get(name, {}) for part in parts))},
            errors={
                name: [reason for part in parts for reason in part.errors.get(name, [None] * len(part))]
                for name in failed
            },
        )


class ReturnError(RewardError):
    """What a reward function returned cannot be used."""


class RowError(ReturnError):
    """An unusable reward of one completion, or input that a reward cannot score; ``row`` counts within the call."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


def _sums(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = collections.Counter[str]()
    for part in counts:
        total.update(part)
    return {name: total[name] for name in COUNTS if total[name]}


def checked_values(returned: Any, token_counts: Sequence[int | None], *, called: str = "reward") -> list[Value]:
    """What a reward function returned, as one plain value per completion.

    Args:
        returned: a list, tuple, array, tensor or iterator with B entries; each a number, bool, 0-d tensor or NumPy
            scalar, None, or a list, tensor or array with one number per token.
        token_counts: [B] number of tokens of each completion; None where one number alone will do.
        called: what the values are called in messages.

    Raises:
        ReturnError: another type, another number of entries, or an entry that is not a finite number. The message
            says what was returned for which row and what to return; the caller adds function, step and prompt.
    """
    if returned is None:
        raise ReturnError(f"returned None; return a list with one {called} per completion (is a `return` missing?)")
    if isinstance(returned, _NO_ROWS):
        raise ReturnError(f"returned a {type(returned).__name__}; return a list with one {called} per completion")
    entries, found = _plain(returned), ""
    if not isinstance(entries, (list, tuple)):
        try:
            rest = iter(entries)
        except TypeError:
            raise ReturnError(
                f"returned a single {type(returned).__name__}; return a list with one {called} per completion"
            ) from None
        entries = list(itertools.islice(rest, len(token_counts) + 1))  # what is left of it may never end
        found = "more than " * (len(entries) > len(token_counts))
    if len(entries) != len(token_counts):
        found = f"{found}{len(token_counts)}" if found else str(len(entries))
        raise ReturnError(
            f"returned {found} {called}s for {len(token_counts)} completions; return exactly one per completion, "
            "None where it has no opinion"
        )
    return [
        _checked_row(entry, row, count) for row, (entry, count) in enumerate(zip(entries, token_counts, strict=True))
    ]


def _plain(value: Any) -> Any:
    """Tensors, arrays, series and NumPy scalars as Python numbers and lists; anything else as it is."""
    for method in ("tolist", "to_pylist"):
        if hasattr(value, method):
            return getattr(value, method)()
    return value


def _checked_row(entry: Any, row: int, tokens: int | None) -> Value:
    entry = _plain(entry)
    if entry is None:
        return None
    if not isinstance(entry, (list, tuple)):
        return _checked_number(entry, row, "")
    if tokens is None:
        raise RowError(f"returned a list of {len(entry)} for one completion; return one number", row)
    if len(entry) != tokens:
        hint = (
            " If the reward is for the whole completion, return a number, not a list of one." if len(entry) == 1 else ""
        )
        raise RowError(
            f"returned {len(entry)} per-token rewards for a completion of {tokens} tokens; return one per entry of "
            f"completion_ids, without padding.{hint}",
            row,
        )
    return [_checked_number(_plain(value), row, f" at token {index}") for index, value in enumerate(entry)]


def _checked_number(value: Any, row: int, where: str) -> float:
    if not isinstance(value, (numbers.Real, Decimal)):
        what = f"the {type(value).__name__} {str(value)[:40]!r}"
        raise RowError(f"returned {what}{where}; return a finite number, or None for no opinion on a completion", row)
    try:
        number = float(value)
    except (OverflowError, ValueError):
        number = math.inf
    if math.isnan(number):
        raise RowError(f"returned NaN{where}; return None for no opinion on a completion, or a finite number", row)
    if abs(number) > _FP32_MAX:
        raise RowError(f"returned {number}{where}; return a finite number below {_FP32_MAX:.1e}, or None", row)
    return number
