"""How varied a set of completions is, and what changed in its words: measures that show a collapse or a hacked reward.

A word is a run of letters, digits or underscores (inner apostrophes included), compared without case; punctuation is
dropped, so that "great!" and "Great" are one word.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


@dataclass(frozen=True, kw_only=True)
class WordShift:
    """How much of all words one word makes up, in two sets of texts."""

    word: str
    before: float
    """Share of all words, 0 to 1."""
    after: float
    """Share of all words, 0 to 1."""


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of distinct word n-grams among all word n-grams of all texts (https://arxiv.org/abs/1510.03055).

    It falls as the texts get longer or more numerous: compare equal numbers of prompts.

    Args:
        texts: at least one completion.
        n: words per n-gram, at least 1.

    Returns:
        Between 0 (all the same) and 1 (no n-gram twice); NaN if no text has ``n`` words.

    Raises:
        ValueError: no texts, or ``n`` < 1.
    """
    _check(texts, n)
    grams = [gram for text in texts for gram in _ngrams(_words(text), n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Mean over texts of the share of word n-grams that occurred before in the same text.

    Args:
        texts: at least one completion; those with fewer than ``n`` words are left out.
        n: words per n-gram, at least 1.

    Returns:
        Between 0 (nothing said twice) and 1; NaN if no text has ``n`` words.

    Raises:
        ValueError: no texts, or ``n`` < 1.
    """
    _check(texts, n)
    grams = [_ngrams(_words(text), n) for text in texts]
    shares = [1 - len(set(one)) / len(one) for one in grams if one]
    return sum(shares) / len(shares) if shares else math.nan


def distinct_texts(texts: Sequence[str]) -> float:
    """Share of distinct texts (white space aside) among all of them; ValueError if there are none."""
    _check(texts, 1)
    return len({" ".join(text.split()) for text in texts}) / len(texts)


def risen_words(before: Sequence[str], after: Sequence[str], *, count: int = 10) -> list[WordShift]:
    """The words whose share of all words grew most, largest growth first: what training taught the model to say.

    Args:
        before: at least one completion.
        after: at least one completion.
        count: at most this many words, at least 1.

    Returns:
        Up to ``count`` words that grew; ties in alphabetical order.

    Raises:
        ValueError: no texts on one side, or ``count`` < 1.
    """
    _check(before, 1)
    _check(after, count)
    first, second = _word_shares(before), _word_shares(after)
    shifts = [WordShift(word=word, before=first.get(word, 0.0), after=share) for word, share in second.items()]
    grown = [shift for shift in shifts if shift.after > shift.before]
    return sorted(grown, key=lambda shift: (shift.before - shift.after, shift.word))[:count]


def _check(texts: Sequence[str], n: int) -> None:
    if not texts:
        raise ValueError("there are no texts to measure")
    if n < 1:
        raise ValueError(f"the number of words must be at least 1, not {n}")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def _word_shares(texts: Iterable[str]) -> dict[str, float]:
    counts = Counter(word for text in texts for word in _words(text))
    total = counts.total()
    return {word: number / total for word, number in counts.items()}
