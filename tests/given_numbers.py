"""Two completions of at most three tokens, and a model that answers with the numbers it was given."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tropism.algorithms.base import Algorithm, AlgorithmConfig, RunFacts
from tropism.types import PolicyBatch, RewardBatch, Rollouts, Tokens, length_mask

LENGTHS = torch.tensor([3, 2])
MASK = length_mask(LENGTHS, 3)
OLD = torch.tensor([[-1.0, -0.5, -2.0], [-0.25, -1.5, 0.0]])
REFERENCE = torch.tensor([[-1.5, -0.5, -1.0], [-0.75, -1.0, 0.0]])
"""Log-ratios of ``OLD`` to it: 0.5, 0, -1 in the first row, 0.5, -0.5 in the second."""
RATIOS = [[1.1, 1.5, 0.5], [0.9, 1.0]]
NEW = OLD + torch.tensor([[math.log(r) for r in row] + [0.0] * (3 - len(row)) for row in RATIOS])
"""Log-probs after some updates: ``RATIOS`` is their ratio to ``OLD``."""


@dataclass
class Numbers:
    """A policy, and a ``Scorer``, that knows its answers."""

    answer: Tensor
    """Log-probs."""
    value: Tensor = field(default_factory=lambda: torch.zeros(2, 3))
    after: Tensor = field(default_factory=lambda: torch.zeros(2))
    asked: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **arguments: Any) -> SimpleNamespace:
        self.asked = arguments
        return SimpleNamespace(logprobs=self.answer, values=self.value, entropy=torch.full_like(self.answer, 0.5))

    def logprobs(self, tokens: Tokens, *, temperature: float, filtering: Any = None) -> Tensor:
        return self.answer

    def values(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        return self.value, self.after


def rollouts(*, lengths: Tensor = LENGTHS) -> Rollouts:
    """The first completion was cut, the second ended with eos."""
    return Rollouts(
        prompt_ids=torch.tensor([[5, 6], [0, 7]]),
        prompt_lengths=torch.tensor([2, 1]),
        completion_ids=torch.tensor([[8, 9, 8], [9, 2, 0]]),
        completion_lengths=lengths,
        logprobs=OLD,
        behaviour_logprobs=OLD,
        finish_reasons=("length", "eos"),
    )


def rewards(
    first: float, second: float, *, per_token: Tensor | None = None, scored: tuple[bool, bool] = (True, True)
) -> RewardBatch:
    return RewardBatch(per_completion=torch.tensor([first, second]), per_token=per_token, scored=torch.tensor(scored))


def built(config: AlgorithmConfig) -> Algorithm[Any]:
    """The method for completions of at most four tokens."""
    return config.build(RunFacts(total_steps=10, max_new_tokens=4))


def policy_batch(**columns: Tensor) -> PolicyBatch:
    return PolicyBatch.of(rollouts(), **{"ref_logprobs": REFERENCE, **columns})


def close(found: Tensor, expected: list[list[float]] | list[float] | float) -> None:
    """Equal up to fp32 rounding; missing entries of a shorter row are 0."""
    if isinstance(expected, list) and expected and isinstance(expected[0], list):
        width = found.shape[1]
        expected = [list(row) + [0.0] * (width - len(row)) for row in expected]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def ratio_of(ratios: dict[str, tuple[Tensor, Tensor]], name: str) -> float:
    numerator, denominator = ratios[name]
    return float(numerator) / float(denominator)
