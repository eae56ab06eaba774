"""The simulated figures of docs/compare.md, "How sure", drawn anew. What must hold of any draw is in
test_difference.py."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from comparing.simulated import AGAINST_ONE, NAMES, PAIRS, draw
from tropism.comparing.difference import differences, mean_interval, own_noise, seed_noise

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
DRAWS = 1000
POWER_DRAWS = 400

LOUD_HALF = {name: 0.3 if name in "abc" else 0.03 for name in NAMES}
ONE_QUIET = {name: 0.01 if name == "c" else 0.3 for name in NAMES}
EQUAL: dict[str, tuple[float, float | Mapping[str, float], float]] = {
    "0.3, 0, 1": (0.3, 0.0, 1.0),
    "0.3, 0.2, 0.5": (0.3, 0.2, 0.5),
    "0.3, 0.3, 0.3": (0.3, 0.3, 0.3),
    "0.1, 1, 0.1": (0.1, 1.0, 0.1),
    "1, 0.05, 0.1": (1.0, 0.05, 0.1),
    "0.3, 0.3 of three methods and 0.03 of three, 0.3": (0.3, LOUD_HALF, 0.3),
}
"""Rows of the table of equal methods: deviations of prompts, seeds, completions."""
UNEQUAL = {
    "prompts more than seeds (0.3, 0.01, 0.3)": (0.3, 0.01, 0.3),
    "both (0.3, 0.1, 0.3)": (0.3, 0.1, 0.3),
    "seeds most (0.1, 0.3, 0.1)": (0.1, 0.3, 0.1),
}
"""Rows of the table of what can be found."""


def percentages(row: str) -> list[float]:
    """The shares in a row of a table of the page, from left to right."""
    (cells,) = re.findall(rf"^\| {re.escape(row)} \|(.*)$", PAGE, re.MULTILINE)
    return [float(number) / 100 for number in re.findall(r"([\d.]+) %", cells)]


def assert_alike(shares: list[float], page: list[float]) -> None:
    """The draws are those of the page, so nothing but its rounding parts them."""
    assert shares == pytest.approx(page, abs=0.0055)


@pytest.mark.parametrize("row", EQUAL)
def test_equal_methods(row: str) -> None:
    rng = np.random.default_rng(99)
    prompts, seeds, noise = EQUAL[row]
    drawn = []
    for _ in range(DRAWS):
        values = draw(rng, prompts=prompts, seeds=seeds, noise=noise)
        noises = seed_noise(values)
        pairs, against = (differences(values, family, noises) for family in (PAIRS, AGAINST_ONE))
        drawn.append(
            [
                any(one.significant for one in pairs),
                any(one.significant for one in against),
                mean_interval(values["b"], noises["b"]).includes(0.0),
                np.mean([one.mean.includes(0.0) for one in pairs]),
            ]
        )
    shares = np.mean(drawn, axis=0).tolist()
    assert_alike(shares, percentages(row))


@pytest.mark.parametrize("row", UNEQUAL)
def test_what_is_found_of_a_difference(row: str) -> None:
    prompts, seeds, noise = UNEQUAL[row]
    error = math.sqrt(2 * (prompts**2 / 40 + seeds**2 / 3 + noise**2 / 3 / 40))
    shares = []
    for size in (5, 8, 12):
        rng = np.random.default_rng(99)
        found = []
        for _ in range(POWER_DRAWS):
            values = draw(rng, prompts=prompts, seeds=seeds, noise=noise, gain=size * error)
            families = [differences(values, family, seed_noise(values)) for family in (AGAINST_ONE, PAIRS)]
            better = [one for family in families for one in family if (one.first, one.second) == ("f", "a")]
            found.append([one.significant for one in better])
        shares += np.mean(found, axis=0).tolist()
    assert_alike(shares, percentages(row))


def test_one_method_that_varies_little() -> None:
    (sentence,) = re.findall(r"false find in (\d+) % of simulated comparisons, with it in (\d+) %", PAGE)
    rng = np.random.default_rng(99)
    drawn = []
    for _ in range(DRAWS):
        values = draw(rng, prompts=0.3, seeds=ONE_QUIET, noise=0.3)
        alone = {name: own_noise(table) for name, table in values.items()}
        drawn.append(
            [any(one.significant for one in differences(values, PAIRS, each)) for each in (alone, seed_noise(values))]
        )
    assert_alike(np.mean(drawn, axis=0).tolist(), [int(number) / 100 for number in sentence])
