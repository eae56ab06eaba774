"""Two processes of one script, joined as a launcher joins them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def start_two(script: Path, folder: Path, *, settings: Mapping[str, str] | None = None, timeout: float = 300) -> None:
    """Run ``script folder`` as two gloo processes with one thread each, and fail with the output of one that fails.

    Args:
        settings: environment variables on top.
        timeout: seconds for each.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"} | dict(settings or {})
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        texts = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, texts, strict=True):
        assert process.returncode == 0, text[-4000:]
