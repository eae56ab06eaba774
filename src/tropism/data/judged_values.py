"""What the columns of a judgement say: numbers, choices, ties and weights, each refused by name where it is none."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NoReturn

import torch

from tropism.data.columns import value_of
from tropism.data.files import listed, shown
from tropism.data.readers import Record
from tropism.errors import ConfigError, DataError

MOST_LISTED = 20
"""Wrong records that an error lists; the others are counted."""

_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def is_given(record: Record, name: str) -> bool:
    """Whether a column that may be left out says something: null and blank text do not."""
    value = record.columns.get(name)
    return value is not None and not (isinstance(value, str) and not value.strip())


def number_of(value: Any, what: str) -> float:
    """A finite number within the range of float32. Digits in text count: tables hold nothing else.

    Args:
        what: names record and column, for messages.

    Raises:
        DataError: it is none, NaN, or too large.
    """
    if isinstance(value, str):
        try:
            number = float(value.replace("_", "x"))
        except ValueError as error:
            raise DataError(f"{what} is the text {shown(value)}, not a number") from error
    elif isinstance(value, bool) or not isinstance(value, numbers.Real | Decimal):
        raise DataError(f"{what} is {type(value).__name__} {shown(value)}, not a number")
    else:
        number = _as_float(value)
    if math.isnan(number):
        raise DataError(f"{what} is NaN, which stands for a missing number; leave the record out")
    if abs(number) > _LARGEST:
        raise DataError(f"{what} is {shown(value)}, too large; give numbers of a sane size")
    return number


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:  # a signalling NaN of decimal
        return math.nan


def number_in(record: Record, name: str) -> float:
    """The number in a column.

    Raises:
        DataError: there is no such column, or no finite number in it.
    """
    return number_of(value_of(record, name), f"{record.where}: {name}")


def choice_in(record: Record, name: str, count: int, *, may_tie: bool) -> int | None:
    """Which of ``count`` completions a column names; None for a tie of two.

    Raises:
        DataError: none of them.
    """
    value = value_of(record, name)
    what = f"{record.where}: {name}"
    if may_tie and isinstance(value, str) and value.strip().lower() == "tie":
        if count != 2:
            raise DataError(f"{what} is a tie of {count} completions; only one of two can be learned from")
        return None
    try:
        index = number_of(value, what)
    except DataError as error:
        tie = ' (or "tie")' if may_tie and count == 2 else ""
        raise DataError(f"{error}; it is the index of the best completion, 0 to {count - 1}{tie}") from error
    if not index.is_integer() or not 0 <= index < count:
        raise DataError(f"{what} is {index:g}, but there are {count} completions, numbered from 0 to {count - 1}")
    return int(index)


def is_tie(record: Record) -> bool:
    """What the column ``tie`` says, where there is one.

    Raises:
        DataError: neither true nor false.
    """
    if not is_given(record, "tie"):
        return False
    value = record.columns["tie"]
    word = value.strip().lower() if isinstance(value, str) else value
    for answer, meant in (((True, "true", "1"), True), ((False, "false", "0"), False)):
        if isinstance(word, str | bool | int | float) and word in answer:
            return meant
    raise DataError(f"{record.where}: tie is {shown(value)}; write true or false")


def ratings_in(record: Record, count: int) -> tuple[float, ...] | None:
    """How good each of ``count`` completions was found, by the column ``ratings``; None where there is none.

    Raises:
        DataError: not one finite number for each.
    """
    if not is_given(record, "ratings"):
        return None
    value = record.columns["ratings"]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray) or len(value) != count:
        raise DataError(f"{record.where}: ratings is {shown(value)}, not a list of {count} numbers, one per completion")
    return tuple(number_of(rating, f"{record.where}: rating {k}") for k, rating in enumerate(value))


def check_annotator_weights(weights: Mapping[str, float] | None) -> None:
    """Refuse factors of annotators that are no numbers above 0.

    Raises:
        ConfigError: names the annotator.
    """
    for name, factor in (weights or {}).items():
        if isinstance(factor, bool) or not isinstance(factor, numbers.Real) or not 0 < _as_float(factor) <= _LARGEST:
            raise ConfigError(f"annotator_weights: {name!r} has {shown(factor)}; give a finite number above 0")


def weight_in(record: Record, annotator_weights: Mapping[str, float] | None) -> float:
    """How much a judgement counts: its ``weight``, 1 where there is none, times that of its ``annotator``.

    Raises:
        DataError: an annotator who is not among ``annotator_weights``, or a weight that is not above 0.
    """
    weight = number_in(record, "weight") if is_given(record, "weight") else 1.0
    if not weight >= _SMALLEST:
        raise DataError(f"{record.where}: weight is {weight:g}; it must be above 0: leave out what is not to count")
    if annotator_weights is not None:
        weight *= float(annotator_weights[_annotator(record, annotator_weights)])
    if not _SMALLEST <= weight <= _LARGEST:
        raise DataError(f"{record.where}: its weight times that of its annotator is {weight:g}; give sane numbers")
    return weight


def _annotator(record: Record, known: Mapping[str, float]) -> str:
    value = record.columns.get("annotator")
    if isinstance(value, int) and not isinstance(value, bool):
        value = shown(value)
    if not isinstance(value, str) or value not in known:
        unknown = "there is no annotator" if value is None else f"the annotator {shown(value)} is not known"
        raise DataError(f"{record.where}: {unknown}; annotator_weights has: {listed(sorted(known)) or 'none'}")
    return value


def refuse_wrong(wrong: Sequence[str], total: int) -> None:
    """Raise one error for all records that cannot be used, with the place and reason of each.

    Raises:
        DataError: there are any.
    """
    if len(wrong) == 1:
        raise DataError(wrong[0])
    if wrong:
        _raise_listed(wrong, total)


def _raise_listed(wrong: Sequence[str], total: int) -> NoReturn:
    lines = [f"{len(wrong)} of {total} records cannot be used:", *wrong[:MOST_LISTED]]
    if len(wrong) > MOST_LISTED:
        lines.append(f"and {len(wrong) - MOST_LISTED} more")
    raise DataError("\n  ".join(lines))
