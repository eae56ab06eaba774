"""One of two processes runs out of memory: both go on with smaller micro-batches, and neither waits in vain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed.short_of_memory import run
from tiny_runs import assert_same, execute, logged, weights_of
from two_started import start_two

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("short_of_memory.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    start_two(SCRIPT, folder, timeout=120)
    return folder


def test_the_result_is_that_of_one_process_with_room(two: Path, tmp_path: Path) -> None:
    plain = execute(run(tmp_path / "plain"))
    weights = load_file(two / "rank-0.safetensors")
    assert_same(weights, load_file(two / "rank-1.safetensors"))
    for name, value in weights_of(plain).items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5, msg=name)
    for one, other in zip(logged(tmp_path / "plain", "update"), logged(two / "run", "update"), strict=True):
        assert other["optim/grad_norm"] == pytest.approx(one["optim/grad_norm"], rel=1e-5, abs=5e-6)


def test_what_all_agreed_on_is_told_by_the_first(two: Path) -> None:
    lines = [json.loads(line)["message"] for line in (two / "run" / "warnings.jsonl").read_text().splitlines()]
    told = [line for line in lines if line.startswith("memory ran out")]
    for kind in ("the update", "the log-probs"):
        assert any(f"in a micro-batch of {kind}" in line for line in told)


def test_a_row_that_does_not_fit_ends_both(two: Path) -> None:
    own, other = ((two / f"error-{rank}").read_text() for rank in (1, 0))
    assert "CUDA out of memory" in own and own in other and other.startswith("process 1: ")
