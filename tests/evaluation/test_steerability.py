from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tropism.errors import DataError
from tropism.evaluation.statistics import percentile_interval
from tropism.evaluation.steerability import (
    DistributionStatistic,
    Samples,
    Steerability,
    TrainingRewards,
    default_targets,
    pearson,
    steerability,
)
from tropism.evaluation.sweep_numbers import SweepNumbers, resampled_weights

NAN = math.nan
UNIT = TrainingRewards.of(np.linspace(0, 1, 101))


def samples_of(rows: Sequence[tuple[int, float, float]], kl: Sequence[float] | None = None) -> Samples:
    """(prompt, target, achieved) per completion."""
    prompt, target, achieved = (np.array(column) for column in zip(*rows, strict=True))
    return Samples(
        prompts=tuple(f"prompt {row[0]}" for row in rows),
        completions=tuple(f"completion {number}" for number in range(len(rows))),
        prompt_indices=prompt.astype(np.int64),
        targets=target.astype(np.float64),
        achieved=achieved.astype(np.float64),
        sequence_kl=np.full(len(rows), 2.0) if kl is None else np.array(kl, dtype=np.float64),
    )


def random_samples(seed: int, *, prompts: int = 9, targets: Sequence[float] = (-1.0, 0.0, 0.3, 0.6, 1.0)) -> Samples:
    """Coarse rewards with many ties, one to three completions per prompt and target, some unscored."""
    rng = np.random.default_rng(seed)
    rows = [
        (prompt, target, NAN if rng.random() < 0.15 else round(0.6 * target + rng.normal(0, 0.5), 1))
        for prompt in range(prompts)
        for target in targets
        for _ in range(rng.integers(1, 4))
    ]
    return samples_of(rows, kl=[NAN if rng.random() < 0.1 else rng.normal(3, 1) for _ in rows])


# ---- an independent, slow way to each number -------------------------------------------------------------------------


def slow_rank(values: Sequence[float]) -> list[float]:
    """The mean of the places that a value takes among the sorted ones."""
    ordered = sorted(values)
    return [
        sum(place for place, other in enumerate(ordered, 1) if other == value) / ordered.count(value)
        for value in values
    ]


