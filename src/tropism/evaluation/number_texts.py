"""Numbers and intervals as text, for tables."""

from __future__ import annotations

import math

from tropism.evaluation.statistics import Interval


def interval_text(interval: Interval | None) -> str:
    """``0.67 [0.61, 0.72]``; the mean alone where the interval is unknown or a point, empty for None."""
    if interval is None:
        return ""
    form = f"z.{_decimals(interval)}f"  # z: no minus before zero
    if not interval.known or interval.low == interval.high:
        return f"{interval.mean:{form}}"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def change_text(interval: Interval | None) -> str:
    """``+0.56 [+0.48, +0.63]``; the mean alone where the interval is unknown, empty for None."""
    if interval is None:
        return ""
    form = f"+z.{_decimals(interval)}f"
    if not interval.known:
        return f"{interval.mean:{form}}"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _decimals(interval: Interval) -> int:
    """Decimals that show about three figures of the largest number."""
    sizes = [abs(value) for value in (interval.mean, interval.low, interval.high) if math.isfinite(value)]
    size = max(sizes, default=0.0)
    return 3 if size < 1 else 2 if size < 10 else 1


def number_text(value: float, form: str) -> str:
    """The number in a format without sign, such as ``.1f``, no minus before zero; empty where it is not finite."""
    return f"{value:z{form}}" if math.isfinite(value) else ""
