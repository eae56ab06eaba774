"""Value-guided decoding: tokens that are worth more than others are sampled more often."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tropism.errors import ConfigError
from tropism.rollouts.protocol import FilterContext


class ValueGuidance:
    """A logit filter that adds what each token is worth beyond its state.

    log softmax(l) + beta * (min_i target_i(s, a) - V(s))      ILQL, https://arxiv.org/abs/2206.11871

    The logits themselves stand for their log-softmax, from which they differ by one number per row: no token becomes
    more or less likely by it, and ``repetition_penalty`` means what it means without guidance.

    Args:
        beta: 0 changes nothing.
        advantages: [R, H] hidden states -> [R, V].

    Raises:
        ConfigError: beta is negative, or no finite number.
    """

    def __init__(self, beta: float, advantages: Callable[[Tensor], Tensor]) -> None:
        if not 0 <= beta < float("inf"):
            raise ConfigError(f"beta is {beta}; give 0 (off) or a positive number, such as 1")
        self.beta, self.advantages = beta, advantages

    def __call__(self, logits: Tensor, context: FilterContext) -> Tensor:
        return logits + self.beta * self.advantages(context.hidden[:, 0])
