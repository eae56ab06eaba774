"""Numeric answers, read by a parser of bounded work; nothing that a model wrote is ever evaluated."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from tropism.errors import ConfigError, RewardError
from tropism.rewards.raw import RowError
from tropism.texts import plain_text

MAX_DIGITS = 50
"""More digits than this in a row are not taken for an answer."""
MAX_EXPONENT = 50
"""1e50 is the largest power of ten that is read."""
TAIL = 2_000
"""Only so many last characters of a completion (or first ones after the marker) are searched."""

_NUMBER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z)])[-+\u2212])?"  # a sign, not the minus of 10-3
    r"[$\u20ac\u00a3]?(?P<inner>(?<=[$\u20ac\u00a3])[-\u2212])?"  # $5, -$5, $-5
    r"(?=\.?[0-9])"
    r"(?P<chained>(?<=[0-9]/))?"  # 1/2/2024 is a date: no fraction begins right after a slash
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3}){1,20}(?![0-9]|,[0-9])|[0-9]+)?"  # 1,234,567 or 1234567; the list 1,2 is 1 and 2
    r"(?P<decimals>\.[0-9]+)?"
    r"(?P<exponent>[eE][-+]?[0-9]+(?![0-9A-Za-z]))?"
    r"(?(chained)|(?:/(?P<divisor>[0-9]+)(?![0-9/]|\.[0-9]))?)"
)


def parse_number(text: str, *, last: bool = True) -> Fraction | None:
    """The last (or first) number of a text, exactly; None where there is none, or it is too long to be an answer.

    Reads ``-1,234.50``, ``$3``, ``-$3``, ``.5``, ``3/4``, ``1e3``. A percent sign is left out of account: ``50%`` is
    50. ``5.`` at the end of a sentence is 5, ``10-3`` holds 10 and 3, ``1/0`` is no number. Reads at most ``TAIL``
    characters, in linear time.
    """
    text = text[-TAIL:] if last else text[:TAIL]
    found = list(_NUMBER.finditer(text))
    return _value(found[-1 if last else 0]) if found else None


def _value(match: re.Match[str]) -> Fraction | None:
    digits = (match["whole"] or "0").replace(",", "") + (match["decimals"] or "")
    exponent = int(match["exponent"][1:7]) if match["exponent"] else 0
    if max(len(digits), len(match["divisor"] or "")) > MAX_DIGITS or abs(exponent) > MAX_EXPONENT:
        return None
    divisor = int(match["divisor"] or 1)
    if divisor == 0:
        return None
    negative = (match["sign"] or match["inner"] or "+") != "+"
    return (-1 if negative else 1) * Fraction(digits) * Fraction(10) ** exponent / divisor


def answer_of(text: str, marker: str | None = "####") -> Fraction | None:
    """The first number after the last marker, or the last number of a text without the marker."""
    if marker and marker in text:
        return parse_number(text.rpartition(marker)[2], last=False)
    return parse_number(text)


def number_answer(
    column: str = "answer",
    correct: float = 1.0,
    wrong: float = 0.0,
    tolerance: float = 0.0,
    marker: str | None = "####",
) -> Callable[..., list[float | None]]:
    """Whether a completion's answer is the number of a reference column, as in GSM8K.

    The answer is the first number after the last ``####``, or else the last number of the completion. Numbers are
    compared as exact fractions: 2.50 equals 2.5, 1/4 equals 0.25.

    Args:
        column: the data column with references: numbers, or texts that hold them in the same way. Null leaves the
            completion unscored.
        correct: reward of the right number.
        wrong: reward of another number, or of none.
        tolerance: largest difference that still counts as equal.
        marker: text before the answer; null to always take the last number.
    """
    if not isinstance(column, str) or not column:
        raise ConfigError(f"column: expected the name of a data column, not {column!r}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance: expected a number of at least 0, not {tolerance!r}")

    def reward_number_answer(completions: list[Any], **columns: Any) -> list[float | None]:
        if column not in columns:
            raise RewardError(
                f"number_answer compares with the data column {column!r}; available: {', '.join(columns)}"
            )
        rewards: list[float | None] = []
        for row, (completion, reference) in enumerate(zip(completions, columns[column], strict=True)):
            if reference is None:
                rewards.append(None)
                continue
            wanted = _reference(reference, marker)
            if wanted is None:
                raise RowError(f"the column {column!r} holds no number: {_head(reference)}", row)
            answer = answer_of(plain_text(completion), marker)
            rewards.append(correct if answer is not None and abs(answer - wanted) <= Fraction(tolerance) else wrong)
        return rewards

    return reward_number_answer


def _reference(value: Any, marker: str | None) -> Fraction | None:
    """A reference in the data: a number, or a text that is read as a completion is."""
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:  # Python refuses to write out very long ones
        return None
    return answer_of(value if isinstance(value, str) else str(value), marker)


def _head(value: Any) -> str:
    """The beginning of a reference, for messages."""
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        return f"a whole number of more than {MAX_DIGITS} digits"
    return repr(str(value)[:60])
