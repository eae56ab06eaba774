"""Guidance by rewards: what the model makes of a target, exaggerated."""

from __future__ import annotations

import math

from torch import Tensor

from tropism.errors import ConfigError
from tropism.rollouts.protocol import FilterContext


class RewardGuidance:
    """A logit filter that pushes away from what a second stream would say.

    l + strength * (l - l_other)      classifier-free guidance, https://arxiv.org/abs/2306.17806

    The first stream of a row is asked for the wanted target, the second for a low one, or none; both see the same
    tokens.

    Args:
        strength: 0 changes nothing.

    Raises:
        ConfigError: it is negative, or no finite number.
    """

    def __init__(self, strength: float) -> None:
        if not 0 <= strength < math.inf:
            raise ConfigError(f"guidance is {strength}; give 0 (off) or a positive strength, such as 1")
        self.strength = strength

    def __call__(self, logits: Tensor, context: FilterContext) -> Tensor:
        asked, other = context.stream_logits[:, 0], context.stream_logits[:, 1]
        return logits + self.strength * (asked - other)
