"""Ctrl-C and SIGTERM: the first asks a run to stop at an update boundary, the second leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Raised inside a rollout, which can be abandoned; ``signal_number`` says why."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class Interrupts:
    """Listens to SIGINT and SIGTERM inside ``listening``.

    Outside ``abandonable`` the first signal is only noted; inside, it raises ``Interrupted``, because keyed randomness
    reproduces what is thrown away. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._abandonable = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread alone
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """A block whose work may be thrown away."""
        self._abandonable = True
        try:
            if self.received is not None:
                raise Interrupted(self.received)
            yield
        finally:
            self._abandonable = False

    def _on_signal(self, number: int, frame: FrameType | None) -> Any:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        if self._abandonable:
            raise Interrupted(number)
