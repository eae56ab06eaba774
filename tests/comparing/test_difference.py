from __future__ import annotations

import math

import numpy as np
import pytest

from comparing.simulated import NAMES, PAIRS, Floats, draw
from tropism.comparing.difference import (
    UNTRAINED,
    Difference,
    differences,
    holm,
    mean_interval,
    own_noise,
    seed_noise,
)

# By hand --------------------------------------------------------------------------------------------------------------


def test_noise_between_seeds_by_hand() -> None:
    noise = own_noise(np.array([[1.0, 3.0], [2.0, 4.0], [3.0, 8.0]]))
    # means 2, 3, 5.5; their mean 3.5, squares 2.25 + 0.25 + 4 = 6.5, over 2
    assert noise.variance == pytest.approx(3.25)
    # left after seed and prompt: +-0.5, +-0.5, -+1 -> squares 2 (0.25 + 0.25 + 1) = 3, over (2)(1), over 2 prompts
    assert noise.completions == pytest.approx(0.75)
    assert (noise.seeds, noise.degrees) == (3, 2)


def test_no_method_varies_less_than_the_average() -> None:
    def of(spread: float) -> Floats:
        return np.array([[0.0, 0.0], [spread, spread], [2 * spread, 2 * spread]])

    noise = seed_noise({"quiet": of(0.0), "middle": of(1.0), "loud": of(2.0), "base": of(9.0)}, untrained=["base"])
    # variances 0, 1, 4: the mean of all is 5 / 3 (4 is no more than four times the median)
    assert noise["quiet"].variance == noise["middle"].variance == pytest.approx(5 / 3)
    assert noise["quiet"].degrees == 3  # half of 2 + 2 + 2
    assert (noise["loud"].variance, noise["loud"].degrees) == (pytest.approx(4.0), 2)
    assert noise["base"] == UNTRAINED


def test_a_run_that_broke_down_does_not_hide_the_others() -> None:
    def of(spread: float) -> Floats:
        return np.array([[0.0, 0.0], [spread, spread], [2 * spread, 2 * spread]])

    noise = seed_noise({"a": of(1.0), "b": of(1.0), "broken": of(100.0)})
    assert noise["a"].variance == pytest.approx((1 + 1 + 4) / 3)
    assert noise["broken"].variance == pytest.approx(10_000)


def test_a_difference_by_hand() -> None:
    """Seeds differ and prompts do not: t with the degrees of the seeds."""
    values = {"a": np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]), "b": np.array([[0.0, 0.0]] * 3)}
    noise = {name: own_noise(table) for name, table in values.items()}
    (found,) = differences(values, [("a", "b")], noise)
    # standard error sqrt(1 / 3), 2 degrees: t = 3.464, p = 1 - t / sqrt(2 + t^2) = 0.0742; reach 4.303 * 0.5774
    assert found.mean.mean == 2
    assert found.degrees == pytest.approx(2)
    assert found.p == found.adjusted == pytest.approx(0.0742, abs=1e-4)
    assert (found.mean.low, found.mean.high) == (pytest.approx(-0.4843, abs=1e-3), pytest.approx(4.4843, abs=1e-3))
    assert not found.significant


def test_prompts_alone_are_the_paired_t_test() -> None:
    values = {"a": np.array([[1.0, 2.0, 3.0, 6.0]] * 3), "b": np.array([[0.0, 0.0, 0.0, 0.0]] * 3)}
    noise = {name: own_noise(table) for name, table in values.items()}
    (found,) = differences(values, [("a", "b")], noise)
    # mean 3, variance 14 / 3 over 4 prompts: error 1.0801, t = 2.7775 with 3 degrees: p 0.0692
    assert found.p == pytest.approx(0.0692, abs=1e-4)
    assert found.degrees == pytest.approx(3)


def test_noise_of_completions_is_not_counted_twice() -> None:
    """Noise that neither seed nor prompt explains is in both variances; the sum takes it off once."""
    rng = np.random.default_rng(5)
    table = rng.normal(0, 1, (400, 300))
    noise = own_noise(table)
    interval = mean_interval(table, noise)
    error = (interval.high - interval.low) / 2 / 1.965
    assert error**2 == pytest.approx(1 / (400 * 300), rel=0.25)  # not 2 / (400 * 300)


def test_holm_by_hand() -> None:
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 is as high, 0.5
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    found = holm([0.02, math.nan, 0.03])
    assert found[::2] == pytest.approx([0.04, 0.04])
    assert math.isnan(found[1])


# Too little to say ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 2])
def test_nothing_is_significant_below_three_seeds(seeds: int) -> None:
    rng = np.random.default_rng(0)
    values = {name: rng.normal(place, 1e-3, (seeds, 50)) for place, name in enumerate("ab")}
    (found,) = differences(values, [("b", "a")], seed_noise(values))
    assert (found.tested, found.significant, found.seeds) == (False, False, seeds)
    assert found.mean.mean == pytest.approx(1, abs=1e-2)


