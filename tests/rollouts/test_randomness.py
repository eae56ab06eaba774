"""Keyed uniforms: pinned for ever, even, and without memory."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from slow_sampling import PURPOSE_NUMBERS, slow_uniform
from tropism.rollouts.randomness import PURPOSES, Purpose, StreamKey

Floats = npt.NDArray[np.float64]

PINNED: tuple[tuple[int, Purpose, int, int, int, float], ...] = (
    (0, "training", 0, 0, 0, 0.9752873302169826),
    (0, "training", 0, 0, 1, 0.0029887481482393508),
    (0, "training", 0, 1, 0, 0.4111075658296648),
    (42, "evaluation", 7, 123, 45, 0.5347789525583815),
    (-3, "checks", 2, 2**40, 4095, 0.639648637882934),
    (2**63 + 5, "generate", 10**6, 0, 9, 0.1746692706321824),
)
"""(seed, purpose, collect, sample, token, uniform). If one changes, every sample of every seed changes with it."""


def uniforms(key: StreamKey, samples: int = 100, tokens: int = 100) -> Floats:
    grid = np.meshgrid(np.arange(samples), np.arange(tokens), indexing="ij")
    return key.uniforms(grid[0], grid[1])


@pytest.mark.parametrize(("seed", "purpose", "collect", "sample", "token", "value"), PINNED)
def test_values_never_change(seed: int, purpose: Purpose, collect: int, sample: int, token: int, value: float) -> None:
    key = StreamKey(seed=seed, purpose=purpose, collect=collect)
    assert key.uniforms(np.array([sample]), np.array([token])).tolist() == [value]
    assert slow_uniform(seed, purpose, collect, sample, token) == value


def test_it_is_the_documented_hash_for_every_purpose() -> None:
    assert PURPOSES == PURPOSE_NUMBERS
    samples, tokens = np.array([0, 1, 5, 2**31, 2**45 + 1]), np.array([3, 0, 77, 2**20, 1])
    for purpose in PURPOSES:
        key = StreamKey(seed=991, purpose=purpose, collect=6)
        slow = [slow_uniform(991, purpose, 6, int(s), int(t)) for s, t in zip(samples, tokens, strict=True)]
        assert key.uniforms(samples, tokens).tolist() == slow


def test_a_number_depends_on_its_own_indices_alone() -> None:
    key = StreamKey(seed=3)
    grid = uniforms(key, 6, 7)
    for sample, token in [(0, 0), (5, 6), (2, 3)]:
        assert key.uniforms(np.array([sample]), np.array([token]))[0] == grid[sample, token]
    order = np.random.default_rng(0).permutation(42)
    samples, tokens = np.divmod(order, 7)
    assert np.array_equal(key.uniforms(samples, tokens), grid.flatten()[order])


def test_every_part_of_the_key_gives_other_numbers() -> None:
    keys = [
        StreamKey(seed=1),
        StreamKey(seed=2),
        StreamKey(seed=1, collect=1),
        *(StreamKey(seed=1, purpose=purpose) for purpose in PURPOSES if purpose != "training"),
    ]
    drawn = np.concatenate([uniforms(key).flatten() for key in keys])
    assert len(np.unique(drawn)) == len(drawn) == 90_000
    # Parts of the key do not stand in for each other: (seed 1, collect 2) is not (seed 2, collect 1).
    assert uniforms(StreamKey(seed=1, collect=2), 1, 1) != uniforms(StreamKey(seed=2, collect=1), 1, 1)
    grid = uniforms(StreamKey(seed=1), 50, 50)
    assert not (grid == grid.T)[~np.eye(50, dtype=bool)].any()


def test_they_are_even_and_lie_in_the_half_open_interval() -> None:
    drawn = uniforms(StreamKey(seed=8), 200, 500).flatten()
    assert drawn.min() >= 0 and drawn.max() < 1
    counts, _ = np.histogram(drawn, bins=100, range=(0, 1))
    statistic = ((counts - 1000) ** 2 / 1000).sum()
    # Chi-square with 99 degrees of freedom: mean 99, standard deviation 14.1.
    assert 99 - 5 * 14.1 < statistic < 99 + 5 * 14.1
    assert drawn.mean() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / len(drawn)))


@pytest.mark.parametrize("axis", [0, 1])
def test_neighbouring_samples_and_tokens_are_uncorrelated(axis: int) -> None:
    grid = uniforms(StreamKey(seed=5), 300, 300)
    one, other = np.take(grid, range(299), axis), np.take(grid, range(1, 300), axis)
    bound = 5 / math.sqrt(one.size)
    assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < bound
    # Nor are neighbouring seeds and collects.
    for key in (StreamKey(seed=6), StreamKey(seed=5, collect=1), StreamKey(seed=5, purpose="evaluation")):
        assert abs(np.corrcoef(grid.flatten(), uniforms(key, 300, 300).flatten())[0, 1]) < bound
