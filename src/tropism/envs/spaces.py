"""Gymnasium, and the spaces of token-level environments."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from tropism.errors import ConfigError

try:
    from gymnasium import Env, Space, spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError as missing:
    raise ConfigError('token-level environments need the package gymnasium; pip install "tropism[gym]"') from missing

__all__ = [
    "AutoresetMode",
    "Env",
    "Observation",
    "VectorEnv",
    "action_space",
    "batch_space",
    "check_settings",
    "observation_space",
]

Observation = Literal["hidden", "ids"]


def check_settings(observation: str, **counts: Any) -> None:
    """Refuse an unknown kind of observation, and counts that are no whole numbers of at least 1.

    Raises:
        ConfigError: names the setting.
    """
    if observation not in get_args(Observation):
        raise ConfigError(f"observation is {observation!r}; choose {' or '.join(get_args(Observation))}")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, not {count!r}")


def action_space(vocabulary: int, samples: int) -> Space[Any]:
    """One token id, or one per sample where there are several."""
    return spaces.Discrete(vocabulary) if samples == 1 else spaces.MultiDiscrete([vocabulary] * samples)


def observation_space(kind: Observation, samples: int, *, width: int, vocabulary: int) -> Space[Any]:
    """Hidden states [H] ([samples, H] of several), or all ids of prompt and completion (a tuple of those of several).

    Args:
        width: H. vocabulary: number of tokens.
    """
    if kind == "hidden":
        shape = (width,) if samples == 1 else (samples, width)
        return spaces.Box(-np.inf, np.inf, shape=shape, dtype=np.float32)
    row: Space[Any] = spaces.Sequence(spaces.Discrete(vocabulary))
    return row if samples == 1 else spaces.Tuple([row] * samples)
