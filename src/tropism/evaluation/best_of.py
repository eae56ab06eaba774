"""The best of n completions: its expected reward from N samples of each prompt, and what it costs in KL.

The unit of resampling is the prompt, as in ``statistics``. A reward of NaN means "unscored" and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tropism.evaluation.statistics import Interval, bootstrap_interval

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """What the best of n is worth, over all prompts."""

    n: int
    reward: Interval
    """Mean over prompts of the expected reward of the best of n; the interval is over prompts."""
    kl: float
    """Upper bound of the KL to what is sampled from, in nats (``best_of_kl``)."""
    prompts: int
    """Prompts with at least n scored completions; the others are left out."""


def best_of_kl(n: int) -> float:
    """KL(best of n || the policy itself) in nats: an upper bound, for any policy and any reward.

        log n - (n - 1) / n

    It is reached where no two completions have the same reward and none has a probability of its own, and is far too
    high where few completions have most of the probability, or share a reward: https://arxiv.org/abs/2401.01879.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def expected_best(rewards: Sequence[float] | Floats, n: int) -> float:
    """Expected highest reward of n completions, estimated from N without bias: the mean over all subsets of n.

        sum_i C(i - 1, n - 1) / C(N, n) r_(i)      r_(1) <= ... <= r_(N)

    The i-th smallest is the highest of C(i - 1, n - 1) of the C(N, n) subsets.

    Args:
        rewards: [N] of one prompt's completions, none of them NaN.
        n: 1 to N; 1 gives the mean, N the highest.

    Raises:
        ValueError: n is out of range.
    """
    ordered = np.sort(np.asarray(rewards, dtype=np.float64))
    count = len(ordered)
    if not 1 <= n <= count:
        raise ValueError(f"the best of {n} cannot be told from {count} completions")
    subsets = math.comb(count, n)  # whole numbers, of any size, so that only the quotients are rounded
    weights = [math.comb(i - 1, n - 1) / subsets for i in range(n, count + 1)]
    return float(np.dot(weights, ordered[n - 1 :]))


def best_of_table(rewards: Sequence[Sequence[float]] | Floats, sizes: Sequence[int], *, seed: int = 0) -> list[BestOf]:
    """The best of every size, all from the same completions.

    Args:
        rewards: [P][N] of the completions of each prompt, NaN where unscored.
        sizes: every n. seed: of the bootstrap over prompts.

    Raises:
        ValueError: no prompt has as many scored completions as the largest size.
    """
    rows = [[reward for reward in row if not math.isnan(reward)] for row in rewards]
    table = []
    for n in sizes:
        known = [expected_best(row, n) for row in rows if len(row) >= n]
        if not known:
            most = max(map(len, rows), default=0)
            raise ValueError(f"the best of {n} needs {n} scored completions of a prompt, and no prompt has over {most}")
        interval = bootstrap_interval(known, seed=seed)
        table.append(BestOf(n=n, reward=interval, kl=best_of_kl(n), prompts=len(known)))
    return table


def best_of_probabilities(probabilities: Sequence[float], rewards: Sequence[float], n: int) -> list[float]:
    """The exact distribution of the best of n over outcomes that can be enumerated; the first of equals is taken.

        p_n(y) = p(y) / p(r(y)) * (F(r(y))^n - F_(r(y))^n)

    p(r) is the probability of all outcomes of reward r, F(r) of those of at most r, F_(r) of those of less.

    Args:
        probabilities: p of every outcome; they add up to 1.
        rewards: r of every outcome.

    Raises:
        ValueError: the probabilities are no distribution, there is not one reward for each, or n < 1.
    """
    p, r = np.asarray(probabilities, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    if p.ndim != 1 or p.shape != r.shape:
        raise ValueError(f"there must be one reward for each probability, not {r.shape} for {p.shape}")
    if (p < 0).any() or not math.isclose(float(p.sum()), 1.0, abs_tol=1e-6):
        raise ValueError(f"the probabilities of all outcomes must add up to 1, not to {float(p.sum())}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    level = np.unique(r, return_inverse=True)[1]
    share = np.bincount(level, weights=p)
    up_to = np.minimum(np.cumsum(share), 1.0)
    below = np.concatenate(([0.0], up_to[:-1]))
    factor = (up_to**n - below**n) / np.where(share > 0, share, 1.0)
    return [float(value) for value in p * factor[level]]


def kl_divergence(distribution: Sequence[float], base: Sequence[float]) -> float:
    """KL(distribution || base) in nats over outcomes that can be enumerated.

    Raises:
        ValueError: the lengths differ, or an outcome is possible under the first alone.
    """
    pairs = [(one, other) for one, other in zip(distribution, base, strict=True) if one > 0]
    if any(other <= 0 for _, other in pairs):
        raise ValueError("an outcome has a probability in the distribution and none in the base, so the KL is infinite")
    return math.fsum(one * math.log(one / other) for one, other in pairs)
