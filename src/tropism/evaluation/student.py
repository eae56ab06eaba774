"""Student's distribution with any number of degrees of freedom: two-sided probabilities and quantiles, exact.

Satterthwaite's degrees are no whole numbers and often below 5, where approximations by the normal fail in the tail, and
corrections for many comparisons look far into the tail.
"""

from __future__ import annotations

import math
from statistics import NormalDist

_SMALL = 1e-300
_PRECISION = 1e-14


def student_p(t: float, degrees: float) -> float:
    """Probability that Student's t is at least as far from 0 as ``t``, on either side.

        P(|T| >= t) = I_x(degrees / 2, 1 / 2)      x = degrees / (degrees + t^2)

    Args:
        t: any number; infinite gives 0.
        degrees: of freedom, above 0; may be infinite (the normal distribution).

    Raises:
        ValueError: ``degrees`` is not above 0, or ``t`` is NaN.
    """
    if not degrees > 0 or math.isnan(t):
        raise ValueError(f"Student's distribution needs degrees above 0 and a number, not {degrees} and {t}")
    if math.isinf(t):
        return 0.0
    if degrees > 1e7:
        return math.erfc(abs(t) / math.sqrt(2))
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t), (t * t) / (degrees + t * t))


def student_quantile(confidence: float, degrees: float) -> float:
    """The t that Student's distribution stays within, on both sides, with probability ``confidence``.

    Raises:
        ValueError: ``confidence`` is not between 0 and 1, or ``degrees`` not above 0.
    """
    if not 0 < confidence < 1 or not degrees > 0:
        raise ValueError(
            f"a quantile needs a confidence between 0 and 1 and degrees above 0, not {confidence} and {degrees}"
        )
    t = NormalDist().inv_cdf((1 + confidence) / 2)
    if degrees > 1e7:
        return t
    # The normal quantile lies on the near side, and the tail is convex: Newton's steps come from there without passing.
    for _ in range(200):
        step = (student_p(t, degrees) - (1 - confidence)) / (2 * _density(t, degrees))
        t += step
        if abs(step) <= 1e-12 * t:
            break
    return t


def _density(t: float, degrees: float) -> float:
    constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    return math.exp(constant - (degrees + 1) / 2 * math.log1p(t * t / degrees))


def _incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function I_x(a, b); ``rest`` is 1 - x, given apart to keep its precision.

    By its continued fraction (Lentz's method) on the side where that converges fast; Numerical Recipes, section 6.4.
    """
    if x <= 0.0:
        return 0.0
    if rest <= 0.0:
        return 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest))
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, x) / a
    return 1.0 - front * _fraction(b, a, rest) / b


def _fraction(a: float, b: float, x: float) -> float:
    c, d = 1.0, 1.0 / _away(1.0 - (a + b) * x / (a + 1.0))
    value = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1.0 / _away(1.0 + term * d), _away(1.0 + term / c)
            value *= d * c
        if abs(d * c - 1.0) < _PRECISION:
            break
    return value


def _away(value: float) -> float:
    """The value, kept away from 0, by which is divided."""
    return value if abs(value) > _SMALL else _SMALL
