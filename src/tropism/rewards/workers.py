"""The worker processes of a reward with a timeout, as the run sees them: started, asked, killed, started again."""

from __future__ import annotations

import contextlib
import importlib.machinery
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import cloudpickle

from tropism.errors import ConfigError
from tropism.rewards.attempts import Call, CallError, Said
from tropism.rewards.calling import Asks, unwrapped
from tropism.rewards.config import RewardTerm
from tropism.rewards.frames import packed, read_frame, unpacked, write_frame
from tropism.rewards.registry import RewardFn
from tropism.rewards.resolve import code_digest

START_SECONDS = 600.0
"""How long a worker may take to load its function (a classifier may be downloaded there)."""

GRACE = 1.0
"""How much longer than its timeout a call of an async function may take to be cancelled before it is killed."""


class _KilledError(Exception):
    """The worker was killed because of another call."""


class Workers:
    """Worker processes that all call one function.

    Plain functions get as many workers as calls may run at a time, each with one call; an async function gets one
    worker, in which calls run side by side.

    Raises:
        ConfigError: the function cannot travel to another process, cannot be found there or cannot be called.
    """

    def __init__(self, term: RewardTerm, function: RewardFn | None, timeout: float, *, name: str) -> None:
        self.timeout, self.name = timeout, name
        self._setup = _setup(term, function, name)
        self._locks = [threading.Lock() for _ in range(term.concurrency)]
        self._workers: list[Worker | None] = [None] * term.concurrency
        self._finalizer = weakref.finalize(self, _end_all, self._workers, os.getpid())
        try:
            ready = self._worker(0).ready()
        except BaseException:  # an interrupt, say
            self.kill()
            raise
        self.asks: Asks = ready["asks"]
        self.is_async: bool = ready["async"]

    def call(self, call: Call, slot: int, stopped: threading.Event) -> Said:
        """Score some rows.

        Args:
            slot: which of the calls that run side by side this is.
            stopped: set when nobody wants the result any more.

        Raises:
            CallError: it raised, returned something unusable, took too long, or its process died.
        """
        index = 0 if self.is_async else slot
        while not stopped.is_set():
            try:
                worker = self._worker(index)
                if stopped.is_set():  # ``kill`` may have come before this one was started
                    worker.kill()
                worker.ready()
                return worker.call(call, self.timeout, grace=GRACE if self.is_async else 0.0)
            except _KilledError:
                continue
            except ConfigError as error:
                raise CallError(f": {error}") from error
        raise CallError(" was abandoned")

    def kill(self) -> None:
        """End all workers, whatever they are doing; the next call starts one again."""
        _end_all(self._workers, os.getpid())

    def _worker(self, index: int) -> Worker:
        with self._locks[index]:
            worker = self._workers[index]
            if worker is None or worker.ended:
                worker = self._workers[index] = Worker(self._setup, self.name)
            return worker


def _end_all(workers: Sequence[Worker | None], owner: int) -> None:
    if os.getpid() != owner:  # a copy of the run made by fork must not end the workers of the original
        return
    for worker in workers:
        if worker is not None:
            worker.kill()


def _setup(term: RewardTerm, function: RewardFn | None, name: str) -> bytes:
    """The first message to a worker: what it calls. Named code is found again there, other functions travel."""
    setup: dict[str, Any] = {"path": [entry or os.getcwd() for entry in sys.path], "function": None, "term": None}
    if function is None:
        digest = code_digest(str(term.use)) if ":" in str(term.use) else None
        return packed(setup | {"term": term, "digest": digest})
    try:
        with _by_value(function):
            return packed(setup | {"function": packed(function)[8:]})
    except Exception as error:
        raise ConfigError(
            f"reward {name!r}: a timeout needs a function that can go to another process, and this one cannot: "
            f"{type(error).__name__}: {error}. Open what it holds (clients, locks, files) inside of the function, name "
            "it as file.py:function, or leave out the timeout."
        ) from error


@contextlib.contextmanager
def _by_value(function: RewardFn) -> Iterator[None]:
    """Let the code of a function travel whose module no other process could import."""
    owner = getattr(unwrapped(function), "__module__", None) or type(function).__module__
    module, top = sys.modules.get(owner), owner.partition(".")[0]
    found = top in sys.builtin_module_names or importlib.machinery.PathFinder.find_spec(top) is not None
    if module is None or found or owner == "__main__":
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


