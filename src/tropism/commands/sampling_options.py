"""Options of every command that samples from a model."""

from __future__ import annotations

from dataclasses import dataclass

import tyro


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How completions are sampled, and what a model that was told rewards is asked for."""

    target_reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to ask a reward-conditioned model for: a number, or NAME=NUMBER for each of its rewards."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the most likely token's probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were there already less likely."""
    beta: float = 0.0
    """Of a model with Q heads (ilql): how much the advantage of each token adds to its logit; 0 is off."""
    allowed_tokens: str | None = None
    """A JSON file {token: [tokens that may follow it]}; no other token is sampled."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion."""
    compile: bool = False
    """Decode on the CPU in fp32 with kernels that the machine's C compiler builds at first use; faster."""
    seed: int = 0
    """Equal seeds give equal completions."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
