"""Means with intervals: what a change between two evaluations is worth.

The unit of resampling is the held-out prompt. A value of NaN means "unscored" and is left out (of both sides, where two
evaluations are compared).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float] | NDArray[np.floating]
"""[N] numbers, NaN where unscored."""

CHUNK_ENTRIES = 1_000_000
"""Resampled entries held in memory at once (8 MB of indices)."""


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it."""

    mean: float
    low: float
    """NaN where there was only one value, which says nothing about the spread."""
    high: float
    """NaN where there was only one value."""

    @property
    def known(self) -> bool:
        """Whether there were enough values for an interval at all."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def includes(self, value: float) -> bool:
        """Whether the interval leaves ``value`` possible; an unknown interval leaves everything possible."""
        return not self.known or self.low <= value <= self.high


def bootstrap_interval(values: Values, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of the values and its bootstrap interval (expanded percentile method).

    The plain percentile interval is too narrow by sqrt((n - 1) / n) and by the ratio of the normal to Student's
    quantile. The level is widened for both: alpha' = Phi(-sqrt(n / (n - 1)) t), t the quantile of Student's
    distribution with n - 1 degrees of freedom. Hesterberg 2015, https://arxiv.org/abs/1411.5279, section 4.2.

    Args:
        values: [N] one value per prompt, NaN where unscored (left out).
        confidence: wanted probability that the interval covers the true mean, between 0 and 1.
        resamples: number of bootstrap resamples, at least 100.
        seed: of the resampling; the same values and seed give the same interval.

    Returns:
        The mean with its interval; the bounds are NaN if only one value is scored. With fewer than about 8 values the
        interval cannot leave the range of the values and is too narrow.

    Raises:
        ValueError: no value is scored, a value is infinite, the values have more than one dimension, or an option is
            out of range.
    """
    _check_options(confidence, resamples)
    scored = _scored(_vector(values, "values"), "values")
    mean = float(scored.mean())
    if len(scored) == 1:
        return Interval(mean, math.nan, math.nan)
    means = _resampled_means(scored, resamples, seed)
    return percentile_interval(mean, means, count=len(scored), confidence=confidence)


def percentile_interval(
    value: float, resampled: NDArray[np.float64], *, count: int, confidence: float = 0.95
) -> Interval:
    """The interval of any statistic from its values on bootstrap resamples (expanded percentile method, see above).

    Args:
        value: the statistic of the data themselves, which stands in the place of the mean.
        resampled: [R] the statistic of each resample, NaN where it was undefined.
        count: prompts that each resample was drawn from.
        confidence: as in ``bootstrap_interval``.

    Returns:
        The bounds are NaN with a single prompt, or where one resample in twenty or more left the statistic undefined.
    """
    defined = resampled[~np.isnan(resampled)]
    if count < 2 or math.isnan(value) or len(defined) <= 0.95 * len(resampled):
        return Interval(value, math.nan, math.nan)
    tail = _expanded_tail((1 - confidence) / 2, count)
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def paired_difference(
    before: Values, after: Values, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of ``after - before`` over the same prompts, with the bootstrap interval over prompts.

    A prompt keeps both its values when it is resampled, so what the prompts themselves differ by cancels out.

    Args:
        before: [N] one value per prompt, NaN where unscored.
        after: [N] the same prompts in the same order.
        confidence: as in ``bootstrap_interval``.
        resamples: as in ``bootstrap_interval``.
        seed: as in ``bootstrap_interval``.

    Returns:
        The mean difference over the prompts that are scored on both sides, with its interval.

    Raises:
        ValueError: the lengths differ, no prompt is scored on both sides, or as in ``bootstrap_interval``.
    """
    first, second = _vector(before, "before"), _vector(after, "after")
    if len(first) != len(second):
        raise ValueError(f"a paired difference needs the same prompts: before has {len(first)}, after {len(second)}")
    if np.isinf(first).any() or np.isinf(second).any():
        raise ValueError("before or after holds an infinite value; only finite numbers and NaN (unscored) are allowed")
    differences = _scored(second - first, "pairs")
    return bootstrap_interval(differences, confidence=confidence, resamples=resamples, seed=seed)


def _check_options(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100, not {resamples}")


def _vector(values: Values, name: str) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must be one number per prompt, [N], not an array of shape {list(vector.shape)}")
    return vector


def _scored(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    if np.isinf(values).any():
        raise ValueError(f"{name} hold an infinite value; only finite numbers and NaN (unscored) are allowed")
    scored = values[~np.isnan(values)]
    if not len(scored):
        raise ValueError(f"none of the {len(values)} {name} is scored, so there is no mean")
    return scored


def _resampled_means(values: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """[resamples] means of resamples with replacement, drawn in chunks of bounded memory."""
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, CHUNK_ENTRIES // len(values))
    for start in range(0, resamples, chunk):
        stop = min(start + chunk, resamples)
        rows = generator.integers(0, len(values), size=(stop - start, len(values)))
        means[start:stop] = values[rows].mean(axis=1)
    return means


def _expanded_tail(tail: float, count: int) -> float:
    """The percentile that makes the bootstrap interval of ``count`` values as wide as Student's."""
    normal = NormalDist()
    return normal.cdf(-math.sqrt(count / (count - 1)) * student_quantile(-normal.inv_cdf(tail), count - 1))


def student_quantile(z: float, degrees: int) -> float:
    """Student's quantile from the normal quantile ``z``: Abramowitz and Stegun 26.7.5, within 1 % from 3 degrees on."""
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / degrees**power for power, term in enumerate(terms))
