"""Seconds of a step and of its stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from tropism.training.profiling import stage
from tropism.types import Metrics


class Stopwatch:
    """Adds up seconds by stage. A stage inside another one interrupts its count, so that all of them add up.

    On a GPU a stage ends when its last result is on the CPU; kernels that nobody waits for count for the next stage.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """A block of stage ``name``; a profile shows it under that name."""
        with stage(name):
            self._change()
            self._open.append(name)
            try:
                yield
            finally:
                self._change()
                self._open.pop()

    def take(self, name: str) -> float:
        """Seconds of a stage since it was last taken, or since the beginning; 0 if it was never entered."""
        return self._seconds.pop(name, 0.0)

    def _change(self) -> None:
        """Give the seconds since the last change to the innermost open stage."""
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


class StepClock:
    """Times one step after the other, and what lies between them."""

    def __init__(self) -> None:
        self.whole = True
        """False for a step of which another process did a part, so that nobody knows its seconds."""
        self._watch = Stopwatch()
        self._edge = time.perf_counter()
        self._between = self._updates = 0.0
        self._samples = self._tokens = 0

    def begin(self, *, samples: int, tokens: int, whole: bool = True) -> None:
        """A step begins; ``samples`` and ``tokens`` are the run's counts so far."""
        now = time.perf_counter()
        self._between, self._edge = now - self._edge, now
        self._samples, self._tokens, self.whole = samples, tokens, whole
        self._watch, self._updates = Stopwatch(), 0.0

    def add_update(self, seconds: float) -> None:
        """An update of this step took so long."""
        self._updates += seconds

    def logging(self) -> AbstractContextManager[None]:
        """A block that writes logs."""
        return self._watch.measure("log")

    def end(self, *, samples: int, tokens: int) -> Metrics:
        """The step ends; its seconds and rates."""
        now = time.perf_counter()
        seconds, self._edge = now - self._edge, now
        timings = {"time/updates": self._updates, "time/log": self._watch.take("log"), "time/between": self._between}
        if not self.whole:
            return timings
        return timings | {
            "time/step": seconds,
            "throughput/tokens_per_second": (tokens - self._tokens) / seconds,
            "throughput/samples_per_second": (samples - self._samples) / seconds,
        }
