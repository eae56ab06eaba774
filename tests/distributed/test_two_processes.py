"""Two processes do what one does: the same samples, losses, gradients and weights, and only the first writes."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from distributed.two_processes import CASES, STEPS, run_all
from tiny_runs import assert_same, logged
from two_started import start_two

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("two_processes.py")
UPDATES = {"sft": 1, "sft-last1": 1, "ppo-one-row": 2, "conditioned": 1, "conditioned-online": 2, "quark": 2, "rft": 2}
UPDATES |= {"dpo": 1, "kto": 1, "ilql": 1}
"""Of a step; 4 of the others."""
EXACT = ("kind", "step", "collects", "updates", "samples", "tokens")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the runs of one process, and of two."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "two").mkdir()
    start_two(SCRIPT, folder / "two")
    (folder / "one").mkdir()
    run_all(folder / "one")
    return folder / "one", folder / "two"


@pytest.mark.parametrize("method", CASES)
def test_losses_and_gradients_at_every_update(method: str, runs: tuple[Path, Path]) -> None:
    for kind in ("update", "collect", "evaluation"):
        one, two = (logged(folder / method, kind) for folder in runs)
        assert len(one) == len(two)
        if kind == "update":
            assert len(one) == STEPS * UPDATES.get(method, 4)
        for single, double in zip(one, two, strict=True):
            assert single.keys() == double.keys()
            for name, value in single.items():
                if name in EXACT or value is None:  # null: not a number, such as the diversity of one word
                    assert double[name] == value
                elif name == "optim/grad_norm":
                    # From the second update on weights drift apart by what Adam makes of rounding.
                    drift = 0.0 if single["updates"] == 1 else 5e-6
                    assert double[name] == pytest.approx(value, rel=1e-5, abs=drift)
                elif name.startswith("loss/"):
                    # Where advantages cancel, a loss is a difference of numbers around one, RLOO's around ten.
                    drift = 2e-6 if single["updates"] == 1 else 2e-5
                    assert double[name] == pytest.approx(value, rel=1e-5, abs=drift), name
                else:
                    assert double[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (kind, name)


@pytest.mark.parametrize("method", CASES)
def test_weights_after_twenty_steps(method: str, runs: tuple[Path, Path]) -> None:
    one = load_file(runs[0] / f"{method}-rank-0.safetensors")
    two = load_file(runs[1] / f"{method}-rank-0.safetensors")
    for name, value in one.items():
        assert float((value - two[name]).abs().max()) < 1e-5, name
    assert_same(two, load_file(runs[1] / f"{method}-rank-1.safetensors"))


@pytest.mark.parametrize("method", [name for name, case in CASES.items() if case.algorithm.on_policy])
def test_the_same_samples(method: str, runs: tuple[Path, Path]) -> None:
    for step in range(1, STEPS + 1):
        one, two = (pq.read_table(f / method / "rollouts" / f"step-{step:06d}.parquet").to_pydict() for f in runs)
        for column in ("prompt", "completion", "completion_ids", "finish_reason"):
            assert one[column] == two[column]
        for column in {"reward", "advantage"} & one.keys():
            torch.testing.assert_close(torch.tensor(one[column]), torch.tensor(two[column]), rtol=1e-4, atol=1e-5)
