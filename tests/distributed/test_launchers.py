"""The real launchers start the real command line: two processes, one result, the numbers of a single process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forked_runs import free_port, write_recipe
from tiny_runs import logged
from tropism.cli import main

pytestmark = pytest.mark.distributed

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
ACCELERATE = (
    *("-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("launchers"))
    assert main(["train", str(path), "--run", str(path.parent / "one"), "--allow-code"]) == 0
    return path


def launched(launcher: tuple[str, ...], recipe: Path, run: Path) -> subprocess.CompletedProcess[str]:
    own = run.with_suffix(".yaml")
    own.write_text(f"{recipe.read_text()}\nrun: {run}\n")  # torchrun takes --run for one of its own options
    command = [sys.executable, *launcher, "-m", "tropism.cli", "train", str(own), "--allow-code"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        command,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    "launcher",
    [(*TORCHRUN, "--master_port", "PORT"), (*ACCELERATE, "--multi_gpu", "--main_process_port", "PORT")],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_make_one_run(launcher: tuple[str, ...], recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "two"
    words = tuple(str(free_port()) if word == "PORT" else word for word in launcher)
    ended = launched(words, recipe, run)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.count("report:") == 1, "the first process alone tells"
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    assert (run / "model" / "config.json").is_file()
    for kind in ("collect", "update", "evaluation"):
        one, two = logged(recipe.parent / "one", kind), logged(run, kind)
        assert len(one) == len(two)
        for single, double in zip(one, two, strict=True):
            assert single.keys() == double.keys()
            for name, value in single.items():
                expected = pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value
                assert double[name] == expected, (kind, name)


def test_accelerate_on_cpus_starts_one_process_which_says_so(recipe: Path, tmp_path: Path) -> None:
    ended = launched((*ACCELERATE, "--cpu", "--main_process_port", str(free_port())), recipe, tmp_path / "run")
    assert ended.returncode != 0
    assert "started a single process" in ended.stderr and "torchrun --nproc_per_node" in ended.stderr
    assert not (tmp_path / "run").exists()
