"""How sure a comparison is: intervals over prompts and seeds, and tests between methods that answer the same prompts.

Two things are drawn by chance: the held-out prompts, which all methods answer, and the seeds, of which there are few.
The squared standard error of a mean over S seeds and P prompts adds what the seeds' means differ by (divided by S) and
what the prompts' means over seeds differ by (divided by P). The noise of single completions is in both, so what it
explains (estimated from what is left after seed and prompt) is taken off once: the sum of variances of a two-way layout
with random rows and columns. Student's t with Satterthwaite's degrees of freedom says how far such a mean may lie.

With three seeds, a method's own variance between seeds has two degrees of freedom and is often far too small by luck.
So no method is believed to vary less between seeds than the methods of the comparison do on average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tropism.evaluation.statistics import Interval
from tropism.evaluation.student import student_p, student_quantile

Floats = NDArray[np.float64]

FEWEST_SEEDS = 3
"""With fewer seeds no difference is called significant: two say too little about what a seed changes."""
LEVEL = 0.05
"""The highest adjusted p that is called significant."""
MOST_OF_MEDIAN = 4.0
"""A method counts in the average variance between seeds with at most so many times the median: one run that broke down
must not hide what the others show."""


@dataclass(frozen=True, kw_only=True)
class SeedNoise:
    """What another seed would change about a method's mean."""

    seeds: int
    variance: float
    """Of the mean over all prompts between seeds, the noise of completions included; NaN with a single seed."""
    degrees: float
    """Of freedom of ``variance``."""
    completions: float
    """The part of ``variance`` that completions, sampled anew, explain; NaN with a single seed or prompt."""

    @property
    def of_mean(self) -> float:
        """Variance of the mean over the seeds."""
        return self.variance / self.seeds

    @property
    def counted_twice(self) -> float:
        """The part of ``of_mean`` that the variance between prompts holds as well."""
        return self.completions / self.seeds if math.isfinite(self.completions) else 0.0


UNTRAINED = SeedNoise(seeds=1, variance=0.0, degrees=math.inf, completions=0.0)
"""Of a model that was not trained: a seed only samples anew, which the variance between prompts holds already."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of one method minus that of another, over the prompts that both answered."""

    first: str
    second: str
    mean: Interval
    """``first - second`` with its own 95 % interval, not corrected for the number of comparisons."""
    degrees: float
    """Of freedom; NaN where there is no test."""
    p: float
    """Two-sided; NaN where there is no test."""
    adjusted: float
    """By Holm, over all comparisons of the family; NaN where there is no test."""
    seeds: int
    """Of the method that has fewer."""
    prompts: int

    @property
    def tested(self) -> bool:
        """Whether there were enough seeds for a verdict."""
        return self.seeds >= FEWEST_SEEDS and math.isfinite(self.adjusted)

    @property
    def significant(self) -> bool:
        """Whether the difference is more than chance explains, the other comparisons considered."""
        return self.tested and self.adjusted <= LEVEL


def own_noise(values: Floats) -> SeedNoise:
    """The noise of a method from its own seeds alone.

    Args:
        values: [S, P] mean of each seed's completions of each prompt; a prompt with a NaN is left out.
    """
    table = values[:, ~np.isnan(values).any(axis=0)]
    seeds, prompts = table.shape
    if seeds < 2 or prompts < 1:
        return SeedNoise(seeds=seeds, variance=math.nan, degrees=0.0, completions=math.nan)
    left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    interaction = float((left**2).sum()) / ((seeds - 1) * (prompts - 1)) if prompts > 1 else math.nan
    return SeedNoise(
        seeds=seeds,
        variance=float(table.mean(axis=1).var(ddof=1)),
        degrees=seeds - 1.0,
        completions=interaction / prompts,
    )


def seed_noise(values: Mapping[str, Floats], *, untrained: Sequence[str] = ()) -> dict[str, SeedNoise]:
    """The noise of every method, none below the average of those that were trained.

    The average is that of the methods with two seeds or more, each counted with at most ``MOST_OF_MEDIAN`` times their
    median. A method at the average has half of all degrees of freedom, one above it its own.

    Args:
        values: [S, P] per method (as in ``own_noise``).
        untrained: methods that no training noise is in.
    """
    own = {name: own_noise(table) for name, table in values.items() if name not in untrained}
    known = [noise for noise in own.values() if noise.seeds > 1 and math.isfinite(noise.variance)]
    if not known:
        return {name: own.get(name, UNTRAINED) for name in values}
    most = MOST_OF_MEDIAN * float(np.median([noise.variance for noise in known]))
    average = float(np.mean([min(noise.variance, most) for noise in known]))
    shared = max(sum(noise.degrees for noise in known) / 2, max(noise.degrees for noise in known))
    floored = {
        name: noise
        if noise.variance > average or len(known) == 1
        else SeedNoise(seeds=noise.seeds, variance=average, degrees=shared, completions=noise.completions)
        for name, noise in own.items()
        if noise.seeds > 1
    }
    return {name: UNTRAINED if name in untrained else floored.get(name, own[name]) for name in values}


