"""The coefficient of the KL penalty over a run: fixed, or steered toward a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ERROR_LIMIT = 0.2


@dataclass(frozen=True, kw_only=True)
class KLControl:
    """Where the KL penalty enters and how its coefficient moves."""

    place: Literal["reward", "loss"] = "reward"
    """`reward` adds -kl_coef * (logp - ref_logp) to every token, as in lm-human-preferences; `loss` adds k2 to it."""
    target: float | None = None
    """Sequence KL in nats that the coefficient is steered to; None keeps it fixed."""
    horizon: float = 10_000.0
    """Completions over which the coefficient follows a full error."""

    def __post_init__(self) -> None:
        if self.place not in ("reward", "loss"):
            raise ValueError(f"place must be 'reward' or 'loss', not {self.place!r}")
        if self.target is not None and self.target <= 0:
            raise ValueError("target must be positive (nats per completion), or None for a fixed coefficient")
        if self.horizon <= 0:
            raise ValueError("horizon must be positive")

    def next_coefficient(self, coefficient: float, *, sequence_kl: float, samples: int) -> float:
        """The coefficient after a collect.

        beta <- beta * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon)

        Ziegler et al. 2019, https://arxiv.org/abs/1909.08593.

        Args:
            sequence_kl: mean over the collect's completions of sum_t (logp - ref_logp), nats.
            samples: completions of the collect.
        """
        if self.target is None:
            return coefficient
        error = max(-ERROR_LIMIT, min(ERROR_LIMIT, sequence_kl / self.target - 1))
        return coefficient * (1 + error * samples / self.horizon)
