"""Metrics against numbers worked out by hand, and how often their intervals hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tropism.toxicity.metrics import changes, per_prompt, toxicity_metrics

SCORES = np.array([[0.1, 0.6, 0.3], [0.4, 0.2, 0.4], [0.5, 0.9, 0.1]])
"""Three prompts with three completions each."""


def mean(interval: object) -> float:
    return float(interval.mean)  # type: ignore[attr-defined]


def test_metrics_equal_numbers_by_hand() -> None:
    metrics = toxicity_metrics(SCORES, threshold=0.5, prompt_scores=np.array([0.2, 0.3, 0.7]))
    assert mean(metrics.toxicity_probability) == pytest.approx(2 / 3)  # the second prompt never reaches 0.5
    assert mean(metrics.expected_max_toxicity) == pytest.approx((0.6 + 0.4 + 0.9) / 3)
    assert mean(metrics.mean_toxicity) == pytest.approx((1.0 + 1.0 + 1.5) / 9)
    assert mean(metrics.toxic_share) == pytest.approx(3 / 9)
    assert mean(metrics.prompt_score) == pytest.approx(0.4)
    assert (metrics.prompts, metrics.completions, metrics.unscored) == (3, 9, 0)


def test_the_threshold_itself_is_toxic() -> None:
    assert per_prompt(np.array([[0.5], [0.49]]), threshold=0.5)["toxicity_probability"].tolist() == [1.0, 0.0]


def test_what_has_no_score_is_left_out_and_counted() -> None:
    scores = np.array([[0.8, math.nan], [math.nan, math.nan], [0.2, 0.4]])
    metrics = toxicity_metrics(scores, threshold=0.5)
    assert metrics.unscored == 3
    assert mean(metrics.toxicity_probability) == pytest.approx(1 / 2)
    assert mean(metrics.mean_toxicity) == pytest.approx((0.8 + 0.3) / 2)
    assert metrics.prompt_score is None
    nothing = toxicity_metrics(np.full((2, 2), math.nan), threshold=0.5)
    assert nothing.mean_toxicity is None and nothing.unscored == 4


def test_one_completion_each() -> None:
    metrics = toxicity_metrics(np.array([[0.1], [0.7]]), threshold=0.5)
    assert mean(metrics.toxicity_probability) == mean(metrics.toxic_share) == 0.5
    assert mean(metrics.expected_max_toxicity) == mean(metrics.mean_toxicity) == pytest.approx(0.4)


def test_a_change_is_paired() -> None:
    """What prompts differ by among themselves cancels out: each changed by exactly 0.1."""
    base = per_prompt(np.array([[0.9], [0.2], [0.5], [0.3]]), threshold=0.6)
    tuned = per_prompt(np.array([[0.8], [0.1], [0.4], [0.2]]), threshold=0.6)
    change = changes(base, tuned)["mean_toxicity"]
    assert change is not None
    assert (change.mean, change.low, change.high) == pytest.approx((-0.1, -0.1, -0.1))
    assert changes(base, tuned)["prompt_score"] is None


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="prompts, completions"):
        per_prompt(np.array([0.1, 0.2]), threshold=0.5)
    with pytest.raises(ValueError, match="2 prompts"):
        per_prompt(np.ones((2, 3)), threshold=0.5, prompt_scores=np.ones(3))


def test_intervals_cover_the_truth_in_2000_draws() -> None:
    """Completions of a prompt are alike: s = (u + v) / 2, with u of the prompt and v of the completion, both uniform.

    The truth by hand: E[s] = 1/2; E[max of 3] = 1/4 + 3/8 = 5/8; P(any of 3 >= 0.7) = 1 - E[P(v < 1.4 - u)^3]
    = 1 - (0.4 + (1 - 0.4^4) / 4) = 0.3564; and the share from 0.7 on is P(u + v >= 1.4) = 0.6^2 / 2 = 0.18.
    """
    truth = {
        "toxicity_probability": 0.3564,
        "expected_max_toxicity": 0.625,
        "mean_toxicity": 0.5,
        "toxic_share": 0.18,
    }
    generator = np.random.default_rng(11)
    draws, prompts = 2000, 60
    covered = dict.fromkeys(truth, 0)
    for _ in range(draws):
        scores = (generator.random((prompts, 1)) + generator.random((prompts, 3))) / 2
        metrics = toxicity_metrics(scores, threshold=0.7, resamples=400)
        for name, value in truth.items():
            covered[name] += getattr(metrics, name).includes(value)
    for name, count in covered.items():
        assert abs(count / draws - 0.95) < 0.02, (name, count / draws)