def mean_interval(values: Floats, noise: SeedNoise, *, confidence: float = 0.95) -> Interval:
    """Mean over seeds and prompts, and where it would lie with other prompts and other seeds.

    Args:
        values: [S, P] as in ``own_noise``.
        noise: of this method. With a single trained seed the interval is over prompts alone.

    Returns:
        The bounds are NaN with a single prompt; all is NaN without a prompt that has a value in every seed.
    """
    by_prompt = values.mean(axis=0)
    return _interval(by_prompt[~np.isnan(by_prompt)], [noise], confidence)[0]


def differences(
    values: Mapping[str, Floats], pairs: Sequence[tuple[str, str]], noise: Mapping[str, SeedNoise]
) -> list[Difference]:
    """Each pair's difference with its test; Holm's correction is over all pairs given, which are one family.

    Args:
        values: [S, P] per method, the prompts in one order; the numbers of seeds may differ.
        pairs: (first, second).
        noise: ``seed_noise`` of the same values.

    Raises:
        ValueError: the methods have different numbers of prompts.
    """
    found = [_difference(first, second, values, noise) for first, second in pairs]
    adjusted = holm([one.p if one.seeds >= FEWEST_SEEDS else math.nan for one in found])
    return [replace(one, adjusted=value) for one, value in zip(found, adjusted, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p: the chance of one or more false finds in the family stays below the level.

        adjusted_(i) = max over j <= i of min(1, (m - j + 1) p_(j))      Holm 1979, https://www.jstor.org/stable/4615733

    Args:
        p_values: NaN where there was no test; those do not count in m.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = highest
    return adjusted


def _difference(first: str, second: str, values: Mapping[str, Floats], noise: Mapping[str, SeedNoise]) -> Difference:
    one, other = values[first], values[second]
    if one.shape[1] != other.shape[1]:
        raise ValueError(
            f"{first} answered {one.shape[1]} prompts and {second} {other.shape[1]}; they must be the same"
        )
    by_prompt = one.mean(axis=0) - other.mean(axis=0)
    by_prompt = by_prompt[~np.isnan(by_prompt)]
    sides = [noise[first], noise[second]]
    interval, error, degrees = _interval(by_prompt, sides, 0.95)
    seeds = min(len(one), len(other))
    testable = interval.known and all(math.isfinite(side.variance) for side in sides)
    p = math.nan
    if testable and error > 0:
        p = student_p(interval.mean / error, degrees)
    elif testable:
        p = 1.0 if interval.mean == 0 else 0.0
    return Difference(
        first=first,
        second=second,
        mean=interval,
        degrees=degrees if testable else math.nan,
        p=p,
        adjusted=math.nan,
        seeds=seeds,
        prompts=len(by_prompt),
    )


def _interval(by_prompt: Floats, sides: Sequence[SeedNoise], confidence: float) -> tuple[Interval, float, float]:
    """The interval of the mean of [P] values, its standard error and its degrees of freedom."""
    prompts = len(by_prompt)
    if not prompts:
        return Interval(math.nan, math.nan, math.nan), math.nan, math.nan
    mean = float(by_prompt.mean())
    if prompts == 1:
        return Interval(mean, math.nan, math.nan), math.nan, math.nan
    trained = [side for side in sides if math.isfinite(side.variance)]
    of_prompts = float(by_prompt.var(ddof=1)) / prompts
    of_seeds = math.fsum(side.of_mean for side in trained)
    twice = math.fsum(side.counted_twice for side in trained)
    squared = max(of_seeds + of_prompts - twice, of_seeds, of_prompts)
    if squared == 0:
        return Interval(mean, mean, mean), 0.0, math.inf
    spread = of_prompts**2 / (prompts - 1) + math.fsum(side.of_mean**2 / side.degrees for side in trained)
    degrees, error = squared**2 / spread, math.sqrt(squared)
    reach = student_quantile(confidence, degrees) * error
    return Interval(mean, mean - reach, mean + reach), error, degrees
