"""Held-out losses against hand numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tropism.algorithms.conditioned import WeightedBatch
from tropism.data.demonstrations import Demonstration, collate_demonstrations
from tropism.evaluation.heldout import LossEvaluation

TEXTS = [
    Demonstration(prompt_ids=(1,), completion_ids=(2, 3), loss_mask=(True, True)),
    Demonstration(prompt_ids=(1,), completion_ids=(4,), loss_mask=(True,)),
]


class Fixed:
    """Log-probs -1 -2 of the first text, and -4 of the second."""

    def logprobs(self, tokens: Any, *, temperature: float, filtering: Any = None) -> Tensor:
        return torch.tensor([[-1.0, -2.0], [-4.0, -100.0]])


def weighted(texts: Sequence[Demonstration]) -> WeightedBatch:
    weights = torch.tensor([[0.25, 1.0], [0.5, 0.0]])
    return WeightedBatch(**{**vars(collate_demonstrations(texts)), "loss_mask": weights > 0, "token_weights": weights})


def test_the_loss_is_per_learned_token() -> None:
    scorer: Any = Fixed()
    metrics, _ = LossEvaluation(TEXTS, collate=collate_demonstrations, scorer=scorer)(0)
    assert metrics == {"eval/loss": pytest.approx(7 / 3)}


def test_tokens_weigh_what_they_weigh_in_training() -> None:
    scorer: Any = Fixed()
    metrics, _ = LossEvaluation(TEXTS, collate=weighted, scorer=scorer)(0)
    assert metrics["eval/loss"] == pytest.approx((0.25 * 1 + 2 + 0.5 * 4) / 1.75)
    assert math.isfinite(metrics["eval/loss"])
