"""A lock that keeps two runs out of one folder. The system frees it when its process ends, however that ends."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from tropism.errors import StorageError
from tropism.storage import write_whole, writing

logger = logging.getLogger("tropism")

LOCK = ".lock"
"""The file that is locked; empty."""
OWNER = ".lock-owner.json"
"""Process, host and start time of whoever holds the lock, for people and for messages."""
PATIENCE = 1.0
"""Seconds given to a lock whose owner is not known to be alive: one that has just locked is about to write who it is,
and of one that was killed a child forked a moment before may still be about to let go."""
LOCK_FILES = (LOCK, OWNER, f".{OWNER}.writing")


class RunLock:
    """The right to write into a run folder, which must exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Threads of a process share the hold; a second run of the same process is kept out like any other.
        self._lock = FileLock(folder / LOCK, thread_local=False)

    def acquire(self) -> None:
        """Take the lock, also one whose owner was killed; a warning says so then.

        Raises:
            StorageError: another run holds it (process, host and start time are named), or it cannot be written.
        """
        self._take()
        left = _owner(self.folder)
        if left is not None:
            logger.warning(
                "%s was left locked by %s, which is gone: the lock is taken over", self.folder, _described(left)
            )
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        try:
            write_whole(self.folder / OWNER, json.dumps(mine).encode())
        except BaseException:
            self.release()
            raise

    def check(self) -> None:
        """See whether the lock could be taken, and leave everything as it is.

        Raises:
            StorageError: as ``acquire`` does.
        """
        if (self.folder / LOCK).exists():
            self._take()
            self._lock.release()

    def release(self) -> None:
        """Give the lock back, if it is held, and delete its files."""
        if not self._lock.is_locked:
            return
        (self.folder / OWNER).unlink(missing_ok=True)
        if not isinstance(self._lock, SoftFileLock):  # a soft lock deletes its file itself
            # While it is still held: whoever has opened the file and waits finds it deleted, and makes a new one.
            (self.folder / LOCK).unlink(missing_ok=True)
        self._lock.release()

    def _take(self) -> None:
        owner = None
        with writing(self.folder):
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                try:
                    self._lock.acquire(timeout=0)
                    return
                except Timeout:  # which is an OSError, too
                    owner = _owner(self.folder)
                if owner is not None and _may_be_alive(owner):
                    break
                time.sleep(0.02)
        by = "another process, which has just begun" if owner is None else _described(owner)
        raise StorageError(
            f"{self.folder} is in use by {by}: two runs cannot write into one folder. Wait until that one ends or stop "
            "it, or choose another name"
        )


def _owner(folder: Path) -> dict[str, Any] | None:
    """Who last took the lock and has not given it back."""
    try:
        facts = json.loads((folder / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def _may_be_alive(owner: dict[str, Any]) -> bool:
    """Whether the process exists, as far as can be seen from this host."""
    if owner.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False
    return True


def _described(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}, started {owner.get('started')}"