def slow_r(x: Sequence[float], y: Sequence[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    below = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    return above / below if below > 1e-9 else NAN


def slow_mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else NAN


def slow_numbers(rows: Sequence[tuple[float, float]], inside: Sequence[float]) -> dict[str, float]:
    """(target, achieved) of the scored completions of a resample -> every number that has no target of its own."""
    kept = [(x, y) for x, y in rows if x in inside]
    means = [round(slow_mean([y for x, y in kept if x == target]), 12) for target in inside]
    xs, ys = [x for x, _ in kept], [y for _, y in kept]
    mean_x, mean_y = slow_mean(xs), slow_mean(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in kept) / sum((x - mean_x) ** 2 for x in xs)
    errors = [mean - target for mean, target in zip(means, inside, strict=True)]
    return {
        "spearman": slow_r(slow_rank(inside), slow_rank(means)),
        "spearman_samples": slow_r(slow_rank(xs), slow_rank(ys)),
        "slope": slope,
        "intercept": mean_y - slope * mean_x,
        "calibration_error": slow_mean([abs(error) for error in errors]),
        "calibration_rms": math.sqrt(slow_mean([error**2 for error in errors])),
        "gap": means[-1] - means[0],
    }


@pytest.mark.parametrize("seed", range(4))
def test_every_number_agrees_with_a_slow_loop_on_the_samples_and_on_resamples_of_the_prompts(seed: int) -> None:
    samples = random_samples(seed)
    sweep = SweepNumbers(
        prompt_indices=samples.prompt_indices,
        targets=samples.targets,
        achieved=samples.achieved,
        sequence_kl=samples.sequence_kl,
        within=np.array([False, True, True, True, True]),
        above=np.array([False] * 5),
        spread=0.9,
    )
    drawn = next(resampled_weights(9, 1, 20, seed))
    weights = np.concatenate([np.ones((1, 9)), drawn])
    numbers = sweep.numbers(weights)
    for row, times in enumerate(weights.astype(int).tolist()):
        kept = [i for i in range(len(samples)) for _ in range(times[samples.prompt_indices[i]])]
        pairs = [(samples.targets[i], samples.achieved[i]) for i in kept if not math.isnan(samples.achieved[i])]
        for name, expected in slow_numbers(pairs, [0.0, 0.3, 0.6, 1.0]).items():
            assert numbers[name][row] == pytest.approx(expected, abs=1e-9), name
        assert numbers["gap_share"][row] == pytest.approx(numbers["gap"][row] / 0.9)
        for column, target in enumerate((-1.0, 0.0, 0.3, 0.6, 1.0)):
            here = slow_mean([y for x, y in pairs if x == target])
            assert numbers["means"][row, column] == pytest.approx(here)
            kl = [samples.sequence_kl[i] for i in kept if samples.targets[i] == target]
            expected = slow_mean([value for value in kl if not math.isnan(value)])
            assert numbers["kl_means"][row, column] == pytest.approx(expected)
        lowest = slow_mean([y for x, y in pairs if x == 0.0])
        assert numbers["further"][row, 0] == pytest.approx(lowest - slow_mean([y for x, y in pairs if x == -1.0]))


def test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    samples = random_samples(11, targets=(0.0, 0.25, 0.5, 0.75, 1.0))
    result = steerability(samples, UNIT, resamples=100)
    scored = ~np.isnan(samples.achieved)
    x, y = samples.targets[scored], samples.achieved[scored]
    assert result.spearman_samples.mean == pytest.approx(stats.spearmanr(x, y).statistic)
    line = stats.linregress(x, y)
    assert result.slope.mean == pytest.approx(line.slope) and result.intercept.mean == pytest.approx(line.intercept)
    assert pearson(samples, resamples=100).mean == pytest.approx(line.rvalue)


# ---- by hand ---------------------------------------------------------------------------------------------------------

HAND = [
    *((0, 0.0, 0.1), (0, 0.5, 0.3), (0, 1.0, 0.9)),
    *((1, 0.0, 0.3), (1, 0.5, 0.1), (1, 1.0, 0.7)),
]
"""Two prompts at three targets: means 0.2, 0.2, 0.8."""


def test_numbers_by_hand() -> None:
    result = steerability(samples_of(HAND), UNIT)
    assert [round(one.achieved.mean, 9) for one in result.targets] == [0.2, 0.2, 0.8]
    # Ranks 1, 2, 3 against 1.5, 1.5, 3: covariance 1.5, squares 2 and 1.5.
    assert result.spearman.mean == pytest.approx(1.5 / math.sqrt(3))
    # Ranks 1.5, 1.5, 3.5, 3.5, 5.5, 5.5 against those of 0.1, 0.3, 0.3, 0.1, 0.9, 0.7: 1.5, 3.5, 3.5, 1.5, 6, 5.
    assert result.spearman_samples.mean == pytest.approx(12 / math.sqrt(16 * 16.5))
    assert result.slope.mean == pytest.approx(0.6) and result.intercept.mean == pytest.approx(0.1)
    assert result.calibration_error.mean == pytest.approx((0.2 + 0.3 + 0.2) / 3)
    assert result.calibration_rms.mean == pytest.approx(math.sqrt((0.04 + 0.09 + 0.04) / 3))
    assert result.gap.mean == pytest.approx(0.6) and result.gap_share.mean == pytest.approx(0.6 / 0.9)
    # Prompt 0 rises throughout (1); prompt 1 has ranks 2, 1, 3 (0.5).
    assert result.control_share.mean == 1.0 and result.control_mean.mean == pytest.approx(0.75)
    assert (result.prompts, result.samples, result.unscored) == (2, 6, 0)
    middle = result.targets[1]
    assert middle.median == pytest.approx(0.2) and middle.std == pytest.approx(math.sqrt(0.02)) and middle.count == 2
    assert result.sequence_kl.mean == 2.0


def test_ties_take_the_mean_of_their_ranks() -> None:
    """Ranks 1, 2, 3, 4 against 1, 2.5, 2.5, 4: covariance 4.5, squares 5 and 4.5."""
    rows = [(p, t, a) for p in range(2) for t, a in ((0.0, 0.1), (0.3, 0.2), (0.6, 0.2), (1.0, 0.3))]
    result = steerability(samples_of(rows), UNIT)
    for value in (result.spearman, result.spearman_samples, result.control_mean):
        assert value.mean == pytest.approx(4.5 / math.sqrt(22.5))


def test_pearson_by_hand() -> None:
    assert pearson(samples_of([(0, 0.0, 1.0), (1, 1.0, 2.0), (2, 2.0, 2.0)])).mean == pytest.approx(math.sqrt(0.75))
    assert math.isnan(pearson(samples_of([(0, 0.0, 1.0), (1, 1.0, 1.0)])).mean)
    assert math.isnan(pearson(samples_of([(0, 0.0, NAN)])).mean)


def test_interval_of_pearson_against_resamples_drawn_one_by_one() -> None:
    rng = np.random.default_rng(1)
    x = rng.uniform(size=40)
    y = 0.5 * x + rng.normal(0, 0.2, 40)
    interval = pearson(samples_of([(p, a, b) for p, (a, b) in enumerate(zip(x, y, strict=True))]))
    drawn = [slow_r(x[rows].tolist(), y[rows].tolist()) for rows in rng.integers(0, 40, size=(2000, 40))]
    assert interval.low == pytest.approx(np.quantile(drawn, 0.022), abs=0.04)
    assert interval.high == pytest.approx(np.quantile(drawn, 0.978), abs=0.04)


def test_single_prompt_has_numbers_and_no_intervals() -> None:
    result = steerability(samples_of(HAND[:3]), UNIT)
    assert result.spearman.mean == pytest.approx(1.0) and result.control_mean.mean == pytest.approx(1.0)
    for name in ("spearman", "slope", "gap", "control_mean", "sequence_kl"):
        assert not getattr(result, name).known


def test_a_constant_reward_controls_nothing() -> None:
    """Means of equal rewards over different numbers of completions differ in their last bits, and are still ties."""
    rows = [(p, t, 0.1) for p in range(3) for t in (0.0, 0.5, 1.0) for _ in range(1 + p + int(2 * t))]
    result = steerability(samples_of(rows), UNIT)
    assert math.isnan(result.spearman.mean) and math.isnan(result.spearman_samples.mean)
    assert result.slope.mean == pytest.approx(0.0) and result.gap.mean == pytest.approx(0.0)
    assert result.control_share.mean == 0.0 and result.control_mean.mean == 0.0


def test_unscored_completions_are_left_out() -> None:
    rows = [*HAND, (0, 1.0, NAN), (1, 0.0, NAN), (2, 0.0, NAN), (2, 0.5, 0.2), (2, 1.0, NAN)]
    result = steerability(samples_of(rows), UNIT)
    assert [round(one.achieved.mean, 9) for one in result.targets] == [0.2, 0.2, 0.8]
    assert [one.count for one in result.targets] == [2, 3, 2] and result.unscored == 4
    assert result.control_mean.mean == pytest.approx(0.75)  # the third prompt has a single target


def test_a_target_without_any_score_is_shown_and_decides_nothing() -> None:
    result = steerability(samples_of([*HAND, (0, 0.7, NAN), (1, 0.7, NAN)]), UNIT)
    assert result.targets[2].target == 0.7 and math.isnan(result.targets[2].achieved.mean)
    assert math.isnan(result.targets[2].median) and result.targets[2].count == 0
    assert result.spearman.mean == pytest.approx(1.5 / math.sqrt(3))


def test_too_few_targets_within_the_range_is_an_error_that_names_it() -> None:
    with pytest.raises(DataError, match=r"1 targets within the training rewards \(0 to 1\)"):
        steerability(samples_of([(0, 0.5, 0.1), (0, 3.0, 0.2)]), UNIT)


# ---- beyond the range ------------------------------------------------------------------------------------------------


def follower(reach: float, *, prompts: int = 30) -> Samples:
    """A model that gives what it is asked for, up to ``reach`` on either side of 0.5."""
    rng = np.random.default_rng(0)
    targets = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
    rows = [
        (prompt, target, float(np.clip(target, 0.5 - reach, 0.5 + reach)) + rng.normal(0, 0.05))
        for prompt in range(prompts)
        for target in targets
    ]
    return samples_of(rows)


def test_targets_beyond_the_range_are_reported_and_do_not_count() -> None:
    stuck, moving = (steerability(follower(reach), UNIT) for reach in (0.5, 2.0))
    for result in (stuck, moving):
        assert [one.in_range for one in result.targets] == [False, *[True] * 5, False]
        assert [(one.target, one.side) for one in result.beyond] == [(-0.5, "below"), (1.5, "above")]
        assert result.slope.mean == pytest.approx(1.0, abs=0.05)
        assert result.calibration_error.mean < 0.05
        assert result.gap.mean == pytest.approx(1.0, abs=0.05)
    assert [one.moves_on for one in stuck.beyond] == [False, False]
    assert [one.moves_on for one in moving.beyond] == [True, True]
    assert [one.further.mean for one in moving.beyond] == pytest.approx([0.5, 0.5], abs=0.05)
    assert [one.achieved.mean for one in stuck.beyond] == pytest.approx([0.0, 1.0], abs=0.05)


def test_a_model_that_turns_back_beyond_the_range_has_a_negative_further() -> None:
    rows = [(p, t, a + 0.01 * p) for p in range(5) for t, a in ((-1.0, 0.5), (0.0, 0.1), (1.0, 0.9), (2.0, 0.4))]
    result = steerability(samples_of(rows, kl=[9.0, 1.0, 2.0, 8.0] * 5), UNIT)
    assert [one.sequence_kl.mean for one in result.targets] == [9.0, 1.0, 2.0, 8.0]
    assert result.sequence_kl.mean == 1.5  # within the range
    below, above = result.beyond
    assert below.further.mean == pytest.approx(-0.4) and above.further.mean == pytest.approx(-0.5)
    assert not below.moves_on and not above.moves_on


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_intervals_resample_prompts_and_not_completions() -> None:
    """Prompts that differ much, each the same at every repetition: more repetitions say nothing new."""
    rng = np.random.default_rng(5)
    level = rng.normal(0, 1, 20)

    def result(repeats: int) -> Steerability:
        rows = [(p, t, level[p] + t) for p in range(20) for t in (0.0, 1.0) for _ in range(repeats)]
        return steerability(samples_of(rows), UNIT)

    once, often = result(1).targets[0].achieved, result(10).targets[0].achieved
    assert (once.low, once.high) == pytest.approx((often.low, often.high))
    assert once.high - once.low == pytest.approx(2 * 2.093 * level.std(ddof=1) / math.sqrt(20), rel=0.1)
    gap = result(1).gap  # every prompt moves by exactly 1: what prompts differ by cancels out
    assert (gap.mean, gap.low, gap.high) == pytest.approx((1.0, 1.0, 1.0))


def test_intervals_cover_the_truth_and_repeat() -> None:
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rows = [(p, t, (0.5 + 0.3 * bend) * t + rng.normal(0, 0.3))
                for p, bend in enumerate(rng.normal(size=25)) for t in (0.0, 0.5, 1.0)]  # fmt: skip
        hits += steerability(samples_of(rows), UNIT, resamples=300).slope.includes(0.5)
    assert 51 <= hits <= 60
    one, other = (steerability(random_samples(1), UNIT, resamples=200, seed=3) for _ in range(2))
    assert repr(one) == repr(other)
    assert repr(steerability(random_samples(1), UNIT, resamples=200, seed=4)) != repr(one)


def test_memory_of_resampling_is_bounded() -> None:
    chunks = list(resampled_weights(7, 300_000, 10, seed=0))
    assert [len(chunk) for chunk in chunks] == [3, 3, 3, 1]
    assert all(float(row.sum()) == 7 for chunk in chunks for row in chunk)


def test_numbers_do_not_depend_on_the_order_of_the_samples() -> None:
    samples = random_samples(2)
    order = np.random.default_rng(0).permutation(len(samples))
    mixed = replace(
        samples,
        **{name: getattr(samples, name)[order] for name in ("prompt_indices", "targets", "achieved", "sequence_kl")},
        prompts=tuple(samples.prompts[row] for row in order),
        completions=tuple(samples.completions[row] for row in order),
    )
    one, other = (steerability(each, UNIT, resamples=100) for each in (samples, mixed))
    for name in ("spearman", "spearman_samples", "slope", "control_mean"):
        assert getattr(one, name).mean == pytest.approx(getattr(other, name).mean)


# ---- training rewards and default targets ----------------------------------------------------------------------------


def test_training_rewards_from_all_of_them_and_from_their_quantiles() -> None:
    rewards = [0.0] * 40 + [1.0] * 50 + [0.25] * 10 + [NAN]
    whole = TrainingRewards.of(rewards)
    knots = TrainingRewards.of(np.quantile(np.array(rewards[:-1]), np.linspace(0, 1, 101)))
    for training in (whole, knots):
        assert (training.low, training.high, training.bulk) == (0.0, 1.0, (0.0, 1.0))
        assert training.near(1.0) == pytest.approx(0.5, abs=0.02)
        assert training.near(0.25) == pytest.approx(0.1, abs=0.02)  # quantiles blur the borders between two
        assert training.near(0.6) < 0.01 and training.near(2.0) == 0.0


def test_default_targets_go_over_the_bulk_and_one_beyond_on_each_side() -> None:
    training = TrainingRewards.of(np.linspace(0, 100, 1001))
    targets = default_targets(training)
    assert targets[1:-1] == pytest.approx([5 + 9 * step for step in range(11)])
    assert (targets[0], targets[-1]) == pytest.approx((-22.5, 122.5))
    assert [training.includes(target) for target in targets] == [False, *[True] * 11, False]


def test_default_targets_where_nearly_all_rewards_are_one() -> None:
    training = TrainingRewards.of([0.0] * 999 + [2.0])
    targets = default_targets(training, count=3)
    assert targets[1:-1] == [0.0, 1.0, 2.0] and not training.includes(targets[0]) and not training.includes(targets[-1])
    narrow = TrainingRewards.of([0.0] + [1.0] * 30 + [1.001] * 30 + [2.0])  # a spread of 0.001 in a range of 2
    within = [narrow.includes(target) for target in default_targets(narrow)]
    assert within == [False, *[True] * 11, False]


def test_a_hair_outside_of_the_training_range_is_still_within() -> None:
    """A classifier's rewards end at 0.9997; a target of 1 is what the task asks for."""
    training = TrainingRewards.of([0.0003, 0.4, 0.9997])
    assert training.includes(0.0) and training.includes(1.0)
    assert not training.includes(-0.02) and not training.includes(1.02)


@pytest.mark.parametrize("rewards", [[], [NAN], [1.0, 1.0], [0.0, math.inf]])
def test_unusable_training_rewards(rewards: list[float]) -> None:
    with pytest.raises(DataError, match="at least two of them different"):
        TrainingRewards.of(rewards)


def test_coverage_shows_where_there_was_no_data() -> None:
    training = TrainingRewards.of([0.0] * 60 + [1.0] * 40)
    rows = [(p, t, t + 0.1 * p) for p in range(3) for t in (0.0, 0.5, 1.0)]
    assert [one.coverage for one in steerability(samples_of(rows), training).targets] == [0.6, 0.0, 0.4]


# ---- samples and distributions ---------------------------------------------------------------------------------------


def test_samples_at_a_target_and_joined_again() -> None:
    samples = samples_of(HAND)
    high = samples.at(1.0)
    assert high.prompts == ("prompt 0", "prompt 1") and high.completions == ("completion 2", "completion 5")
    assert high.achieved.tolist() == [0.9, 0.7] and high.prompt_indices.tolist() == [0, 1]
    joined = Samples.concat([samples.at(target) for target in (0.0, 0.5, 1.0)])
    assert sorted(joined.completions) == sorted(samples.completions)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"targets": np.zeros(2)}, "different lengths"),
        ({"targets": np.full(6, NAN)}, "targets must be finite"),
        ({"achieved": np.full(6, math.inf)}, "finite or NaN"),
    ],
)
def test_samples_are_checked(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(samples_of(HAND), **change)


def test_distribution_statistic_by_hand() -> None:
    """1 to 101 shuffled: percentile p is p + 1."""
    values = np.append(np.random.default_rng(0).permutation(np.arange(1.0, 102.0)), NAN)
    described = DistributionStatistic.of(values)
    assert (described.count, described.min, described.max) == (101, 1.0, 101.0)
    assert (described.mean, described.median) == (51.0, 51.0)
    assert described.std == pytest.approx(math.sqrt(101 * 102 / 12))  # sample deviation of 1..n
    shares = [getattr(described, f"pct_{share}") for share in (1, 5, 25, 75, 95, 99)]
    assert shares == pytest.approx([2, 6, 26, 76, 96, 100])
    assert math.isnan(DistributionStatistic.of(np.array([3.0])).std)
    with pytest.raises(DataError, match="none of the 2 completions is scored"):
        DistributionStatistic.of(np.array([NAN, NAN]))


def test_interval_of_a_statistic_that_some_resamples_leave_undefined() -> None:
    drawn = np.arange(1.0, 1001.0)
    whole = percentile_interval(500.0, drawn, count=10_000)
    assert (whole.low, whole.high) == pytest.approx((25.5, 975.5), abs=0.6)
    drawn[::25] = NAN  # 4 %
    assert percentile_interval(500.0, drawn, count=10_000).known
    drawn[::10] = NAN
    assert not percentile_interval(500.0, drawn, count=10_000).known
    assert not percentile_interval(NAN, whole.low + np.zeros(200), count=10).known
