"""What the folder of a reward model says beside the plain Hugging Face files: what it reads, and its scale."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism.errors import ModelError
from tropism.foreign.json_files import read_object
from tropism.foreign.paths import file_inside

if TYPE_CHECKING:  # workers of rewards read these facts, and need no torch
    from torch import Tensor

FILE = "reward_model.json"
OFFSET = "tropism_reward_offset"
"""Key of config.json: what has to be added to the logit, as some families' heads have no bias to carry it."""


@dataclass(frozen=True, kw_only=True)
class Normalised:
    """How scores were put on a scale."""

    mean: float
    """Of the scores that were measured, after it."""
    std: float
    samples: int
    """How many completions were scored."""
    policy: str
    """Whose."""


@dataclass(frozen=True, kw_only=True)
class RewardFacts:
    """The content of ``reward_model.json``."""

    text: str
    """What it reads: ``completion`` or ``prompt+completion``."""
    max_length: int | None
    """Most tokens it reads; None: what its body takes."""
    gain: float
    """Factor that is in the head's weights already."""
    bias: float
    """Summand that is in the head's bias, or in ``offset``."""
    offset: float
    """What has to be added to the logit."""
    normalised: Normalised | None
    """None: it never was, so that its scores have no known scale."""
    trained_gain: float | None = None
    """Gain as it was trained, before that; None where it was not normalised after training."""
    trained_bias: float | None = None

    def as_trained(self, scores: Tensor) -> Tensor:
        """Scores on the scale that the loss knew, on which probabilities and squared errors mean something."""
        if self.trained_gain is None or self.trained_bias is None:
            return scores
        return (scores - self.bias) / self.gain * self.trained_gain + self.trained_bias

    def write(self, folder: Path) -> None:
        """Write the file into a folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> RewardFacts | None:
        """What a folder says; None where it is not a reward model's.

        Raises:
            ModelError: the file is damaged.
        """
        path = file_inside(folder, FILE)
        if path is None:
            return None
        values = read_object(path)
        try:
            return cls._of(values)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path} is damaged: {error}") from error

    @classmethod
    def _of(cls, values: dict[str, Any]) -> RewardFacts:
        normalised = values["normalised"]
        trained = {
            name: None if values.get(name) is None else _finite(values[name])
            for name in ("trained_gain", "trained_bias")
        }
        if values["text"] not in ("completion", "prompt+completion"):
            raise ValueError(f"text is {values['text']!r:.60}")
        return cls(
            text=values["text"],
            max_length=None if values["max_length"] is None else _count(values["max_length"]),
            gain=_finite(values["gain"]),
            bias=_finite(values["bias"]),
            offset=_finite(values["offset"]),
            normalised=None
            if normalised is None
            else Normalised(
                mean=_finite(normalised["mean"]),
                std=_finite(normalised["std"]),
                samples=_count(normalised["samples"]),
                policy=str(normalised["policy"]),
            ),
            **trained,
        )


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r:.60} is no whole number above 0")
    return value


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.60} is no finite number")
    return float(value)
