"""Messages between a run and its worker processes: a length of eight bytes, then that many bytes, over a pipe.

The bytes are pickled. They go between processes of one run, over pipes that nothing else holds, and never to a file.
"""

from __future__ import annotations

import os
import select
import time
from typing import Any

import cloudpickle

_HEAD = 8


def packed(message: Any) -> bytes:
    """A message as bytes.

    Raises:
        Exception: something in it cannot be pickled.
    """
    payload: bytes = cloudpickle.dumps(message)
    return len(payload).to_bytes(_HEAD, "big") + payload


def unpacked(payload: bytes) -> Any:
    """The message that ``packed`` packed, without its head."""
    return cloudpickle.loads(payload)


def read_frame(descriptor: int) -> bytes | None:
    """The next payload; None where the other side has closed the pipe (or died in the middle of a message)."""
    head = _read(descriptor, _HEAD)
    return None if head is None else _read(descriptor, int.from_bytes(head, "big"))


def write_frame(descriptor: int, frame: bytes, *, until: float | None = None) -> bool:
    """Write all of a frame to a pipe; false where the other side does not take it by then (``time.monotonic``).

    Raises:
        BrokenPipeError: the other side has closed the pipe.
    """
    rest = memoryview(frame)
    if until is None:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    while rest:
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return False
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            continue
    return True


def _read(descriptor: int, count: int) -> bytes | None:
    parts = []
    while count:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
