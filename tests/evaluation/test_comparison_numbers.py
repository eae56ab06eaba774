from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tropism.evaluation.comparison_numbers import BINS, measure
from tropism.evaluation.comparison_table import ScoredComparison


def item(scores: Sequence[float], choice: int | None = None, **fields: Any) -> ScoredComparison:
    """A comparison whose completions have the lengths 1, 2, 3, ..., unless they are given."""
    texts = fields.pop("completions", tuple("x" * (place + 1) for place in range(len(scores))))
    return ScoredComparison(prompt="p", completions=texts, scores=tuple(scores), choice=choice, **fields)


def numbers(items: Sequence[ScoredComparison], kind: Any = "choice", **options: Any) -> dict[str, float]:
    result = measure(items, kind, resamples=0, **options)
    return {name: interval.mean for name, interval in result.numbers.items()}


def test_accuracy_and_rules_by_hand() -> None:
    items = [
        item([0.0, 1.0, 2.0], 2),  # right; the longest
        item([3.0, 1.0, 2.0], 2),  # wrong; the longest
        item([5.0, 1.0, 2.0], 0),  # right; the shortest and first
        item([0.0, 1.0], 1),  # right; the longest
    ]
    found = numbers(items)
    assert found["accuracy"] == 3 / 4
    assert found["accuracy_longest"] == 3 / 4
    assert found["accuracy_shortest"] == 1 / 4
    assert found["accuracy_first"] == 1 / 4
    assert found["accuracy_chance"] == pytest.approx((3 * 1 / 3 + 1 / 2) / 4)
    # The place chosen most often is the third, which the last comparison has not: any of its two at random.
    assert found["accuracy_majority"] == pytest.approx((2 + 1 / 2) / 4)


def test_equal_scores_are_worth_no_more_than_chance() -> None:
    """A model that has nothing to say has the accuracy of chance, wherever the choices stand."""
    items = [item([0.5] * 4, choice) for choice in (0, 0, 0, 1)]
    assert numbers(items)["accuracy"] == 1 / 4
    assert numbers([item([2.0, 2.0, 1.0], 0), item([2.0, 2.0, 1.0], 2)])["accuracy"] == 1 / 4


def test_ties_in_the_labels_count_in_the_loss_alone() -> None:
    items = [item([1.0, 0.0], None), item([2.0, 0.0], 0), item([2.0, 0.0], 1)]
    result = measure(items, "choice", resamples=0)
    assert (result.items, result.told) == (3, 2)
    assert result.numbers["accuracy"].mean == 1 / 2
    tied = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    wanted = (tied + math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 3
    assert result.numbers["loss"].mean == pytest.approx(wanted)
    assert result.pair_curve is not None and result.pair_curve.count == 2


def test_where_the_choice_always_stands_in_one_place_the_rules_of_places_are_left_out() -> None:
    """Data of chosen and rejected texts puts the chosen one first; that it does says nothing."""
    found = numbers([item([1.0, 0.0], 0), item([0.0, 1.0], 0)])
    assert found["accuracy"] == 1 / 2
    assert not {"accuracy_first", "accuracy_majority"} & set(found)


def test_the_loss_is_weighted_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    rows = [(rng.normal(size=4), int(rng.integers(4)), float(rng.uniform(0.5, 2))) for _ in range(20)]
    items = [item(scores.tolist(), choice, weight=weight) for scores, choice, weight in rows]
    losses = cross_entropy(
        torch.tensor(np.array([row[0] for row in rows])), torch.tensor([row[1] for row in rows]), reduction="none"
    )
    weights = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    assert numbers(items)["loss"] == pytest.approx(float((losses * weights).sum() / weights.sum()))


def test_comparisons_of_fewer_completions_count_those_alone() -> None:
    """All scores are -3, so that an empty place would be the best."""
    result = measure([item([-3.0] * 3, 1), item([-3.0] * 2, 1)], "choice", resamples=0)
    assert result.numbers["loss"].mean == pytest.approx((math.log(3) + math.log(2)) / 2)
    assert result.numbers["accuracy"].mean == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert result.pair_curve is not None and result.pair_curve.count == 3


def test_huge_scores_are_no_trouble() -> None:
    found = numbers([item([1e4, -1e4], 0), item([1e4, -1e4], 1)])
    assert found["loss"] == 1e4
    assert found["calibration_error"] == 1 / 2


def test_pairs_of_clearly_different_ratings() -> None:
    items = [
        item([0.0, 1.0, 2.0], 2, ratings=(1.4, 0.9, 2.0)),  # (0, 1) differ by 0.5, but for the last bit: wrong
        item([1.0, 1.0], 1, ratings=(0.0, 3.0)),  # equal scores
        item([1.0, 0.0], 0, ratings=(0.4, 0.0)),  # too close
        item([1.0, 0.0], 0),  # nobody rated them
    ]
    result = measure(items, "choice", resamples=0)
    assert 1.4 - 0.9 < 0.5
    assert result.pairs == 4 and result.numbers["pairs"].mean == 4
    assert result.numbers["pair_accuracy"].mean == pytest.approx((2 + 0.5) / 4)  # (2, 0) and (2, 1) are right
    assert result.numbers["pair_accuracy_longest"].mean == pytest.approx(3 / 4)
    assert measure(items, "choice", rating_gap=0.4, resamples=0).pairs == 5
    assert "pairs" not in numbers(items, rating_gap=9.0)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_a_calibrated_model_is_on_the_diagonal_and_one_that_is_too_sure_is_not() -> None:
    """Of 100 pairs the model calls each one 0.83 likely. 83 come true, or only 53."""
    for won, error in ((83, 0.0), (53, 0.3)):
        items = [item([logit(0.83), 0.0], 0 if number < won else 1) for number in range(100)]
        result = measure(items, "choice", resamples=500)
        assert result.pair_curve is not None
        (one,) = (one for one in result.pair_curve.bins if one.count)
        assert (one.low, one.high, one.count) == (0.8, 0.85, 100)
        assert one.predicted == pytest.approx(0.83) and one.observed.mean == pytest.approx(won / 100)
        assert result.numbers["calibration_error"].mean == pytest.approx(error)
        assert result.numbers["overconfidence"].includes(0) == (error == 0)
        # sqrt(2 / pi) deviations of the mean of 100 draws
        assert result.pair_curve.by_chance == pytest.approx(0.7979 * 0.0376, abs=1e-4)


def test_each_pair_is_seen_from_the_higher_score_once() -> None:
    result = measure([item([3.0, 0.0, 1.0], 2)], "choice", resamples=0)
    assert result.pair_curve is not None and result.best_curve is not None
    found = [(one.predicted, one.observed.mean) for one in result.pair_curve.bins if one.count]
    assert found == [pytest.approx((1 / (1 + math.exp(-1)), 1.0)), pytest.approx((1 / (1 + math.exp(-2)), 0.0))]
    (best,) = (one for one in result.best_curve.bins if one.count)
    assert best.predicted == pytest.approx(math.exp(3) / (math.exp(3) + 1 + math.exp(1))) and best.observed.mean == 0
    assert measure([item([3.0, 0.0], 0)], "choice", resamples=0).best_curve is None


def test_sampled_choices_are_calibrated_in_every_bin() -> None:
    """Choices drawn from the softmax of the scores: pairs of the chosen with each other are calibrated, too."""
    rng = np.random.default_rng(1)
    scores = rng.normal(0, 1.5, size=(4000, 4))
    choices = (scores + rng.gumbel(size=scores.shape)).argmax(1)
    items = [item(row.tolist(), int(choice)) for row, choice in zip(scores, choices, strict=True)]
    result = measure(items, "choice", resamples=200)
    assert result.pair_curve is not None and result.best_curve is not None
    assert result.pair_curve.count == 3 * 4000 and result.best_curve.count == 4000
    for curve in (result.pair_curve, result.best_curve):
        assert len(curve.bins) == BINS
        assert curve.error < 3 * curve.by_chance < 0.05
    assert result.numbers["overconfidence"].includes(0)


def test_ratings_by_hand() -> None:
    """Scores 1, 2, 3, 4 of ratings 1, 4, 9, 16; lengths fall."""
    texts = [("xxxx",), ("xxx",), ("xx",), ("x",)]
    items = [
        item([float(n)], target=float(n * n), completions=text) for n, text in zip((1, 2, 3, 4), texts, strict=True)
    ]
    found = numbers(items, "rating")
    assert found["loss"] == (0 + 4 + 36 + 144) / 4
    assert found["label_mean"] == 7.5 and found["label_variance"] == pytest.approx(32.25)
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 4, 9, 16])[0, 1])
    assert found["pearson_length"] == pytest.approx(-found["pearson"])
    assert not {"accuracy", "calibration_error"} & set(found)


