"""What each of the sharding processes does that test_sharded starts: ``python sharded.py FOLDER``.

FOLDER/one holds the runs of one process, among them an interrupted one that the sharding processes go on with.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from distributed.two_processes import forbid_writing
from tiny_runs import EPISODES, PROMPTS, TEXTS, Setting, assemble, execute, sample, stop_after
from tropism.algorithms import DPO, GRPO, ILQL, KTO, PPO, SFT, Quark
from tropism.build import Assembly
from tropism.errors import ModelError, NumericsError
from tropism.training.config import CheckpointConfig
from tropism.training.interrupt import Interrupted

LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What ``accelerate launch --use_fsdp --fsdp_version 2`` sets."""
GRPO_SETTING = GRPO(group_size=2, num_epochs=2, minibatch_size=3)
BEST = CheckpointConfig(best_metric="eval/loss", best_mode="min", use_best=True)

CASES: dict[str, tuple[Setting, dict[str, Any]]] = {
    "sft": (
        Setting("sft", False, "llama"),
        {"algorithm": SFT(), "total_steps": 20, "eval_data": TEXTS[:3], "trainer": {"checkpoints": BEST}},
    ),
    "grpo": (Setting("grpo", False, "llama"), {"algorithm": GRPO_SETTING, "total_steps": 20, "eval_data": PROMPTS[:1]}),
    "adapter": (Setting("grpo", True, "llama"), {"algorithm": GRPO_SETTING, "total_steps": 3}),
    "layers": (
        Setting("grpo", False, "gpt2", train_layers=1),
        {"algorithm": GRPO_SETTING, "total_steps": 3},
    ),
    "critic": (
        Setting("ppo", False, "llama"),
        {"algorithm": PPO(group_size=3, num_epochs=2), "total_steps": 3, "prompts_per_step": 1},
    ),
    "ilql": (
        Setting("ilql", False, "llama"),
        {
            "algorithm": ILQL(target_sync_every=2, alpha=0.5, q_rate=1.0),
            "total_steps": 20,
            "eval_data": EPISODES[:3],
        },
    ),
    "dpo": (Setting("dpo", False, "llama"), {"algorithm": DPO(), "total_steps": 5}),
    "kto": (Setting("kto", False, "llama"), {"algorithm": KTO(), "total_steps": 5}),
    "quark": (
        Setting("quark", True, "llama"),
        {"algorithm": Quark(quantiles=3, group_size=2, updates=2, batch_size=3), "total_steps": 3},
    ),
}
"""Three ragged prompts a step, so that one process has two rows of a minibatch and the other has one; with a critic
one prompt, so that the first process samples nothing."""

STOPPED = {"sft": 7, "grpo": 6, "ilql": 7}
"""Updates after which a run is interrupted; GRPO has four in a collect."""


def assembled(case: str, folder: Path, *, resume: bool = False) -> Assembly:
    setting, changes = CASES[case]
    trainer = {"learning_rate": 1e-4, "micro_batch_size": 1, **changes.get("trainer", {})}
    return assemble(setting, folder, resume=resume, **{"prompts_per_step": 3, **changes, "trainer": trainer})


def interrupted(case: str, folder: Path) -> None:
    """A run that a signal ends after some updates."""
    assembly = assembled(case, folder)
    stop_after(assembly, STOPPED[case], signal.SIGTERM)
    with pytest.raises(Interrupted):
        execute(assembly)


def whole_weights(assembly: Assembly) -> dict[str, Tensor]:
    """Every weight once training is over."""
    return {name: p.detach().clone() for name, p in assembly.policy.named_parameters()}


def run_cases(folder: Path) -> None:
    """Every case to its end, on the processes there are; weights, passes of each process and shares in files."""
    for case in CASES:
        assembly = assembled(case, folder / case)
        rank = assembly.processes.rank
        passes = count_passes(assembly)
        shares = {name: list(_here(p).shape) for name, p in assembly.policy.named_parameters()}
        shares |= {f"reference.{name}": list(_here(p).shape) for name, p in _frozen(assembly)}
        if assembly.processes.count > 1:  # a process by itself would wait for the others for ever
            with pytest.raises(ModelError, match=r"enter policy\.whole\(\) on all processes"):
                sample(assembly)
        execute(assembly, export=case in ("sft", "adapter"))
        save_file(whole_weights(assembly), folder / f"{case}-rank-{rank}.safetensors")
        report: dict[str, Any] = {"passes": passes, "shares": shares, "memory": assembly.memory.facts()}
        if rank == 0:  # alone: nothing is exchanged any more
            report["texts"] = assembly.result().policy.generate(PROMPTS, max_new_tokens=6, seed=5)
        (folder / f"{case}-rank-{rank}.json").write_text(json.dumps(report))


def _here(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _frozen(assembly: Assembly) -> list[tuple[str, Tensor]]:
    reference = assembly.reference
    return [] if reference is None or reference.kind != "copy" else list(reference.frozen.named_parameters())


def count_passes(assembly: Assembly) -> dict[str, int]:
    """Forward passes of policy and reference from here on, with gradients and without; sampling has its own way."""
    passes: dict[str, int] = {}
    models = {"policy": assembly.policy}
    if assembly.reference is not None and assembly.reference.kind == "copy":
        models["reference"] = assembly.reference.frozen
    for model, module in models.items():

        def count(*_: Any, model: str = model) -> None:
            kind = f"{model}, {'update' if torch.is_grad_enabled() else 'scoring'}"
            passes[kind] = passes.get(kind, 0) + 1

        module.register_forward_pre_hook(count)
    return passes


def run_resumed(folder: Path) -> None:
    """Interrupted and resumed: by the same processes, and where one process had begun."""
    for case in STOPPED:
        own = folder / f"{case}-stopped"
        interrupted(case, own)
        resumed = {"resumed": own, "taken-over": folder / f"{case}-begun"}
        rank = int(os.environ["RANK"])
        if rank == 0:
            shutil.copytree(own, folder / f"{case}-handed-over")
            shutil.copytree(folder.parent / "one" / f"{case}-stopped", resumed["taken-over"])
        torch.distributed.barrier()
        for name, path in resumed.items():
            assembly = execute(assembled(case, path, resume=True))
            save_file(whole_weights(assembly), folder / f"{case}-{name}-rank-{rank}.safetensors")


def run_into_nan(folder: Path) -> None:
    """A gradient that is not finite on one process is named on all, and nothing has changed."""
    assembly = assembled("sft", folder / "nan")
    trainer: Any = assembly.trainer
    accumulate = trainer._accumulate
    name = "model.model.layers.1.mlp.up_proj.weight"

    def broken(*arguments: Any) -> Any:
        metrics = accumulate(*arguments)
        gradient = dict(assembly.policy.named_parameters())[name].grad
        if assembly.processes.rank == 1:
            assert isinstance(gradient, DTensor)
            gradient.to_local()[0, 0] = torch.nan
        return metrics

    trainer._accumulate = broken
    before = [_here(p).clone() for p in assembly.policy.parameters()]
    with pytest.raises(NumericsError, match=rf"the gradient of {re.escape(name)} is not finite at update 1"):
        execute(assembly)
    for value, parameter in zip(before, assembly.policy.parameters(), strict=True):
        assert torch.equal(value, _here(parameter))


if __name__ == "__main__":
    torch.set_num_threads(1)
    there = Path(sys.argv[1]) / "two"
    if os.environ["RANK"] != "0":
        forbid_writing()
    run_cases(there)
    run_resumed(there)
    run_into_nan(there)
