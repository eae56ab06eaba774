from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from tropism.evaluation.text_quality import WordShift, distinct_n, distinct_texts, repetition, risen_words


def test_distinct_n_counts_over_all_texts() -> None:
    # pairs: (a b) (b a) (a b) and (a b) (b c): 5, of which 3 differ
    assert distinct_n(["a b a b", "A, b! c"], 2) == pytest.approx(3 / 5)
    # words: a b a b a b c: 7, of which 3 differ
    assert distinct_n(["a b a b", "A, b! c"], 1) == pytest.approx(3 / 7)


def test_words_keep_inner_apostrophes() -> None:
    assert distinct_n(["don't", "don\u2019t", "don t"], 1) == pytest.approx(4 / 4)
    assert distinct_n(["it's it's"], 1) == pytest.approx(1 / 2)


def test_repetition_is_averaged_over_texts_long_enough() -> None:
    # "good" six times: 4 triples, 1 distinct -> 3/4; "a b c d": nothing repeated -> 0; "a b": left out
    assert repetition(["good good good good good good", "a b c d", "a b"]) == pytest.approx(3 / 8)


def test_distinct_texts_ignores_white_space() -> None:
    assert distinct_texts(["a  b", " a b\n", "a c", "A b"]) == pytest.approx(3 / 4)


def test_texts_without_words_have_no_score() -> None:
    assert math.isnan(distinct_n(["", "..."], 1))
    assert math.isnan(repetition(["one two"], 3))


def test_risen_words_by_growth_of_share() -> None:
    before, after = ["the film was dull", "the end was near"], ["great great film", "great love"]
    assert risen_words(before, after, count=2) == [
        WordShift(word="great", before=0.0, after=3 / 5),
        WordShift(word="love", before=0.0, after=1 / 5),
    ]
    assert risen_words(before, before) == []


@pytest.mark.parametrize(
    "measure", [lambda t: distinct_n(t, 2), repetition, distinct_texts, lambda t: risen_words(t, ["a"])]
)
def test_no_texts_are_refused(measure: Callable[[list[str]], object]) -> None:
    with pytest.raises(ValueError, match="no texts"):
        measure([])


def test_n_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        distinct_n(["a"], 0)
