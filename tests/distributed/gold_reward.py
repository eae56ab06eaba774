"""What each of two processes does for test_gold_reward.py: ``python gold_reward.py FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tiny_runs import PROMPTS, Setting, assemble, execute
from tropism.rewards import RewardConfig
from tropism.training.config import CheckpointConfig, EvaluationConfig

HELD_OUT = {"uneven": PROMPTS[:3], "fewer than processes": PROMPTS[:1]}


def brief(completions: list[str]) -> list[float]:
    return [-float(len(text)) for text in completions]


def vowels(completions: list[str]) -> list[float | None]:
    """No opinion where there is none."""
    return [float(count) if (count := sum(text.count(letter) for letter in "aeiou")) else None for text in completions]


def run_all(folder: Path) -> None:
    """Three steps, evaluated after each and judged by the gold reward."""
    torch.set_num_threads(1)
    for name, held_out in HELD_OUT.items():
        gold = RewardConfig.of({"brief": (brief, 0.5), "vowels": (vowels, 2.0)})
        trainer: dict[str, Any] = {
            "learning_rate": 1e-3,
            "evaluation": EvaluationConfig(every=1, gold=gold),
            "checkpoints": CheckpointConfig(best_metric="eval/gold", patience=9),
        }
        run = folder / name
        assembly = assemble(Setting("grpo", False, "llama"), run, eval_data=held_out, total_steps=3, trainer=trainer)
        execute(assembly)
        best = assembly.run.best
        (folder / f"{name}-{assembly.processes.rank}.json").write_text(json.dumps([best.step, best.value]))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
