"""Keyed randomness: a sample depends on its key alone, not on its neighbours, the batch or the number of processes.

A uniform number is a hash of (seed, purpose, collect, sample index, token index). The hash is splitmix64's finaliser
(Steele, Lea and Flood, 2014, https://doi.org/10.1145/2660193.2660195), applied once per component of the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Purpose = Literal["training", "evaluation", "checks", "generate", "targets", "dropout", "normalisation"]
PURPOSES: dict[Purpose, int] = {
    "training": 1,
    "evaluation": 2,
    "checks": 3,
    "generate": 4,
    "targets": 5,
    "dropout": 6,
    "normalisation": 7,
}

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def _mix(state: Words, word: Words) -> Words:
    """One step of the hash: absorb ``word`` and scramble; wraps around modulo 2**64."""
    with np.errstate(over="ignore"):
        z = (state ^ word) + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _FIRST
        z = (z ^ (z >> np.uint64(27))) * _SECOND
        return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class StreamKey:
    """What a batch of samples is keyed by; sample and token indices complete the key."""

    seed: int
    purpose: Purpose = "training"
    collect: int = 0
    """Which collect (training) or evaluation; 0 where there is one only."""

    def uniforms(self, samples: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """One number in [0, 1) per pair of sample and token index (arrays of one shape), with 53 random bits."""
        state = np.zeros(samples.shape, dtype=np.uint64)
        for word in (self.seed, PURPOSES[self.purpose], self.collect):
            state = _mix(state, np.full(samples.shape, word % 2**64, dtype=np.uint64))
        state = _mix(_mix(state, samples.astype(np.uint64)), tokens.astype(np.uint64))
        return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
