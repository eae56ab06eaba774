"""How much of a reference text a completion covers: ROUGE-1, ROUGE-2 and ROUGE-L."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from tropism.errors import ConfigError, RewardError
from tropism.rewards.config import closest
from tropism.rewards.raw import RowError
from tropism.texts import plain_text

OverlapMeasure = Literal["rouge1", "rouge2", "rougeL"]
OverlapScore = Literal["f", "precision", "recall"]

MOST_WORDS = 10_000
"""Words at the beginning of each text in which a common subsequence is looked for; all words count for its share."""

_WORD = re.compile(r"[^\W_]+")


def overlap(
    column: str = "reference", measure: OverlapMeasure = "rougeL", score: OverlapScore = "f"
) -> Callable[..., list[float | None]]:
    """How much of a reference the completion covers, 0 to 1 (ROUGE, Lin 2004, https://aclanthology.org/W04-1013).

        precision = common / of the completion    recall = common / of the reference    f = 2 p r / (p + r)

    What is common, and what there is of it, is counted in words (rouge1), pairs of neighbouring words (rouge2), each as
    often as it occurs in both, or as the longest sequence of words that occurs in both in the same order (rougeL).
    Words are runs of letters and digits in lower case, without stemming. Of several references the best counts.

    Args:
        column: the data column with a reference, or a list of them. Null, or an empty list, leaves the completion
            unscored.
        measure: what is compared.
        score: the share of the completion that is common (`precision`), that of the reference (`recall`), or their
            harmonic mean (`f`).
    """
    if not isinstance(column, str) or not column:
        raise ConfigError(f"column: expected the name of a data column, not {column!r}")
    for name, value, choices in (
        ("measure", measure, get_args(OverlapMeasure)),
        ("score", score, get_args(OverlapScore)),
    ):
        if value not in choices:
            raise ConfigError(f"{name}: unknown value {value!r}. {closest(str(value), choices)}")

    def reward_overlap(completions: list[Any], **columns: Any) -> list[float | None]:
        if column not in columns:
            raise RewardError(f"overlap compares with the data column {column!r}; available: {', '.join(columns)}")
        rewards: list[float | None] = []
        for row, (completion, value) in enumerate(zip(completions, columns[column], strict=True)):
            words = words_of(plain_text(completion))
            scores = [rouge(words, reference, measure, score) for reference in _references(value, column, row)]
            rewards.append(max(scores, default=None))
        return rewards

    return reward_overlap


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case; an apostrophe or hyphen parts words, as in the original ROUGE."""
    return _WORD.findall(text.lower())


def rouge(words: Sequence[str], reference: Sequence[str], measure: OverlapMeasure, score: OverlapScore) -> float:
    """One measure of two lists of words; 0 where either has none (for rouge2: no pair)."""
    if measure == "rougeL":
        common, own, wanted = common_subsequence(words[:MOST_WORDS], reference[:MOST_WORDS]), len(words), len(reference)
    else:
        size = 1 if measure == "rouge1" else 2
        counts, reference_counts = _grams(words, size), _grams(reference, size)
        common = (counts & reference_counts).total()
        own, wanted = counts.total(), reference_counts.total()
    if common == 0:
        return 0.0
    if score == "precision":
        return common / own
    if score == "recall":
        return common / wanted
    return 2 * common / (own + wanted)  # 2 p r / (p + r)


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    One bit per word of ``first``, all of them updated at once for each word of ``second`` (Hyyro 2004, after Crochemore
    et al. 2001): a bit that is 0 stands for a word by which the longest common subsequence so far has grown. Two texts
    of ``MOST_WORDS`` take some hundredths of a second.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(first)) - 1
    rows = full
    for word in second:
        matched = rows & places.get(word, 0)
        rows = ((rows + matched) | (rows - matched)) & full
    return len(first) - rows.bit_count()


def _grams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def _references(value: Any, column: str, row: int) -> list[list[str]]:
    """The words of each reference of a record; none where there is no reference."""
    texts = [] if value is None else value if isinstance(value, list | tuple) else [value]
    references = []
    for text in texts:
        if not isinstance(text, str):
            what = f"{type(text).__name__} where a reference should be; give a text, or a list of texts"
            raise RowError(f"the column {column!r} holds {what}", row)
        words = words_of(text)
        if not words:
            raise RowError(f"the column {column!r} holds a reference without words: {text[:60]!r}; give null", row)
        references.append(words)
    return references