def test_few_seeds_do_not_count_in_the_correction_of_the_others() -> None:
    rng = np.random.default_rng(0)
    values = {"a": rng.normal(0, 1, (3, 50)), "b": rng.normal(0, 1, (3, 50)), "c": rng.normal(0, 1, (2, 50))}
    found = differences(values, [("b", "a"), ("c", "a")], seed_noise(values))
    assert found[0].adjusted == found[0].p
    assert math.isnan(found[1].adjusted)


def test_unscored_prompts_are_left_out_of_both() -> None:
    values = {"a": np.array([[1.0, math.nan, 5.0]] * 3), "b": np.array([[0.0, 9.0, 1.0]] * 3)}
    (found,) = differences(values, [("a", "b")], seed_noise(values))
    assert (found.prompts, found.mean.mean) == (2, 2.5)


def test_different_numbers_of_prompts_are_refused() -> None:
    values = {"a": np.zeros((3, 4)), "b": np.zeros((3, 5))}
    with pytest.raises(ValueError, match="answered 4 prompts and b 5"):
        differences(values, [("a", "b")], seed_noise(values))


def test_equal_and_constant_differences() -> None:
    values = {"a": np.ones((3, 4)), "b": np.ones((3, 4)), "c": np.zeros((3, 4))}
    same, apart = differences(values, [("a", "b"), ("a", "c")], seed_noise(values))
    assert (same.p, apart.p) == (1.0, 0.0)
    assert math.isnan(mean_interval(np.full((3, 4), math.nan), UNTRAINED).mean)
    assert not mean_interval(np.ones((3, 1)), UNTRAINED).known


# By simulation --------------------------------------------------------------------------------------------------------


def compared(values: dict[str, Floats]) -> list[Difference]:
    return differences(values, PAIRS, seed_noise(values))


@pytest.mark.parametrize(
    ("prompts", "seeds", "noise"),
    [(0.3, 0.0, 1.0), (0.3, 0.2, 0.5), (0.3, 0.3, 0.3), (0.1, 1.0, 0.1), (1.0, 0.05, 0.1)],
)
def test_six_equal_methods_seldom_differ(prompts: float, seeds: float, noise: float) -> None:
    """Whatever the ratio of seeds to prompts, three seeds of equal methods give a false find in 6 % at most."""
    rng = np.random.default_rng(11)
    draws = 300
    found = [compared(draw(rng, prompts=prompts, seeds=seeds, noise=noise)) for _ in range(draws)]
    share = float(np.mean([any(one.significant for one in each) for each in found]))
    assert share <= 0.06


def test_methods_of_which_one_varies_more_seldom_differ() -> None:
    rng = np.random.default_rng(12)
    false = 0
    for _ in range(400):
        values = draw(rng, prompts=0.3, seeds=0.02, noise=0.3)
        values["c"] = values["c"] + rng.normal(0, 0.3, (3, 1))
        false += any(one.significant for one in compared(values))
    assert false / 400 <= 0.06


def test_a_large_difference_is_found() -> None:
    """One method is better by five standard errors of what prompts and completions do."""
    rng = np.random.default_rng(13)
    prompts, seeds, noise, count = 0.3, 0.01, 0.3, 40
    error = math.sqrt(2 * (prompts**2 / count + seeds**2 / 3 + noise**2 / 3 / count))
    found = 0
    for _ in range(300):
        values = draw(rng, prompts=prompts, seeds=seeds, noise=noise, gain=5 * error)
        against = differences(values, [(name, "a") for name in NAMES[1:]], seed_noise(values))
        found += against[-1].significant
    assert found / 300 > 0.9


@pytest.mark.parametrize(
    ("prompts", "seeds", "noise"), [(1.0, 0.1, 0.3), (0.3, 0.1, 0.1), (0.3, 0.3, 0.3), (0.1, 1.0, 0.1)]
)
def test_intervals_cover_in_2000_draws(prompts: float, seeds: float, noise: float) -> None:
    """A method among three: within 2 points of 95 %, or up to 3 above where seeds dominate."""
    rng = np.random.default_rng(14)
    inside = 0
    for _ in range(2000):
        values = draw(rng, prompts=prompts, seeds=seeds, noise=noise, names=NAMES[:3])
        inside += mean_interval(values["a"], seed_noise(values)["a"]).includes(0.0)
    assert 0.93 <= inside / 2000 <= (0.98 if seeds >= prompts else 0.97)


def test_intervals_of_a_method_alone_are_somewhat_narrow() -> None:
    """Three seeds of one method with seeds and prompts alike: 92 %, as docs/compare.md says."""
    rng = np.random.default_rng(14)
    inside = 0
    for _ in range(2000):
        table = rng.normal(0, 0.3, 40) + rng.normal(0, 0.3, (3, 1)) + rng.normal(0, 0.3, (3, 40))
        inside += mean_interval(table, own_noise(table)).includes(0.0)
    assert 0.91 <= inside / 2000 <= 0.95


def test_intervals_of_differences_cover_where_seeds_dominate() -> None:
    rng = np.random.default_rng(15)
    inside = []
    for _ in range(200):
        values = draw(rng, prompts=0.1, seeds=1.0, noise=0.1)
        inside += [one.mean.includes(0.0) for one in compared(values)]
    assert 0.93 <= np.mean(inside) <= 0.99
