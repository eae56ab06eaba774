"""How long the tests of tests/fuzz look: a fixed, modest number of examples, or TROPISM_FUZZ_EXAMPLES new ones each."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("TROPISM_FUZZ_EXAMPLES", "0"))
"""Examples per test in a long run, drawn anew every time; 0: the fixed ones of the ordinary suite."""


def examples(count: int) -> settings:
    """Settings of a fuzz test that looks at ``count`` examples in the ordinary suite."""
    return settings(
        max_examples=EXAMPLES or count,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


HUGE = "<a whole number of 5,001 digits>"
"""Stands for it in what hypothesis draws and shows: Python refuses to print the number itself."""


def enlarged(value: Any) -> Any:
    """Drawn data with the number in place of ``HUGE``."""
    if isinstance(value, str) and value == HUGE:
        return 10**5000
    if isinstance(value, list):
        return [enlarged(item) for item in value]
    if isinstance(value, dict):
        return {enlarged(key): enlarged(item) for key, item in value.items()}
    return value


class HangError(BaseException):
    """One example took longer than it may; no library's ``except Exception`` may hide that."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Refuse to wait longer than so many seconds for one example."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
