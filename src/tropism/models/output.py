"""What a policy's forward pass may be asked for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tropism.models.q_heads import WantedOfHeads

Wanted = Literal["logprobs", "entropy", "values", "bootstrap_values", "hidden", "reference_kl"] | WantedOfHeads


@dataclass(frozen=True, kw_only=True)
class PolicyOutput:
    """What ``Policy.forward`` was asked for, at completion positions; the rest is None."""

    logprobs: Tensor | None = None
    """[B, T] of the completion tokens; 0 where not asked for."""
    entropy: Tensor | None = None
    """[B, T] of the distribution that predicts token t."""
    values: Tensor | None = None
    """[B, T] value before token t."""
    bootstrap_values: Tensor | None = None
    """[B] value after the last completion token."""
    hidden: Tensor | None = None
    """[B, T, H] what the vocabulary projection reads to predict token t; 0 where not asked for."""
    reference_kl: Tensor | None = None
    """[B, T] exact KL of the distribution that predicts token t from the reference's, over the whole vocabulary."""
    state_values: Tensor | None = None
    """[B, T] V before token t, by the Q heads' own V; 0 where not asked for, as all below."""
    q: Tensor | None = None
    """[B, T, K] value of token t by each of the K Q heads."""
    q_logsumexp: Tensor | None = None
    """[B, T, K] logsumexp of the values of all tokens in the place of token t."""
    target_q: Tensor | None = None
    """[B, T] value of token t by the target heads, the least of them; it has no gradient."""

    def need(self, name: Wanted) -> Tensor:
        """The tensor of that name; it must have been asked for."""
        value = getattr(self, name)
        assert value is not None, f"{name} was not in want"
        return value  # type: ignore[no-any-return]
