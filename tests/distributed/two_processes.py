"""What each of the processes does that tests/distributed starts: ``python two_processes.py FOLDER``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

import tropism.training.run as run_module
from tiny_runs import PROMPTS, Setting, assemble, execute, weights_of
from tropism.algorithms import GRPO, PPO, SFT, AlgorithmConfig, KLControl
from tropism.training.run_folder import RunFolder

METHODS: dict[str, AlgorithmConfig] = {
    "sft": SFT(),
    "ppo": PPO(group_size=2, num_epochs=2, minibatch_size=3, kl=KLControl(target=0.5, horizon=100)),
    "grpo": GRPO(group_size=2, num_epochs=2, minibatch_size=3),
}


def run_all(folder: Path) -> int:
    """Twenty steps of every method, three ragged prompts each, so that no share is even; returns the rank."""
    torch.set_num_threads(1)
    rank = 0
    for method, algorithm in METHODS.items():
        changes: dict[str, Any] = {"eval_data": PROMPTS[:3]} if algorithm.on_policy else {}
        assembly = assemble(
            Setting(method, False, "llama"),
            folder / method,
            algorithm=algorithm,
            total_steps=20,
            prompts_per_step=3,
            trainer={"learning_rate": 1e-4, "micro_batch_size": 1},
            **changes,
        )
        rank = assembly.processes.rank
        if rank > 0:
            forbid_writing()
        execute(assembly)
        save_file(weights_of(assembly), folder / f"{method}-rank-{rank}.safetensors")
    return rank


def forbid_writing() -> None:
    """Only the first process writes; any other that tries fails."""

    def refuse(name: str) -> Callable[..., None]:
        def refused(*_: Any, **__: Any) -> None:
            raise AssertionError(f"a process other than the first called {name}")

        return refused

    for name in ("create", "append", "write_recipe", "write_environment", "write_rollouts", "write_evaluation"):
        setattr(RunFolder, name, refuse(name))
    for name in ("write_checkpoint", "prune"):
        setattr(run_module, name, refuse(name))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