def test_ratings_that_are_all_alike_have_no_correlation() -> None:
    assert set(numbers([item([1.0], target=2.0), item([3.0], target=2.0)], "rating")) == {
        *("loss", "label_mean", "label_variance"),
    }


def test_differences_by_hand() -> None:
    items = [
        item([0.0, 2.0], target=1.0),  # right: the second; the longer
        item([2.0, 1.0], target=0.5),  # wrong
        item([1.0, 0.0], target=-2.0),  # right: the first
        item([1.0, 0.0], target=0.0),  # neither
    ]
    result = measure(items, "difference", resamples=0)
    found = {name: interval.mean for name, interval in result.numbers.items()}
    assert result.told == 3 and result.pair_curve is None
    assert found["accuracy"] == pytest.approx(2 / 3) and found["accuracy_longest"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx((1 + 2.25 + 1 + 1) / 4)
    assert found["pearson"] == pytest.approx(np.corrcoef([2, -1, -1, -1], [1, 0.5, -2, 0])[0, 1])


def test_intervals_resample_comparisons_and_not_their_pairs() -> None:
    """Every comparison is all right or all wrong on its six pairs, so that pairs are worth no more than comparisons."""
    ratings = (4.0, 3.0, 2.0, 1.0)
    right, wrong = item([4.0, 3.0, 2.0, 1.0], 0, ratings=ratings), item([1.0, 2.0, 3.0, 4.0], 0, ratings=ratings)
    result = measure([right] * 50 + [wrong] * 50, "choice", resamples=2000)
    accuracy, pairs = result.numbers["accuracy"], result.numbers["pair_accuracy"]
    assert result.pairs == 600 and pairs.mean == 0.5
    for one in (accuracy, pairs):
        assert one.high - one.low == pytest.approx(2 * 1.98 * 0.05, rel=0.1)  # of 100 draws, not of 600
    again = measure([right] * 50 + [wrong] * 50, "choice", resamples=2000)
    assert again.numbers == result.numbers


def test_the_lead_over_a_rule_is_paired() -> None:
    """The model is right wherever the rule is, and in ten more of a hundred."""
    items = [item([0.0, 1.0], 1)] * 45 + [item([1.0, 0.0], 0)] * 10 + [item([0.0, 1.0], 0)] * 45
    result = measure(items, "choice")
    assert result.numbers["accuracy"].mean == 0.55 and result.numbers["accuracy_longest"].mean == 0.45
    lead = result.leads["accuracy_longest"]
    assert lead.mean == pytest.approx(0.1) and lead.low > 0.03  # unpaired, it would reach below 0
    assert result.numbers["accuracy"].low <= 0.45
