from __future__ import annotations

import math

import pytest

from tropism.evaluation.student import student_p, student_quantile

TABLE = {
    # degrees: (95 %, 99 %) two-sided, from printed tables
    1: (12.706, 63.657),
    2: (4.303, 9.925),
    4: (2.776, 4.604),
    10: (2.228, 3.169),
    60: (2.000, 2.660),
    1e9: (1.960, 2.576),
}


@pytest.mark.parametrize("degrees", TABLE)
def test_the_printed_table(degrees: float) -> None:
    for confidence, printed in zip((0.95, 0.99), TABLE[degrees], strict=True):
        assert student_quantile(confidence, degrees) == pytest.approx(printed, abs=6e-4)
        assert student_p(printed, degrees) == pytest.approx(1 - confidence, rel=1e-3)


def test_closed_forms() -> None:
    for t in (0.0, 0.3, 1.0, 5.0, 300.0):
        assert student_p(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-12)  # Cauchy
        assert student_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)
        assert student_p(-t, 2) == student_p(t, 2)


def test_degrees_between_whole_ones_lie_between() -> None:
    for t in (0.5, 3.0, 12.0):
        assert student_p(t, 3) < student_p(t, 2.5) < student_p(t, 2)


def test_far_tails_and_ends() -> None:
    assert student_p(math.inf, 3) == 0
    assert student_p(0.0, 3.7) == 1
    assert student_p(1e6, 2) == pytest.approx(1e-12, rel=1e-3)  # 2 / t^2 / 2
    assert student_quantile(0.9999, 2) == pytest.approx(99.99, abs=0.01)


def test_what_is_no_number_is_refused() -> None:
    for t, degrees in ((1.0, 0.0), (math.nan, 3.0), (1.0, math.nan)):
        with pytest.raises(ValueError, match="degrees above 0"):
            student_p(t, degrees)
    for confidence, degrees in ((1.0, 3.0), (0.0, 3.0), (0.95, -1.0)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            student_quantile(confidence, degrees)
