"""The best reward that any policy can have at a KL to the reference: exact, where all completions can be listed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class OptimalPoint:
    """The optimum of E[r] - beta * KL over all policies, mean over the prompts."""

    beta: float
    """What a nat costs."""
    kl: float
    """KL(optimum || reference) in nats."""
    reward: float
    """Expected reward of the optimum."""


def optimal_frontier(
    rewards: Sequence[float] | Sequence[Sequence[float]] | Floats,
    reference_logprobs: Sequence[float] | Sequence[Sequence[float]] | Floats,
    betas: Sequence[float],
) -> list[OptimalPoint]:
    """Reward and KL of the best policy at every price of a nat; no policy lies above the curve through them.

        pi*(y) = pi_ref(y) exp(r(y) / beta) / Z        KL = E_pi*[r] / beta - log Z        Z = E_ref[exp(r / beta)]

    Several prompts share beta, which is the optimum for mean reward at mean KL.

    Args:
        rewards: [Y] of all completions of a prompt, or [P][Y] of several prompts (Y may differ).
        reference_logprobs: the same shape, in nats; the probabilities of each prompt add up to 1.
        betas: each above 0, in the reward's units per nat; small ones lie far from the reference.

    Returns:
        One point per beta, in their order.

    Raises:
        ValueError: the shapes differ, the probabilities of a prompt do not add up to 1, a number is not finite (a
            log-prob may be minus infinity) or a beta is not above 0.
    """
    listed = [_one_prompt(*each) for each in zip(_prompts(rewards), _prompts(reference_logprobs), strict=True)]
    if not listed:
        raise ValueError("there is no prompt, so there is no optimum")
    return [_point(listed, beta) for beta in betas]


def _prompts(values: Sequence[float] | Sequence[Sequence[float]] | Floats) -> list[Floats]:
    """[Y] arrays, one per prompt."""
    nested = len(values) > 0 and np.ndim(values[0]) > 0
    return [np.asarray(each, dtype=np.float64) for each in (values if nested else [values])]


def _one_prompt(rewards: Floats, logprobs: Floats) -> tuple[Floats, Floats]:
    """Both without the completions that the reference never gives."""
    if rewards.ndim != 1 or rewards.shape != logprobs.shape:
        raise ValueError(f"there must be one reward for each log-prob, not {rewards.shape} for {logprobs.shape}")
    total = float(np.exp(logprobs).sum())
    if not math.isclose(total, 1.0, abs_tol=1e-4):
        raise ValueError(f"the probabilities of all completions of a prompt must add up to 1, not to {total:.6g}")
    possible = np.exp(logprobs) > 0
    if not np.isfinite(rewards[possible]).all():
        raise ValueError("a completion that the reference can give has a reward that is not finite")
    return rewards[possible], logprobs[possible]


def _point(listed: Sequence[tuple[Floats, Floats]], beta: float) -> OptimalPoint:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive, not {beta}")
    kls, means = [], []
    for rewards, logprobs in listed:
        tilted = logprobs + rewards / beta
        optimum = tilted - tilted.max()
        optimum -= math.log(float(np.exp(optimum).sum()))
        weights = np.exp(optimum)
        means.append(float(weights @ rewards))
        kls.append(max(0.0, float(weights @ (optimum - logprobs))))
    return OptimalPoint(beta=beta, kl=math.fsum(kls) / len(kls), reward=math.fsum(means) / len(means))
