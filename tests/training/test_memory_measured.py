"""The memory estimate against what runs really take, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("measured_run.py")
SIZES = {"3M": "192 512 6 2048", "30M": "512 1408 8 8192"}
"""Hidden and intermediate size, layers, vocabulary."""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from /proc")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("trained", ["all", "lora"])
@pytest.mark.parametrize("method", ["sft", "grpo", "ppo"])
def test_the_estimate_is_near_the_measured_peak(method: str, trained: str, size: str, tmp_path: Path) -> None:
    """Growth of the process over what it had before the model was made, checkpoint and export included."""
    command = [sys.executable, str(SCRIPT), method, trained, *SIZES[size].split(), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["peak"] == pytest.approx(found["grown"], rel=0.35), found
