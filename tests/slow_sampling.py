"""Sampling as slowly and plainly as possible: one row, one full forward pass per token, sums in Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from tiny_models import EOS_ID, FAMILIES
from tropism.models.policy import Policy

WORD = 2**64
PURPOSE_NUMBERS = {
    "training": 1,
    "evaluation": 2,
    "checks": 3,
    "generate": 4,
    "targets": 5,
    "dropout": 6,
    "normalisation": 7,
}

# Lengths differ widely; two prompts are equal; two are longer than the sliding windows (4 tokens).
PROMPTS = ((5, 9, 30, 8, 11, 7, 14), (6,), (12, 13), (6,), (20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30), (17, 9, 6))

Choose = Callable[[list[float], int], int]
"""Log-probs of all tokens and the token index -> the chosen token."""


@cache
def policy_of(family: str) -> Policy:
    """One shared tiny policy per family; nobody may change it."""
    return Policy(FAMILIES[family]())


def slow_mix(state: int, word: int) -> int:
    """One step of the documented hash (splitmix64's finaliser), on Python integers."""
    z = ((state ^ word) + 0x9E3779B97F4A7C15) % WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def slow_uniform(seed: int, purpose: str, collect: int, sample: int, token: int) -> float:
    state = 0
    for word in (seed, PURPOSE_NUMBERS[purpose], collect, sample, token):
        state = slow_mix(state, word % WORD)
    return (state >> 11) / 2**53


def slow_draw(weights: Sequence[float], u: float) -> int:
    """The first token at which the running sum of the weights exceeds ``u`` times their total."""
    goal, running = u * math.fsum(weights), 0.0
    for token, weight in enumerate(weights):
        running += weight
        if running > goal and weight > 0:
            return token
    return max(token for token, weight in enumerate(weights) if weight > 0)


def log_softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    scaled = [x / temperature for x in logits]
    top = max(scaled)
    total = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
    return [x - total for x in scaled]


@torch.no_grad()
def own_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """[L, V] what the model itself says of one unpadded row, without a cache."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits.double()


def slow_completion(
    model: Any, prompt: Sequence[int], choose: Choose, *, new: int, temperature: float = 1.0, eos: int | None = EOS_ID
) -> tuple[list[int], list[float]]:
    """Tokens and their log-probs, by a full forward pass over the whole row for each token."""
    ids: list[int] = []
    logprobs: list[float] = []
    while len(ids) < new and (not ids or ids[-1] != eos):
        row = log_softmax(own_logits(model, [*prompt, *ids])[-1].tolist(), temperature)
        token = choose(row, len(ids))
        ids.append(token)
        logprobs.append(row[token])
    return ids, logprobs


def greedy(row: list[float], _: int) -> int:
    return max(range(len(row)), key=row.__getitem__)


def keyed(seed: int, sample: int, purpose: str = "training", collect: int = 0) -> Choose:
    """Chooses by the inverse CDF at the uniform of this sample and token."""

    def choose(row: list[float], index: int) -> int:
        return slow_draw([math.exp(x) for x in row], slow_uniform(seed, purpose, collect, sample, index))

    return choose
