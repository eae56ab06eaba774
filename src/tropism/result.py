"""What a run leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tropism.errors import ConfigError
from tropism.generation import TextPolicy
from tropism.text_reward_model import TextRewardModel


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left behind."""

    trained: TextPolicy | TextRewardModel
    """What was trained."""
    metrics: dict[str, float]
    """The latest value of every metric."""
    path: Path
    """The run folder."""

    @property
    def policy(self) -> TextPolicy:
        """The trained policy; ``generate`` answers prompts.

        Raises:
            ConfigError: a reward model was trained.
        """
        if not isinstance(self.trained, TextPolicy):
            raise ConfigError("the run trained a reward model and no policy; take result.reward_model")
        return self.trained

    @property
    def reward_model(self) -> TextRewardModel:
        """The trained reward model; ``score`` judges completions.

        Raises:
            ConfigError: a policy was trained.
        """
        if isinstance(self.trained, TextPolicy):
            raise ConfigError("the run trained a policy and no reward model; take result.policy")
        return self.trained