class Worker:
    """One worker process."""

    def __init__(self, setup: bytes, name: str) -> None:
        self.name = name
        self.ended = False
        self._numbers = itertools.count()
        self._waiting: dict[int, queue.SimpleQueue[dict[str, Any] | None]] = {}
        self._greeting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._ready: dict[str, Any] | None = None
        self._starting, self._state, self._sending = threading.Lock(), threading.Lock(), threading.Lock()
        self._killed = False
        own, given = os.pipe()
        command = [sys.executable, "-u", "-P", "-m", "tropism.rewards.worker", str(given)]
        try:
            # Its prints go where warnings go. A session of its own keeps a Ctrl-C of the terminal away from it, and
            # makes one group of it and whatever the function starts.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=2, pass_fds=(given,), start_new_session=True, bufsize=0
            )
        finally:
            os.close(given)
        assert self.process.stdin is not None
        self._requests = self.process.stdin.fileno()
        os.set_blocking(self._requests, False)
        threading.Thread(target=self._receive, args=(own,), name=f"tropism-worker-{name}", daemon=True).start()
        self._send(setup, time.monotonic() + START_SECONDS)

    def ready(self) -> dict[str, Any]:
        """What the function asks for and whether it is async, once the worker has loaded it.

        Raises:
            ConfigError: it could not, or took ``START_SECONDS``.
        """
        with self._starting:
            if self._ready is None:
                try:
                    reply = self._greeting.get(timeout=START_SECONDS)
                except queue.Empty:
                    self.kill()
                    message = (
                        f"reward {self.name!r} could not be loaded within {START_SECONDS:.0f} s in its worker process"
                    )
                    raise ConfigError(message) from None
                if reply is None and self._killed:
                    raise _KilledError
                if reply is None:
                    raise ConfigError(f"reward {self.name!r}{self._end()} while it was loaded there")
                if "refused" in reply:
                    self.kill()
                    raise ConfigError(f"reward {self.name!r}, in its worker process: {reply['refused']}")
                self._ready = reply
            return self._ready

    def call(self, call: Call, timeout: float, *, grace: float) -> Said:
        """Score some rows.

        Raises:
            CallError: for whatever reason there is no result.
            _KilledError: because of another call.
        """
        number, box = next(self._numbers), queue.SimpleQueue[dict[str, Any] | None]()
        until = time.monotonic() + timeout
        try:
            frame = packed({"id": number, "call": call, "timeout": timeout})
        except Exception as error:
            what = f": its data cannot go to its worker process: {type(error).__name__}: {error}"
            raise CallError(what) from error
        with self._state:
            if self.ended:
                raise _KilledError
            self._waiting[number] = box
        try:
            reply = None
            if self._send(frame, until):
                reply = box.get(timeout=max(until - time.monotonic(), 0.0) + grace)
            elif not self.ended:
                raise queue.Empty
        except queue.Empty:
            self.kill()
            raise _late(timeout) from None
        finally:
            with self._state:
                self._waiting.pop(number, None)
        if reply is None:
            if self._killed:
                raise _KilledError
            raise CallError(self._end(), again=True)
        if "failed" in reply:
            raise _late(timeout) if reply["failed"]["timed_out"] else CallError(**reply["failed"])
        said: Said = reply["said"]
        return said

    def kill(self) -> None:
        """End the process and all that it started."""
        with self._state:
            if self.ended:
                return
            self._killed = True
        self._finish()

    def _finish(self) -> None:
        """End the group, however much of it is left, then the waiting for it."""
        with self._state:
            if not self.ended:
                self.ended = True
                # Before it is waited for: until then its number cannot belong to another process.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            boxes = list(self._waiting.values())
        for box in (*boxes, self._greeting):
            box.put(None)
        with self._sending:
            assert self.process.stdin is not None
            self.process.stdin.close()

    def _send(self, frame: bytes, until: float) -> bool:
        """Whether the worker took a message in time."""
        with self._sending:
            if self.ended:
                return False
            try:
                return write_frame(self._requests, frame, until=until)
            except BrokenPipeError:
                return True  # it died: the end of its replies says so

    def _receive(self, replies: int) -> None:
        """Hand replies to those who wait for them, until there are no more."""
        try:
            while (payload := read_frame(replies)) is not None:
                reply = unpacked(payload)
                with self._state:
                    box = self._waiting.get(reply["id"]) if "id" in reply else self._greeting
                if box is not None:
                    box.put(reply)
        finally:
            os.close(replies)
            self._finish()

    def _end(self) -> str:
        """How the process ended, for messages."""
        with self._state:
            code = self.process.returncode
        if code >= 0:
            return f" ended its worker process with exit status {code}"
        name = signal.Signals(-code).name
        hint = " (by the system, perhaps for lack of memory)" if name == "SIGKILL" else ""
        return f" ended its worker process by {name}{hint}"


def _late(timeout: float) -> CallError:
    return CallError(f" took longer than its timeout of {timeout:g} s and was stopped", again=True, timed_out=True)
