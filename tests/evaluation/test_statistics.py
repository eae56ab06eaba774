from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tropism.evaluation.statistics import Interval, bootstrap_interval, paired_difference, student_quantile


def test_mean_and_bounds_of_a_known_resampling_distribution() -> None:
    """All 3^3 resamples of [0, 0, 3] by enumeration: cut at Student's level it reaches both ends."""
    means = sorted(sum(rows) / 3 for rows in itertools.product([0.0, 0.0, 3.0], repeat=3))
    interval = bootstrap_interval([0.0, 0.0, 3.0], confidence=0.95)
    assert interval == Interval(1.0, means[0], means[-1])


@pytest.mark.parametrize(("degrees", "tabulated"), [(3, 3.182), (4, 2.776), (9, 2.262), (29, 2.045)])
def teststudent_quantile_against_the_printed_table(degrees: int, tabulated: float) -> None:
    assert student_quantile(1.959964, degrees) == pytest.approx(tabulated, rel=0.01)


def test_large_sample_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, 2000)
    interval = bootstrap_interval(values, seed=1, resamples=4000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(2000)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.012)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.012)


@pytest.mark.parametrize(("count", "skewed"), [(10, False), (30, False), (30, True)])
def test_coverage_over_repeated_experiments(count: int, skewed: bool) -> None:
    """The true mean (1) lies in 95 % intervals about 95 % of the time; skew costs some of it."""
    rng = np.random.default_rng(2)
    trials, hits = 400, 0
    for _ in range(trials):
        values = rng.exponential(1.0, count) if skewed else rng.normal(1.0, 1.0, count)
        hits += bootstrap_interval(values, resamples=800).includes(1.0)
    assert (0.88 if skewed else 0.92) <= hits / trials <= 0.985


def test_paired_interval_ignores_what_the_prompts_differ_by() -> None:
    rng = np.random.default_rng(3)
    prompts = rng.normal(0, 10.0, 50)
    after = prompts + 0.5 + rng.normal(0, 0.1, 50)
    change = paired_difference(prompts, after)
    assert change.mean == pytest.approx(float(after.mean() - prompts.mean()))
    assert 0.4 < change.low < 0.5 < change.high < 0.6


def test_unscored_values_are_left_out_pairwise() -> None:
    nan = math.nan
    change = paired_difference([1.0, nan, 3.0, 5.0], [2.0, 9.0, nan, 8.0])
    assert change.mean == pytest.approx(2.0)
    assert bootstrap_interval([1.0, nan, 3.0]).mean == pytest.approx(2.0)


def test_one_value_has_a_mean_and_no_interval() -> None:
    interval = bootstrap_interval([0.7])
    assert interval.mean == pytest.approx(0.7)
    assert not interval.known
    assert interval.includes(100.0)


def test_equal_values_give_a_point() -> None:
    assert bootstrap_interval([0.25] * 5) == Interval(0.25, 0.25, 0.25)


def test_seed_decides_and_chunks_do_not_change_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(size=40)
    first = bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5) == first
    assert bootstrap_interval(values, seed=6) != first
    monkeypatch.setattr("tropism.evaluation.statistics.CHUNK_ENTRIES", 7)
    small = bootstrap_interval(values, seed=5, resamples=3000)
    assert small.low == pytest.approx(first.low, abs=0.03)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "none of the 0 values is scored"),
        ([math.nan, math.nan], {}, "none of the 2 values is scored"),
        ([1.0, math.inf], {}, "infinite"),
        ([[1.0], [2.0]], {}, r"shape \[2, 1\]"),
        ([1.0, 2.0], {"confidence": 95}, "confidence must lie between 0 and 1, not 95"),
        ([1.0, 2.0], {"resamples": 10}, "resamples must be at least 100"),
    ],
)
def test_unusable_input_is_refused(values: list[float], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **options)  # type: ignore[arg-type]


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="before has 2, after 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_infinite_on_both_sides_is_refused() -> None:
    with pytest.raises(ValueError, match="infinite"):
        paired_difference([math.inf, 1.0], [math.inf, 1.0])
