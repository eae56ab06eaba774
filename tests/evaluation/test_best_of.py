"""The best of n: its expectation and its distribution against exact enumeration, and the bound of its KL."""

from __future__ import annotations

import itertools
import math
import random
from statistics import fmean

import numpy as np
import pytest

from enumerable_task import REWARD, SEQUENCES, model, sequence_logprobs
from tropism.evaluation.best_of import best_of_kl, best_of_probabilities, best_of_table, expected_best, kl_divergence

REWARDS = [0.3, -1.0, 2.0, 0.3, 5.0, -0.5, 1.5]


@pytest.mark.parametrize("n", range(1, 8))
def test_the_estimate_is_the_mean_over_all_subsets(n: int) -> None:
    expected = fmean(max(subset) for subset in itertools.combinations(REWARDS, n))
    assert expected_best(REWARDS, n) == pytest.approx(expected, abs=1e-12)


def test_one_is_the_mean_and_all_is_the_highest() -> None:
    assert expected_best([1.0, 2.0, 6.0], 1) == pytest.approx(3.0)
    assert expected_best([1.0, 2.0, 6.0], 2) == pytest.approx((2.0 + 6.0 + 6.0) / 3)
    assert expected_best([1.0, 2.0, 6.0], 3) == 6.0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_estimate_has_no_bias(n: int) -> None:
    """Over every possible draw of N = 4 from three outcomes it is the exact expectation on average."""
    values, probabilities = [0.0, 1.0, 3.0], [0.5, 0.3, 0.2]
    mean = 0.0
    for drawn in itertools.product(range(3), repeat=4):
        weight = math.prod(probabilities[i] for i in drawn)
        mean += weight * expected_best([values[i] for i in drawn], n)
    exact = sum(
        math.prod(probabilities[i] for i in drawn) * max(values[i] for i in drawn)
        for drawn in itertools.product(range(3), repeat=n)
    )
    assert mean == pytest.approx(exact, abs=1e-12)


def test_many_completions_do_not_overflow() -> None:
    rewards = np.linspace(0.0, 1.0, 3000)
    # The mean of the highest of n of the numbers 1 .. N, without replacement, is n (N + 1) / (n + 1).
    expected = (1500 * 3001 / 1501 - 1) / 2999
    assert expected_best(rewards, 1500) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [0, 4])
def test_a_size_that_cannot_be_told_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"best of {n} cannot be told from 3"):
        expected_best([1.0, 2.0, 3.0], n)


def test_the_table_means_over_prompts_and_leaves_unscored_completions_out() -> None:
    nan = math.nan
    rewards = [[0.0, 1.0, 2.0, 3.0], [4.0, nan, 4.0, 7.0], [nan, nan, nan, 1.0]]
    one, two, three = best_of_table(rewards, [1, 2, 3])
    assert [row.prompts for row in (one, two, three)] == [3, 2, 2]
    assert one.reward.mean == pytest.approx((1.5 + 5.0 + 1.0) / 3)
    assert two.reward.mean == pytest.approx(((1 + 2 + 3 + 2 + 3 + 3) / 6 + (4 + 7 + 7) / 3) / 2)
    assert three.reward.mean == pytest.approx(((2 + 3 + 3 + 3) / 4 + 7.0) / 2)
    assert one.kl == 0.0 and two.kl == pytest.approx(math.log(2) - 0.5)
    assert one.reward.low <= one.reward.mean <= one.reward.high
    with pytest.raises(ValueError, match="needs 5 scored completions of a prompt, and no prompt has over 4"):
        best_of_table(rewards, [5])


def slow_distribution(probabilities: list[float], rewards: list[float], n: int) -> list[float]:
    """By every n-tuple of outcomes; the first of those with the highest reward is the best."""
    result = [0.0] * len(probabilities)
    for drawn in itertools.product(range(len(probabilities)), repeat=n):
        best = max(drawn, key=lambda outcome: rewards[outcome])
        result[best] += math.prod(probabilities[outcome] for outcome in drawn)
    return result


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_exact_distribution_against_every_tuple(n: int) -> None:
    probabilities, rewards = [0.1, 0.35, 0.05, 0.3, 0.2], [1.0, 0.0, 2.0, 1.0, 0.0]
    found = best_of_probabilities(probabilities, rewards, n)
    assert found == pytest.approx(slow_distribution(probabilities, rewards, n), abs=1e-12)


def test_two_arms() -> None:
    for n in (1, 2, 8):
        better, worse = best_of_probabilities([0.2, 0.8], [1.0, 0.0], n)
        assert better == pytest.approx(1 - 0.8**n) and worse == pytest.approx(0.8**n)
    assert best_of_probabilities([0.0, 1.0], [1.0, 0.0], 4) == [0.0, 1.0]


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_the_formula_is_an_upper_bound_of_the_exact_kl(n: int) -> None:
    """A policy whose 40 completions can be enumerated, one in which rewards tie, and one where the bound is reached."""
    drawn = random.Random(n)
    base = [math.exp(logprob) for logprob in sequence_logprobs(model())]
    base = [probability / sum(base) for probability in base]
    best = best_of_probabilities(base, [REWARD[ids] for ids in SEQUENCES], n)
    assert -1e-12 <= kl_divergence(best, base) <= best_of_kl(n) + 1e-9
    tied = best_of_probabilities(base, [float(drawn.random() < 0.3) for _ in SEQUENCES], n)
    assert kl_divergence(tied, base) <= best_of_kl(n) + 1e-9
    fine = [1 / 20_000] * 20_000
    exact = kl_divergence(best_of_probabilities(fine, list(range(20_000)), n), fine)
    assert exact == pytest.approx(best_of_kl(n), abs=1e-3)
    assert exact <= best_of_kl(n) + 1e-9


def test_what_is_no_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        best_of_probabilities([0.5, 0.6], [0.0, 1.0], 2)
    with pytest.raises(ValueError, match="one reward for each"):
        best_of_probabilities([0.5, 0.5], [0.0], 2)
    with pytest.raises(ValueError, match="at least 1"):
        best_of_probabilities([0.5, 0.5], [0.0, 1.0], 0)
    with pytest.raises(ValueError, match="at least 1"):
        best_of_kl(0)
    with pytest.raises(ValueError, match="infinite"):
        kl_divergence([0.5, 0.5], [1.0, 0.0])
