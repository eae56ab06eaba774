"""What each of the processes does that tests/distributed starts: ``python two_processes.py FOLDER``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from tiny_runs import EPISODES, PROMPTS, Setting, assemble, execute, weights_of
from tropism.algorithms import (
    DPO,
    GRPO,
    ILQL,
    KTO,
    PPO,
    RFT,
    RLOO,
    SFT,
    AlgorithmConfig,
    KLControl,
    Online,
    Quark,
    RewardConditioned,
)
from tropism.build import Assembly
from tropism.rewards import RewardConfig
from tropism.training import boundary
from tropism.training.run_folder import RunFolder
from tropism.types import Rollouts

STEPS = 20


@dataclass(frozen=True)
class Case:
    """A run of three ragged prompts a step, so that no share is even, unless ``changes`` say otherwise."""

    setting: Setting
    algorithm: AlgorithmConfig
    trainer: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    empty: int | None = None
    """Every so many completions one is empty."""


def letters_by_token(completion_ids: list[list[int]]) -> list[list[float]]:
    """A reward for every token."""
    return [[float(5 <= token < 18) for token in ids] for ids in completion_ids]


KL = KLControl(target=0.5, horizon=100)
CASES: dict[str, Case] = {
    "sft": Case(Setting("sft", False, "llama"), SFT()),
    "sft-last1": Case(Setting("sft", False, "llama", train_layers=1), SFT()),
    "ppo": Case(Setting("ppo", False, "llama"), PPO(group_size=2, num_epochs=2, minibatch_size=3, kl=KL)),
    "ppo-one-row": Case(
        Setting("ppo", False, "llama"),
        PPO(num_epochs=2, kl=KL, whiten_advantages=False),
        changes={"prompts_per_step": 1, "reward": RewardConfig.of(letters_by_token)},
    ),
    "grpo": Case(Setting("grpo", False, "llama"), GRPO(group_size=2, num_epochs=2, minibatch_size=3)),
    "grpo-lora-weighted": Case(
        Setting("grpo", True, "gpt2"),
        GRPO(group_size=2, num_epochs=2, minibatch_size=3),
        trainer={"importance_cap": 2.0},
    ),
    "rloo-empty": Case(Setting("rloo", False, "llama"), RLOO(group_size=2, num_epochs=2, minibatch_size=3), empty=4),
    "conditioned": Case(Setting("conditioned", True, "gpt2"), RewardConditioned(prompt_loss_weight=0.5)),
    "conditioned-online": Case(
        Setting("conditioned-online", False, "llama"),
        RewardConditioned(online=Online(group_size=3, updates=2, batch_size=5), target_dropout=0.3),
        empty=4,
    ),
    "quark": Case(Setting("quark", False, "llama"), Quark(quantiles=3, group_size=2, updates=2, batch_size=5)),
    "ilql": Case(
        Setting("ilql", False, "llama"),
        ILQL(target_sync_every=2, awac_beta=0.5, q_rate=1.0),
        changes={"eval_data": EPISODES[:3]},
    ),
    "dpo": Case(Setting("dpo", True, "gpt2"), DPO(label_smoothing=0.1)),
    "kto": Case(Setting("kto", False, "llama"), KTO(undesirable_weight=1.5)),
    "rft": Case(
        Setting("rft", False, "llama"), RFT(improve_steps=1, group_size=3, updates=2, batch_size=5, memory=2), empty=4
    ),
}
"""Methods; an adapter and a last layer; a pool of completions; per-token rewards, importance weights, an adaptive KL
coefficient, a running scale of the reward (all but one), empty completions, and fewer rows than processes."""


def run_all(folder: Path) -> int:
    """Twenty steps of every case; returns the rank."""
    torch.set_num_threads(1)
    rank = 0
    for name, case in CASES.items():
        held_out: dict[str, Any] = {"eval_data": PROMPTS[:3]} if case.algorithm.on_policy else {}
        assembly = assemble(
            case.setting,
            folder / name,
            algorithm=case.algorithm,
            total_steps=STEPS,
            trainer={"learning_rate": 1e-4, "micro_batch_size": 1, **case.trainer},
            **{"prompts_per_step": 3, **held_out, **case.changes},
        )
        if case.empty is not None:
            empty_some(assembly, case.empty)
        rank = assembly.processes.rank
        if rank > 0:
            forbid_writing()
        execute(assembly)
        save_file(weights_of(assembly), folder / f"{name}-rank-{rank}.safetensors")
    return rank


def empty_some(assembly: Assembly, every: int) -> None:
    """Let every so many completions have no token at all."""
    assert assembly.maker is not None
    sampler: Any = assembly.maker.sampler
    generate = sampler.generate

    def emptied(*arguments: Any, first_index: int = 0, **named: Any) -> Rollouts:
        rollouts: Rollouts = generate(*arguments, first_index=first_index, **named)
        empty = (torch.arange(len(rollouts)) + first_index) % every == 0
        mask = rollouts.completion_mask & ~empty[:, None]
        return replace(
            rollouts,
            completion_lengths=rollouts.completion_lengths * ~empty,
            completion_ids=rollouts.completion_ids * mask,
            logprobs=rollouts.logprobs * mask,
            behaviour_logprobs=rollouts.behaviour_logprobs * mask,
        )

    sampler.generate = emptied


def forbid_writing() -> None:
    """Only the first process writes; any other that tries fails."""

    def refuse(name: str) -> Callable[..., None]:
        def refused(*_: Any, **__: Any) -> None:
            raise AssertionError(f"a process other than the first called {name}")

        return refused

    for name in ("create", "append", "write_recipe", "write_environment", "write_rollouts", "write_evaluation"):
        setattr(RunFolder, name, refuse(name))
    for name in ("write_checkpoint", "prune"):
        setattr(boundary, name, refuse(name))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
