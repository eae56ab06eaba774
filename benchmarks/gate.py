"""The worker's end of the pipe: it works only between "go" and its report, so that no two systems compute at once."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


class StoppedError(Exception):
    """The parent wants no more steps."""


class UnavailableError(Exception):
    """This system cannot run here; the message says what is missing."""


class Gate:
    """One JSON object per line goes out; one word per line comes in.

    Args:
        device: cpu or cuda; work on a GPU is waited for before the clock is read.
    """

    def __init__(self, device: str, incoming: TextIO, outgoing: TextIO) -> None:
        self.device, self.incoming, self.outgoing = device, incoming, outgoing
        self.began = time.perf_counter()
        self.started = self.began

    def send(self, event: str, **values: Any) -> None:
        self.outgoing.write(json.dumps({"event": event, **values}) + "\n")
        self.outgoing.flush()

    def ready(self, **facts: Any) -> None:
        """Everything is loaded."""
        self.send("ready", load_seconds=time.perf_counter() - self.began, **facts)

    def wait(self) -> None:
        """Block until the next step may begin.

        Raises:
            StoppedError: there is none.
        """
        if self.incoming.readline().strip() != "go":
            raise StoppedError
        self.started = time.perf_counter()

    def done(self, *, stages: dict[str, float], tokens: int) -> None:
        """Report the step that ``wait`` began.

        Args:
            stages: seconds by stage (rollout, reward, logprobs, update, ...).
            tokens: new tokens that the step made, or tokens that it learned from.
        """
        self.settle()
        seconds = time.perf_counter() - self.started
        self.send("step", seconds=seconds, stages=stages, tokens=tokens, peak_memory_gb=peak_memory_gb(self.device))

    def settle(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()


class Stopwatch:
    """Seconds per stage of a step, of functions whose calls are timed."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.seconds: dict[str, float] = {}

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, with the time of its calls added to ``stage``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.gate.settle()
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.gate.settle()
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

        return call

    def take(self) -> dict[str, float]:
        """The seconds so far; the next step starts from zero."""
        taken, self.seconds = self.seconds, {}
        return taken


def peak_memory_gb(device: str) -> float:
    """Most memory this process has held so far, in 10^9 bytes: on a GPU what torch allocated, else resident memory."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    # On Linux ru_maxrss survives exec, so a child would begin with its parent's peak; VmHWM is the process's own.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if found is not None:
        return int(found[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
