"""Asking glibc to keep freed memory."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_large_block_that_was_freed_is_used_again_without_page_faults() -> None:
    code = """
import resource, sys, numpy
from tropism.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
numpy.ones(2**24)
before = faults()
for _ in range(5):
    numpy.ones(2**24)
print(faults() - before)
"""
    kept, plain = (
        int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "plain")
    )
    assert kept < 100
    assert plain > 10 * max(kept, 1)
