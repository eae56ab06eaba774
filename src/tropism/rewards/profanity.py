"""Offensive language by a linear SVM over words: milliseconds, no download, no model of a language."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

from tropism.errors import ConfigError
from tropism.rewards.config import closest
from tropism.texts import plain_text

ProfanityOutput = Literal["probability", "log_odds"]

INSTALL = "pip install 'tropism[profanity]'"

MOST = 20.0
"""Largest log-odds, and minus the least: p within 2e-9 of 0 or 1, beyond which the package's p has few digits left."""


def profanity(output: ProfanityOutput = "probability", complement: bool = False) -> Callable[..., list[float]]:
    """How offensive a completion is, by alt-profanity-check (trained on 200,000 labelled comments, English).

    p is the mean of five linear SVMs over tf-idf of words, each put through a logistic curve that was fitted on the
    part of the data which it had not seen (Platt's scaling). Words count, their order does not; words of one letter
    and those that the package does not know count nothing, so that a text without others gets one p, about 0.04.

    Args:
        output: p from 0 to 1, or log p / (1 - p), at most ``MOST`` either way.
        complement: 1 - p, or minus the log-odds: reward what is not offensive.

    Raises:
        ConfigError: an unknown output, or the package is not there, or not of the scikit-learn that is.
    """
    if output not in get_args(ProfanityOutput):
        raise ConfigError(f"output: unknown value {output!r}. {closest(str(output), get_args(ProfanityOutput))}")
    if not isinstance(complement, bool):
        raise ConfigError(f"complement: expected true or false, not {complement!r}")
    probabilities = _load()

    def reward_profanity(completions: list[Any]) -> list[float]:
        if not completions:
            return []  # the package raises
        return [
            _scored(float(p), output, complement) for p in probabilities([plain_text(entry) for entry in completions])
        ]

    return reward_profanity


def _scored(p: float, output: ProfanityOutput, complement: bool) -> float:
    if output == "probability":
        return 1 - p if complement else p
    odds = -MOST if p <= 0 else MOST if p >= 1 else math.log(p) - math.log1p(-p)
    odds = min(max(odds, -MOST), MOST)
    return -odds if complement else odds


def _load() -> Callable[[list[str]], Any]:
    """The package's texts -> [N] probabilities.

    Its import unpickles two files that lie in the package, as scikit-learn models are kept; they are trusted as the
    package's code is, which pip installed. No other file is read.
    """
    try:
        from sklearn.exceptions import InconsistentVersionWarning
    except ImportError as error:
        raise ConfigError(f"it needs the package alt-profanity-check: {INSTALL}") from error
    try:
        with warnings.catch_warnings():
            # Each release is trained with one scikit-learn; another one warns of every part of the model. Whether it
            # still works is tried here instead of guessed from the numbers. Other warnings are shown.
            warnings.simplefilter("ignore", InconsistentVersionWarning)
            from profanity_check import predict_prob

            (p,) = predict_prob(["a lovely day"])
    except ModuleNotFoundError as error:
        if error.name != "profanity_check":
            raise _unfit(error) from error
        raise ConfigError(f"it needs the package alt-profanity-check: {INSTALL}") from error
    except Exception as error:  # whatever pickled objects of another scikit-learn fail with
        raise _unfit(error) from error
    if not 0 <= p <= 1:
        raise _unfit(f"it gives the probability {p}")
    return predict_prob  # type: ignore[no-any-return]


def _unfit(reason: object) -> ConfigError:
    import sklearn

    return ConfigError(
        f"the model of alt-profanity-check does not work with scikit-learn {sklearn.__version__}: {reason}. {INSTALL} "
        "installs two that fit"
    )
