"""What the processes of a run tell each other beside their collectives: a signal, an error, an end."""

from __future__ import annotations

import builtins
import itertools
import json
import os
import select
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tropism.errors as errors
from tropism.training.interrupt import DIED, ProcessLostError

_STORES: Any = dist
"""Has classes of stores that its types do not name."""
_RUNS = itertools.count()
"""Runs of this process so far: those of a group of processes use one store, each under names of its own."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error as it is told to other processes."""

    rank: int
    kind: str
    """Name of its class."""
    text: str

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        return cls(rank=rank, kind=type(error).__name__, text=str(error))

    def as_error(self) -> Exception:
        """The error again, of the same class where that is one of the library, of Python or of torch."""
        known: dict[str, Any] = {**vars(builtins), "OutOfMemoryError": torch.OutOfMemoryError, **vars(errors)}
        known["ProcessLostError"] = ProcessLostError
        kind = known.get(self.kind)
        error: Any = RuntimeError(f"process {self.rank}: {self.kind}: {self.text}")
        if isinstance(kind, type) and issubclass(kind, Exception):
            with suppress(TypeError):  # a class that wants more than a text
                error = kind(f"process {self.rank}: {self.text}")
        error.failure = self
        return error  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class News:
    """What has been told so far."""

    stop: int | None = None
    """The signal that a process received, for which all abandon what they do and meet."""
    called_off: bool = False
    """A process failed, and asks all to abandon what they do and to meet."""
    signal: int | None = None
    """A process has left because of this signal, without meeting the others."""
    failure: Failure | None = None
    """A process has left because of an error, without meeting the others."""
    ended: frozenset[int] = frozenset()
    """Processes that have left, however it was."""


class Bulletin:
    """The store of the process group as a board that every process may read and write at any time, from any thread."""

    def __init__(self, store: Any, *, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self._store = _STORES.PrefixStore(f"tropism-run-{next(_RUNS)}", store)
        self._news, self._seen = News(), 0
        self._watched: dict[int, int | None] = {}
        self._store.set(f"where/{rank}", json.dumps([_machine(), os.getpid()]))

    @classmethod
    def of_group(cls, *, rank: int, count: int) -> Bulletin | None:
        """The board of the default process group, over a connection of its own; None where there is no group."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        store: Any = dist.distributed_c10d._get_default_store()
        while isinstance(store, _STORES.PrefixStore):
            store = store.underlying_store
        if isinstance(store, _STORES.TCPStore):
            # Its own connection: the group's may be busy with a long wait.
            patience = timedelta(seconds=10)
            store = _STORES.TCPStore(store.host, store.port, is_master=False, timeout=patience, wait_for_workers=False)
        return cls(store, rank=rank, count=count)

    def ask_to_stop(self, signal_number: int) -> None:
        """Ask the others to abandon what they do and to meet this process, which received a signal."""
        self._tell("stop", str(signal_number))

    def call_off(self) -> None:
        """Ask the others to abandon what they do and to meet this process, which failed."""
        self._tell("called off", "")

    def leave(self, error: BaseException | None, *, signal_number: int | None = None) -> None:
        """Say that this process ends, and why; the others may not be able to wait for it any more."""
        facts: dict[str, Any] = {"signal": signal_number}
        if error is not None and signal_number is None:
            failure = getattr(error, "failure", None) or Failure.of(self.rank, error)
            facts["failure"] = vars(failure)
        self._tell(f"left/{self.rank}", json.dumps(facts))

    def _tell(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
            self._store.add("news", 1)
        except RuntimeError:  # whoever holds the store has gone, which the others see by themselves
            return

    def read(self) -> News:
        """Everything told so far.

        Raises:
            ProcessLostError: the store cannot be reached: whoever holds it has gone.
        """
        try:
            count = self._store.add("news", 0)
            if count != self._seen:
                self._news, self._seen = self._read(), count
                self._store.set(f"seen/{self.rank}", str(count))
        except RuntimeError as error:
            raise ProcessLostError(self._without_store()) from error
        return self._news

    def _without_store(self) -> str:
        """What to say once the store cannot be reached: the first process holds it, or what started all of them."""
        until = time.monotonic() + 0.5  # connections break a moment before a process is seen to have ended
        while time.monotonic() < until:
            gone = [rank for rank, pid in self._watched.items() if pid is not None and _has_ended(pid)]
            if gone:
                return f"process {gone[0]} {DIED}"
            time.sleep(0.02)
        return f"the first process, or what started all of them, {DIED}"

    def is_known(self) -> bool:
        """Whether every other process has read all that was told so far, or has ended."""
        try:
            count = self._store.add("news", 0)
            return all(
                self.is_gone(rank) or rank in self.read().ended or self._seen_by(rank) >= count
                for rank in range(self.count)
                if rank != self.rank
            )
        except (RuntimeError, ProcessLostError):
            return True

    def _seen_by(self, rank: int) -> int:
        key = f"seen/{rank}"
        return int(self._store.get(key)) if self._store.check([key]) else 0

    def _read(self) -> News:
        stop = int(self._store.get("stop")) if self._store.check(["stop"]) else None
        left = {r: json.loads(self._store.get(f"left/{r}")) for r in range(self.count) if self._has_left(r)}
        others = [facts for rank, facts in left.items() if rank != self.rank]
        signals = [facts["signal"] for facts in others if facts["signal"] is not None]
        failures = [Failure(**facts["failure"]) for facts in others if facts.get("failure")]
        return News(
            stop=stop,
            called_off=bool(self._store.check(["called off"])),
            signal=signals[0] if signals else None,
            failure=failures[0] if failures else None,
            ended=frozenset(left),
        )

    def _has_left(self, rank: int) -> bool:
        return bool(self._store.check([f"left/{rank}"]))

    def died(self) -> int | None:
        """The first process of this machine that has ended without a word; None where there is none.

        Raises:
            ProcessLostError: as ``read`` does.
        """
        for rank in range(self.count):
            gone = rank != self.rank and rank not in self._news.ended and self.is_gone(rank)
            if gone and rank not in self.read().ended:  # its last word may have come in between
                return rank
        return None

    def is_gone(self, rank: int) -> bool:
        """Whether a process of this machine has ended; false for those of other machines, which cannot be seen."""
        if rank not in self._watched:
            key = f"where/{rank}"
            try:
                if not self._store.check([key]):
                    return False
                machine, pid = json.loads(self._store.get(key))
            except RuntimeError:  # the store has gone, which ``read`` reports
                return False
            self._watched[rank] = pid if machine == _machine() else None
        pid = self._watched[rank]
        return pid is not None and _has_ended(pid)


def _has_ended(pid: int) -> bool:
    """Whether a process has ended, also one that its parent has not yet asked about."""
    try:
        if not hasattr(os, "pidfd_open"):
            os.kill(pid, 0)
            return False
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:  # not allowed to look
        return False
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(descriptor)


def _machine() -> str:
    """What tells one space of process ids from another: host, boot and, on Linux, the container."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    except OSError:  # not Linux
        pass
    return "/".join(parts)
