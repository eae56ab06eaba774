"""Comparisons in processes of their own that are interrupted: what is done stays, and the end is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiny_comparisons import cell, samples, write_files

METHODS = ("--compare.methods.grpo.group_size", "2", "--methods", "grpo,best-of-n", "--best-of", "2")
SIZE = ("--completions", "48", "--seeds", "1", "--samples-per-prompt", "1", "--processes", "2", "--allow-code")
COMMAND = (sys.executable, "-m", "tropism.cli", "compare", "recipe.yaml", *METHODS, *SIZE, "--out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a comparison, in the folder whole, that nothing interrupted."""
    folder = tmp_path_factory.mktemp("comparisons")
    (folder / "recipe.yaml").write_text(json.dumps(write_files(folder) | {"compare": {"methods": {"grpo": {}}}}))
    subprocess.run([*COMMAND, "whole"], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_comparison_that_was_interrupted_goes_on_to_the_same_end(whole: Path, number: signal.Signals) -> None:
    """Ctrl-C and the death of the command both let the run save; the next call takes it up at its checkpoint."""
    cut, mark = whole / f"cut-{number}", whole / f"mark-{number}"
    environment = {**os.environ, "TEST_WAIT_AT": str(mark)}
    process = subprocess.Popen([*COMMAND, str(cut)], env=environment, text=True, stderr=subprocess.PIPE, cwd=whole)
    until = time.monotonic() + 600
    while not mark.exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), said
    run = cut / "cells" / "grpo-seed0" / "run"
    while (run / ".lock-owner.json").exists():  # of a run whose comparison has died
        assert time.monotonic() < until
        time.sleep(0.1)
    assert list((run / "checkpoints").iterdir()) and not (run.parent / "cell.json").exists()
    subprocess.run([*COMMAND, str(cut)], check=True, stdout=subprocess.DEVNULL, cwd=whole)
    assert "--resume" in (cut / "logs" / "grpo-seed0.log").read_text()
    for name in ("base-seed0", "grpo-seed0", "best-of-n-seed0"):
        one, other = samples(cut, name), samples(whole / "whole", name)
        assert one.pop("sequence_kl") == pytest.approx(other.pop("sequence_kl"), abs=1e-5, nan_ok=True)
        assert one == other
    assert cell(cut, "grpo-seed0")["completions"] == cell(whole / "whole", "grpo-seed0")["completions"] == 48
