"""Batches that do not fit into memory: telling that from other errors, and going on with half of them.

Every batch that is split here is computed row by row as far as results go, so a smaller one gives the same.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from tropism.errors import NoRoomError, TropismError

logger = logging.getLogger("tropism")

Item = TypeVar("Item")
Result = TypeVar("Result")

MESSAGES = (
    "out of memory",  # CUDA, ROCm, XPU and MPS, whether the driver says it or torch
    "out_of_memory",  # RMM
    "status_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER and cuSPARSE
    "can't allocate memory",  # torch on a CPU
    "defaultcpuallocator: not enough memory",  # the same on Windows
    "bad_alloc",  # C++ libraries
    "cannot allocate memory",
    "unable to allocate",  # numpy
    "resource_exhausted",  # XLA
)
"""What allocators say in lower case, beside what accelerate knows."""
NO_MEMORY = "CUDNN_STATUS_NOT_SUPPORTED"
"""What accelerate counts as memory and is none: a smaller batch asks cuDNN for what it lacks again."""
LONGEST_REASON = 120
"""Characters of an allocator's message that a warning repeats."""

_listeners: list[Callable[[str], None]] = []


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device and in whatever library; errors of this library never count."""
    if isinstance(error, TropismError) or not isinstance(error, Exception):
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if NO_MEMORY in text:
        return False
    return should_reduce_batch_size(RuntimeError(text)) or any(words in text.lower() for words in MESSAGES)


def free_memory() -> None:
    """Give back what nothing uses any more: unreachable objects, and blocks that a device's allocator keeps."""
    clear_device_cache(garbage_collection=True)


def reason_of(error: BaseException) -> str:
    """The sentence of an allocator's message, which may be a page long, that says so."""
    sentences = [line.rstrip(".") for line in str(error).replace("\n", ". ").split(". ") if line.strip()]
    telling = [line for line in sentences if any(words in line.lower() for words in MESSAGES)]
    first = (telling or sentences or [type(error).__name__])[0]
    return first if len(first) <= LONGEST_REASON else f"{first[:LONGEST_REASON]}..."


@contextmanager
def warnings_to(tell: Callable[[str], None]) -> Iterator[None]:
    """A block in which warnings of halved batches go to ``tell`` instead of the log."""
    _listeners.append(tell)
    try:
        yield
    finally:
        _listeners.remove(tell)


class BatchSize:
    """How much is computed at once, halved for good whenever memory does not suffice.

    Args:
        what: what is counted, in the plural, such as "completions decoded at once".
        setting: the setting that a user lowers to avoid it.
        advice: what else helps where a single one does not fit.
        times: how many of what is counted the setting stands for.
    """

    def __init__(self, what: str, *, setting: str, advice: str, times: int = 1) -> None:
        self.what, self.setting, self.advice, self.times = what, setting, advice, times
        self.limit: int | None = None
        """None as long as everything has fit."""

    def at_most(self, size: int) -> int:
        """``size``, or what has been found to fit where that is less."""
        return size if self.limit is None else min(size, self.limit)

    def halve(self, tried: int, reason: str) -> None:
        """Note that ``tried`` (at least 2) did not fit, free memory and warn."""
        self.lower(tried, tried // 2, reason)

    def lower(self, tried: int, limit: int, reason: str) -> None:
        """``halve``, to a limit that the caller has chosen.

        Called after the block that caught the error, which holds on to everything that the failed attempt had.
        """
        self.limit = limit if self.limit is None else min(limit, self.limit)
        free_memory()
        wanted = max(1, self.limit // self.times)
        message = (
            f"memory ran out with up to {tried} {self.what} ({reason}); from now on at most {self.limit}, with the "
            f"same result in more time. Set {self.setting} to {wanted} to avoid the failed attempts"
        )
        (_listeners[-1] if _listeners else logger.warning)(message)

    def no_room(self, error: BaseException) -> NoRoomError:
        """What to raise where a single one does not fit."""
        return NoRoomError(
            f"out of memory: not even the smallest part of the work fits, so fewer {self.what} do not help "
            f"({reason_of(error)}). {self.advice}"
        )

    def parts(
        self, items: Sequence[Item], compute: Callable[[Sequence[Item]], Result], *, size: int
    ) -> Iterator[tuple[Sequence[Item], Result]]:
        """Parts of ``items`` in their order, as large as fits and at most ``size``, each with what is computed of it.

        Raises:
            NoRoomError: a part of one item does not fit.
        """
        begin = 0
        while begin < len(items):
            part = items[begin : begin + self.at_most(size)]
            try:
                result = compute(part)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise self.no_room(error) from error
                reason = reason_of(error)
            else:
                yield part, result
                begin += len(part)
                continue
            self.halve(len(part), reason)
