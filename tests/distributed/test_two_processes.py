"""Two processes do what one does: the same samples, losses, gradients and weights, and only the first writes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from distributed.two_processes import METHODS, run_all
from tiny_runs import assert_same, logged

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("two_processes.py")
EXACT = ("kind", "step", "collects", "updates", "samples", "tokens")


def launch(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir()
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        texts = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, texts, strict=True):
        assert process.returncode == 0, text[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the runs of one process, and of two."""
    folder = tmp_path_factory.mktemp("distributed")
    launch(folder / "two")
    (folder / "one").mkdir()
    run_all(folder / "one")
    return folder / "one", folder / "two"


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_at_every_update(method: str, runs: tuple[Path, Path]) -> None:
    for kind in ("update", "collect", "evaluation"):
        one, two = (logged(folder / method, kind) for folder in runs)
        assert len(one) == len(two)
        if kind == "update":
            assert len(one) == (20 if method == "sft" else 80)
        for single, double in zip(one, two, strict=True):
            assert single.keys() == double.keys()
            for name, value in single.items():
                if name in EXACT or value is None:  # null: not a number, such as the diversity of one word
                    assert double[name] == value
                elif name == "optim/grad_norm":
                    assert double[name] == pytest.approx(value, rel=1e-5)
                elif name.startswith("loss/"):
                    # Where advantages cancel, a loss is a difference of numbers around one: hence the absolute part.
                    assert double[name] == pytest.approx(value, rel=1e-5, abs=2e-6), name
                else:
                    assert double[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (kind, name)


@pytest.mark.parametrize("method", METHODS)
def test_weights_after_twenty_steps(method: str, runs: tuple[Path, Path]) -> None:
    one = load_file(runs[0] / f"{method}-rank-0.safetensors")
    two = load_file(runs[1] / f"{method}-rank-0.safetensors")
    for name, value in one.items():
        assert float((value - two[name]).abs().max()) < 1e-5, name
    assert_same(two, load_file(runs[1] / f"{method}-rank-1.safetensors"))


@pytest.mark.parametrize("method", [name for name, config in METHODS.items() if config.on_policy])
def test_the_same_samples(method: str, runs: tuple[Path, Path]) -> None:
    for step in range(1, 21):
        one, two = (pq.read_table(f / method / "rollouts" / f"step-{step:06d}.parquet").to_pydict() for f in runs)
        for column in ("prompt", "completion", "completion_ids", "finish_reason"):
            assert one[column] == two[column]
        for column in ("reward", "advantage"):
            torch.testing.assert_close(torch.tensor(one[column]), torch.tensor(two[column]), rtol=1e-4, atol=1e-5)
