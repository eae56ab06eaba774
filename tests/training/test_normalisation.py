"""The scale of a reward model: the source's numbers, deviations by hand, and what has no scale."""

from __future__ import annotations

import math

import pytest
import torch

from tropism.errors import ConfigError, NumericsError
from tropism.training.normalisation import Normalisation, Scale, measured, rescaling, target_scale

NORMAL = Scale(mean=0.0, std=1.0)


def test_the_source_s_golden_numbers() -> None:
    """Scores of mean 1.5 and deviation 2.5, to mean 0 and deviation 1."""
    assert rescaling(Scale(mean=1.5, std=2.5), NORMAL) == pytest.approx((0.4, -0.6))
    # By hand: 2 / 0.5 = 4, and 3 - 4 * -1 = 7.
    assert rescaling(Scale(mean=-1.0, std=0.5), Scale(mean=3.0, std=2.0)) == pytest.approx((4.0, 7.0))


def test_the_deviation_is_that_of_the_population() -> None:
    """sqrt(E s^2 - (E s)^2): of 1, 2, 3, 6 the mean is 3, the mean square 12.5, the deviation sqrt(3.5)."""
    found = measured(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert found.mean == pytest.approx(3.0) and found.std == pytest.approx(math.sqrt(3.5))


def test_a_small_deviation_around_a_large_mean_is_not_lost() -> None:
    """In fp32 the squares of such numbers differ by less than their rounding."""
    assert measured(torch.tensor([4096.0, 4096.5, 4097.0, 4096.5])).std == pytest.approx(math.sqrt(0.125), rel=1e-6)


def test_scores_that_are_rescaled_have_the_wanted_scale() -> None:
    scores = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3 + 7
    gain, bias = rescaling(measured(scores), Scale(mean=0.25, std=1.5))
    again = [gain * score + bias for score in scores.tolist()]
    mean = sum(again) / len(again)
    assert mean == pytest.approx(0.25, abs=1e-5)
    assert math.sqrt(sum((score - mean) ** 2 for score in again) / len(again)) == pytest.approx(1.5, rel=1e-5)


def test_the_scale_before_training_is_that_of_what_people_said() -> None:
    assert target_scale("choice", [0.0, 0.0]) == NORMAL
    ratings = target_scale("rating", [1.0, 2.0, 3.0, 6.0])
    assert (ratings.mean, ratings.std) == pytest.approx((3.0, math.sqrt(3.5)))
    # Half of each difference: 0.5, 1, 1.5, 3.
    differences = target_scale("difference", [1.0, 2.0, 3.0, 6.0])
    assert (differences.mean, differences.std) == pytest.approx((1.5, math.sqrt(3.5) / 2))


@pytest.mark.parametrize("score", [0.0, 0.1, -7.3, 1e6])
def test_scores_that_do_not_differ_have_no_scale(score: float) -> None:
    with pytest.raises(
        NumericsError, match=r"gives every sample the score .* no scale to put it on; sample with a higher"
    ):
        rescaling(measured(torch.full((7,), score)), NORMAL)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(NumericsError, match="a score of the reward model is not finite"):
        measured(torch.tensor([1.0, bad, 2.0]))


@pytest.mark.parametrize("kind", ["rating", "difference"])
def test_targets_without_a_scale_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"all {kind}s to train on are 0\.1, .* set normalise.before to false"):
        target_scale(kind, [0.1] * 7)  # of which the mean is another number, by rounding
    with pytest.raises(ConfigError, match=f"one of the {kind}s is no finite number"):
        target_scale(kind, [0.1, math.nan, 3.0])


def test_settings_that_cannot_work() -> None:
    for settings, message in (
        ({"samples": 1}, "normalise.samples is 1; a deviation needs at least 2"),
        ({"check": 1}, "normalise.check is 1; give 0 for none"),
        ({"check": -1}, "normalise.check is -1"),
        ({"before": False, "after": False}, "neither before nor after"),
    ):
        with pytest.raises(ConfigError, match=message):
            Normalisation(**settings)
