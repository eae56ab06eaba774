"""Training in one call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism.config import Recipe, algorithm_from
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.training.config import TrainerConfig

if TYPE_CHECKING:
    from tropism.algorithms import AlgorithmConfig
    from tropism.models.lora import LoRA
    from tropism.result import Result
    from tropism.training.normalisation import Normalisation


def train(
    model: Any,
    algorithm: AlgorithmConfig | str,
    *,
    data: Any,
    reward: Any = None,
    eval_data: Any = None,
    run: str | Path | None = None,
    total_steps: int = 100,
    prompts_per_step: int = 16,
    seed: int = 0,
    sampling: Sampling | None = None,
    lora: LoRA | None = None,
    train_layers: int | None = None,
    trainer: TrainerConfig | None = None,
    normalise: Normalisation | None = None,
    resume: bool = False,
    profile: bool = False,
) -> Result:
    """Turn a model toward a reward (or, with SFT, toward demonstrations), or into a reward model.

    Args:
        model: hub id, folder, .gguf file, "demo", a ``ModelConfig``, or (model, tokenizer), which is trained in place.
        algorithm: the method and its settings, such as ``GRPO(group_size=8)``, or its name.
        data: prompts (or demonstrations, judgements) as list, file, ``DataConfig``, ``Dataset`` or columns.
        reward: a callable, a registered name, ``{"name": (reward, weight)}``, or a ``RewardConfig``.
        eval_data: held-out data in the same forms, evaluated before and after (and every ``trainer.evaluation.every``).
        run: folder of everything that is written; None takes the first free ``runs/<method>-<number>``.
        total_steps, prompts_per_step: collects and prompts of each (times ``group_size``), or updates and items each.
        seed, sampling: all randomness follows from it; how completions are sampled.
        lora, train_layers: train an adapter, or only so many of the last transformer blocks; None: all weights.
        trainer, normalise: optimizer, precision, evaluation, checkpoints, tracking; the scale of a reward model.
        resume, profile: go on from the newest complete checkpoint; record where the second step goes (``profile/``).

    Returns:
        The trained policy or reward model, its latest metrics, and the run folder.

    Raises:
        TropismError: something about the model, data, reward or settings cannot work; raised before training starts.
    """
    from tropism.build import run_recipe

    recipe = Recipe(
        model=model,
        algorithm=algorithm_from(algorithm),
        data=data,
        eval_data=eval_data,
        reward=None if reward is None else RewardConfig.of(reward),
        run=None if run is None else str(run),
        total_steps=total_steps,
        prompts_per_step=prompts_per_step,
        seed=seed,
        sampling=sampling or Sampling(),
        lora=lora,
        train_layers=train_layers,
        trainer=trainer or TrainerConfig(),
        normalise=normalise,
    )
    return run_recipe(recipe, resume=resume, profile=profile)
