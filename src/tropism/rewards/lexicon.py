"""Sentiment by the VADER lexicon: a number for warmth without any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from tropism.errors import ConfigError
from tropism.rewards.config import closest
from tropism.texts import plain_text

VaderScore = Literal["compound", "pos", "neu", "neg"]
VaderText = Literal["completion", "prompt+completion"]


def vader(score: VaderScore = "compound", text: VaderText = "completion") -> Callable[..., list[float]]:
    """Sentiment by VADER (Hutto and Gilbert 2014): `compound` from -1 (bitter) to 1 (warm).

    Args:
        score: `compound`, or the share of the text that is positive (`pos`), neutral (`neu`) or negative (`neg`).
        text: what is read: the completion, or prompt and completion together.
    """
    for name, value, choices in (("score", score, get_args(VaderScore)), ("text", text, get_args(VaderText))):
        if value not in choices:
            raise ConfigError(f"{name}: unknown value {value!r}. {closest(str(value), choices)}")
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ConfigError("it needs the package vaderSentiment: pip install 'tropism[lexicon]'") from error
    analyzer = SentimentIntensityAnalyzer()

    def reward_vader(prompts: list[Any], completions: list[Any]) -> list[float]:
        texts = [plain_text(completion) for completion in completions]
        if text == "prompt+completion":
            texts = [plain_text(prompt) + completion for prompt, completion in zip(prompts, texts, strict=True)]
        return [float(analyzer.polarity_scores(entry)[score]) for entry in texts]

    return reward_vader
