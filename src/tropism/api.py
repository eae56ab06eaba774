"""Training in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism.config import Recipe, algorithm_from
from tropism.errors import ConfigError
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
    metrics: Any = None,
    stop: Sequence[str] | str = (),
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
        eval_data, metrics: held-out data in the same forms; what else is measured of it: a callable, several, or named.
        run, resume: folder of all that is written (None: the first free ``runs/<method>-<number>``); go on with it.
        total_steps, prompts_per_step: collects and prompts of each (times ``group_size``), or updates and items each.
        seed, sampling, stop: all randomness follows from it; how completions are sampled; strings that end them.
        lora, train_layers: train an adapter, or only so many of the last transformer blocks; None: all weights.
        trainer, normalise, profile: everything else; the scale of a reward model; record where the second step goes.

    Returns:
        The trained policy or reward model, its latest metrics, and the run folder.

    Raises:
        TropismError: something about the model, data, reward or settings cannot work; raised before training starts.
    """
    recipe = Recipe(
        model=model,
        algorithm=algorithm_from(algorithm),
        data=data,
        eval_data=eval_data,
        reward=None if reward is None else RewardConfig.of(reward),
        metrics=metrics or {},
        run=None if run is None else str(run),
        total_steps=total_steps,
        prompts_per_step=prompts_per_step,
        seed=seed,
        sampling=_stopped(sampling or Sampling(), stop),
        lora=lora,
        train_layers=train_layers,
        trainer=trainer or TrainerConfig(),
        normalise=normalise,
    )
    return _executed(recipe, resume=resume, profile=profile)


def _executed(recipe: Recipe, **options: bool) -> Result:
    """The result of a recipe's run."""
    from tropism.build import run_recipe  # which imports everything

    return run_recipe(recipe, **options)


def _stopped(sampling: Sampling, stop: Sequence[str] | str) -> Sampling:
    """The sampling with these stop strings, which it may not name otherwise."""
    strings = (stop,) if isinstance(stop, str) and stop else tuple(stop)
    if not strings:
        return sampling
    if not all(isinstance(string, str) for string in strings):
        raise ConfigError(f"stop: expected strings that end a completion, not {stop!r:.80}")
    if sampling.stop and sampling.stop != strings:
        raise ConfigError(
            f"stop is {list(strings)!r:.80}, and sampling.stop is {list(sampling.stop)!r:.80}: both say where "
            "completions end. Give one of them"
        )
    return replace(sampling, stop=strings)
