"""A worker process: calls one reward function for a run that may kill it at any moment.

Started as ``python -m tropism.rewards.worker DESCRIPTOR``. Requests come on standard input, replies go to that
descriptor; what the function prints goes to standard error, and reading standard input gives it nothing.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import queue
import signal
import sys
import threading
from typing import Any

from tropism.errors import ConfigError
from tropism.rewards.attempts import CallError, Said, attempt, begin, failure_of, finish
from tropism.rewards.calling import TermLog, asked_by, is_async, without_gradients
from tropism.rewards.config import RewardTerm
from tropism.rewards.frames import packed, read_frame, unpacked, write_frame
from tropism.rewards.registry import RewardFn
from tropism.rewards.resolve import resolve_reward

BACKSTOP = 5.0
"""Seconds beyond a call's timeout after which the system ends this process, should nobody else do it."""


def main() -> None:
    """Serve until the run closes the pipe, ends, or kills this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run to decide about
    faulthandler.enable()
    replies = int(sys.argv[1])
    os.set_inheritable(replies, False)
    requests = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    setup = read_frame(requests)
    if setup is None:
        return
    arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, arrived), daemon=True).start()
    server = Server(replies)
    function = server.prepare(setup)
    if function is None:
        return
    if is_async(function):
        asyncio.run(server.serve_concurrently(function, arrived))
    else:
        server.serve(function, arrived)


def _receive(requests: int, arrived: queue.SimpleQueue[bytes]) -> None:
    """Hand requests on; when the run has gone, however it went, end this process and whatever it started."""
    while (payload := read_frame(requests)) is not None:
        arrived.put(payload)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


class Server:
    """What a worker does with its requests; replies go to a pipe."""

    def __init__(self, replies: int) -> None:
        self._replies = replies
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._under_way = 0

    def prepare(self, setup: bytes) -> RewardFn | None:
        """Find the function and tell the run what it asks for; None where it cannot be found, which is told too."""
        try:
            function = _function_of(setup)
        except ConfigError as error:
            self._tell({"refused": str(error)})
        except BaseException as error:
            self._tell({"refused": f"{type(error).__name__}: {error}"})
        else:
            self._tell({"asks": asked_by(function), "async": is_async(function)})
            return function
        return None

    def serve(self, function: RewardFn, arrived: queue.SimpleQueue[bytes]) -> None:
        """One call after the other, in the main thread, where functions may use signals."""
        while True:
            request = unpacked(arrived.get())
            self._guard(request["timeout"])
            try:
                self._tell({"id": request["id"], "said": attempt(function, request["call"], self._wait)})
            except CallError as failure:
                self._tell({"id": request["id"], "failed": failure.fields()})
            self._unguard()

    async def serve_concurrently(self, function: RewardFn, arrived: queue.SimpleQueue[bytes]) -> None:
        """Calls of an async function side by side in one event loop, each cancelled when its time is over."""
        tasks: set[asyncio.Task[None]] = set()
        while True:
            payload = await asyncio.to_thread(arrived.get)
            task = asyncio.create_task(self._call(function, unpacked(payload)))
            tasks.add(task)  # the loop itself does not keep it
            task.add_done_callback(tasks.discard)

    async def _call(self, function: RewardFn, request: dict[str, Any]) -> None:
        self._guard(request["timeout"])
        log, limit = TermLog(), asyncio.timeout(request["timeout"])
        try:
            with without_gradients():
                awaitable = begin(function, request["call"], log)
            async with limit:
                returned = await awaitable
            said = finish(returned, request["call"], log)
        except BaseException as error:
            late = isinstance(error, TimeoutError) and limit.expired()
            failure = CallError("", again=True, timed_out=True) if late else failure_of(error)
            self._tell({"id": request["id"], "failed": failure.fields()})
        else:
            self._tell({"id": request["id"], "said": said})
        self._unguard()

    def _wait(self, awaitable: Any) -> Any:
        """What an awaitable gives that a function returned which is not async itself."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(_awaited(awaitable))

    def _guard(self, timeout: float) -> None:
        """Let the system end this process if it is stuck where no other thread of it runs, and the run is gone."""
        self._under_way += 1
        signal.setitimer(signal.ITIMER_REAL, timeout + BACKSTOP)

    def _unguard(self) -> None:
        self._under_way -= 1
        if self._under_way == 0:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _tell(self, reply: dict[str, Any]) -> None:
        try:
            frame = packed(reply)
        except Exception as error:
            said: Said = reply["said"]
            what = f" logged something that cannot leave its process ({error}) as one of {', '.join(said.extras)}"
            frame = packed({"id": reply["id"], "failed": CallError(what).fields()})
        with self._lock:
            write_frame(self._replies, frame)


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _function_of(payload: bytes) -> RewardFn:
    """The function that a setup describes: one that travelled, or a term of a recipe that is resolved here."""
    setup = unpacked(payload)
    sys.path[:] = setup["path"]
    if setup["function"] is not None:
        function: RewardFn = unpacked(setup["function"])
        return function
    term: RewardTerm = setup["term"]
    return resolve_reward(term, allow_code=True, expected_digest=setup["digest"])


if __name__ == "__main__":
    main()
