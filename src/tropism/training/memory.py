"""Memory that training frees and needs again at once."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of ``mallopt(3)``."""
MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask the C library to keep what is freed instead of handing it back to the system; only glibc can.

    A training step on the CPU allocates and frees the same few hundred megabytes over and over. By default glibc
    returns large blocks at once, and the system clears every page anew at the next use: over a quarter of a step.
    The process then keeps its peak for as long as it lives. Returns whether it was done.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, MOST))
