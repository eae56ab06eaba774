from __future__ import annotations

import math

import pytest
import torch

from given_numbers import OLD, rollouts
from tropism.training.config import TrainerConfig
from tropism.training.correction import sampling_correction

RATIOS = torch.tensor([[0.5, 4.0, 1.0], [1.5, 0.2, 1.0]])
SAMPLED = OLD - RATIOS.log()
"""``RATIOS`` of probabilities, training forward to sampling; the last entry is padding."""


def test_numbers_and_weights_per_token() -> None:
    metrics, weights = sampling_correction(rollouts(), SAMPLED, action="token", cap=2.0)
    logs = [math.log(2), math.log(4), 0.0, math.log(1.5), math.log(5)]
    assert metrics == pytest.approx(
        {
            "rollout/logprob_mismatch": sum(logs) / 5,
            "rollout/effective_sample_size": 7.2**2 / (5 * (0.25 + 16 + 1 + 2.25 + 0.04)),
            "rollout/capped_fraction": 1 / 5,
        },
        rel=1e-5,
    )
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([[0.5, 2.0, 1.0], [1.5, 0.2, 0.0]]), rtol=1e-5, atol=0)


def test_numbers_and_weights_per_completion() -> None:
    metrics, weights = sampling_correction(rollouts(), SAMPLED, action="sequence", cap=1.5)
    assert metrics["rollout/sequence_effective_sample_size"] == pytest.approx(2.3**2 / (2 * (4 + 0.09)), rel=1e-5)
    assert metrics["rollout/capped_fraction"] == pytest.approx(3 / 5)
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([[1.5] * 3, [0.3, 0.3, 0.0]]), rtol=1e-5, atol=0)


def test_empty_completions_count_for_nothing() -> None:
    empty = rollouts(lengths=torch.tensor([0, 2]))
    metrics, _ = sampling_correction(empty, SAMPLED, action="sequence", cap=None)
    assert metrics["rollout/sequence_effective_sample_size"] == pytest.approx(1.0)
    assert metrics["rollout/logprob_mismatch"] == pytest.approx((math.log(1.5) + math.log(5)) / 2)
    nothing, _ = sampling_correction(rollouts(lengths=torch.tensor([0, 0])), SAMPLED, action="sequence", cap=2.0)
    assert nothing["rollout/effective_sample_size"] == nothing["rollout/sequence_effective_sample_size"] == 1.0


def test_without_a_cap_there_are_no_weights_and_equal_logprobs_lose_nothing() -> None:
    metrics, weights = sampling_correction(rollouts(), OLD, action="token", cap=None)
    assert weights is None
    assert metrics == {"rollout/logprob_mismatch": 0.0, "rollout/effective_sample_size": 1.0}


@pytest.mark.parametrize(
    ("recompute", "cap", "exact", "expected"),
    [
        (None, "auto", True, (False, None)),
        (None, "auto", False, (True, 2.0)),
        (True, "auto", True, (True, None)),
        (False, "auto", False, (False, None)),
        (None, None, False, (True, None)),
        (None, 3.0, True, (True, 3.0)),
        (None, 3.0, False, (True, 3.0)),
        (True, None, False, (True, None)),
    ],
)
def test_what_is_done_by_precision_and_settings(
    recompute: bool | None, cap: object, exact: bool, expected: tuple[bool, float | None]
) -> None:
    config = TrainerConfig(recompute_logprobs=recompute, importance_cap=cap)  # type: ignore[arg-type]
    assert config.correction(exact=exact) == expected


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="importance_cap must be at least 1"):
        TrainerConfig(importance_cap=0.5)
    with pytest.raises(ValueError, match="importance_cap needs recomputed log-probs"):
        TrainerConfig(importance_cap=2.0, recompute_logprobs=False)
