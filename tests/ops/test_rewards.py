"""Rewards per token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from tropism.ops import penalised_rewards, score_at_last_token


def test_penalised_rewards_by_hand() -> None:
    rewards = tensor([[0.0, 1.0, 7.0], [2.0, math.nan, 0.0]])
    kl = tensor([[0.5, -1.0, math.inf], [1.0, 0.0, math.nan]])
    mask = tensor([[True, True, False], [True, False, False]])
    found = penalised_rewards(rewards, kl, mask, kl_coef=0.5)
    assert found.tolist() == [[-0.25, 1.5, 0.0], [1.5, 0.0, 0.0]]


def test_rewards_of_openai_example() -> None:
    # A penalty of 0.1 per nat and a score of 1 at the last of three tokens.
    score = score_at_last_token(tensor([1.0]), tensor([3]), 3)
    found = penalised_rewards(score, tensor([[0.0, 1.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool), kl_coef=0.1)
    torch.testing.assert_close(found, tensor([[0.0, -0.1, 0.8]]))


def test_score_stands_at_the_last_real_token() -> None:
    found = score_at_last_token(tensor([1.0, math.nan, 3.0, 4.0]), tensor([2, 0, 3, 1]), 3)
    assert found.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 3.0], [4.0, 0.0, 0.0]]
    assert score_at_last_token(tensor([1.0]), tensor([0]), 0).shape == (1, 0)
    assert score_at_last_token(torch.empty(0), torch.empty(0, dtype=torch.long), 3).shape == (0, 3)


def test_half_precision_scores_become_fp32() -> None:
    assert score_at_last_token(torch.ones(1, dtype=torch.bfloat16), tensor([1]), 2).dtype == torch.float32


def test_refusals() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"token_rewards \[2, 3\], kl \[2, 1\]"):
        penalised_rewards(torch.zeros(2, 3), torch.zeros(2, 1), mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"token_rewards \[3\]"):
        penalised_rewards(torch.zeros(3), torch.zeros(3), mask[0], kl_coef=0.1)
    with pytest.raises(ValueError, match=r"mask \[2, 3\] must be bool"):
        penalised_rewards(torch.zeros(2, 3), torch.zeros(2, 3), mask.float(), kl_coef=0.1)
    with pytest.raises(ValueError, match=r"scores \[2, 1\], lengths \[2\]"):
        score_at_last_token(torch.zeros(2, 1), tensor([1, 1]), 3)
    with pytest.raises(ValueError, match=r"scores \[1\], lengths \[2\]"):
        score_at_last_token(torch.zeros(1), tensor([1, 1]), 3)
    for lengths in ([1, 4], [-1, 1]):
        with pytest.raises(ValueError, match="between 0 and width 3"):
            score_at_last_token(torch.zeros(2), tensor(lengths), 3)
    with pytest.raises(ValueError, match=r"integers, not torch\.float32"):
        score_at_last_token(torch.zeros(2), torch.ones(2), 3)
