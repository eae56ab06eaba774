"""Comparisons drawn at random, of which it is known what the methods differ by."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NAMES = ("a", "b", "c", "d", "e", "f")
PAIRS = [(one, other) for other, one in itertools.combinations(NAMES, 2)]
AGAINST_ONE = [(name, "a") for name in NAMES[1:]]


def draw(
    rng: np.random.Generator,
    *,
    prompts: float,
    seeds: float | Mapping[str, float],
    noise: float,
    count: int = 40,
    number: int = 3,
    gain: float = 0,
    names: Sequence[str] = NAMES,
) -> dict[str, Floats]:
    """[S, P] of six methods: prompts differ (most of it alike for all), seeds differ, completions differ.

    ``gain`` is what the last method is better by. ``seeds`` may be another number for each method.
    """
    alike = rng.normal(0, 1, count)
    return {
        name: alike
        + rng.normal(0, prompts, count)
        + rng.normal(0, seeds[name] if isinstance(seeds, Mapping) else seeds, (number, 1))
        + rng.normal(0, noise, (number, count))
        + (gain if name == NAMES[-1] else 0.0)
        for name in names
    }
