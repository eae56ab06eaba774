"""Overlap with references against values counted by hand, and its common subsequence against the slow table."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tropism.errors import ConfigError, RewardError
from tropism.rewards import RewardConfig, RewardHarness
from tropism.rewards.overlap import MOST_WORDS, common_subsequence, rouge, words_of
from tropism.rewards.registry import make_reward
from tropism.types import RewardInputs


def overlaps(completions: list[Any], references: list[Any], **args: Any) -> list[Any]:
    inputs = RewardInputs(
        prompts=["p"] * len(completions),
        completions=completions,
        completion_ids=[[]] * len(completions),
        finish_reasons=["eos"] * len(completions),
        columns={"reference": references},
    )
    return RewardHarness(RewardConfig.of({"use": "overlap", "args": args})).evaluate(inputs).values["overlap"]


CAT = "The cat sat on the mat."
"""6 words, 5 pairs: the cat, cat sat, sat on, on the, the mat."""
OTHER = "the cat on the red mat"
"""6 words, 5 pairs: the cat, cat on, on the, the red, red mat. In order in both: the cat on the mat."""


@pytest.mark.parametrize(
    ("measure", "completion", "common", "own", "wanted"),
    [
        ("rouge1", OTHER, 5, 6, 6),  # the the cat on mat
        ("rouge2", OTHER, 2, 5, 5),  # the cat, on the
        ("rougeL", OTHER, 5, 6, 6),
        ("rouge1", "mat the on SAT cat The", 6, 6, 6),  # order does not matter
        ("rougeL", "mat the on SAT cat The", 3, 6, 6),  # the on the
        ("rouge2", "mat the on SAT cat The", 0, 5, 5),
        ("rouge1", "the the the", 2, 3, 6),  # as often as in both
        ("rouge2", "the the the", 0, 2, 5),
        ("rougeL", "the the the", 2, 3, 6),
        ("rouge1", "cat", 1, 1, 6),
        ("rouge2", "cat", 0, 0, 5),
        ("rougeL", "a b c d sat e f mat", 2, 8, 6),
    ],
)
def test_hand_counted(measure: Any, completion: str, common: int, own: int, wanted: int) -> None:
    precision = common / own if common else 0.0
    recall = common / wanted
    f = 2 * precision * recall / (precision + recall) if common else 0.0
    for score, expected in (("precision", precision), ("recall", recall), ("f", f)):
        (value,) = overlaps([completion], [CAT], measure=measure, score=score)
        assert value == pytest.approx(expected, abs=1e-12), score


def test_the_default_is_the_f_measure_of_rouge_l() -> None:
    assert overlaps([OTHER], [CAT]) == [pytest.approx(5 / 6)]
    assert overlaps(["cat mat"], [CAT]) == [pytest.approx(0.5)]  # precision 1, recall 1/3


def test_words_are_letters_and_digits_in_lower_case() -> None:
    assert words_of("Don't stop: GPT-2's 3.5_x, ÄRGER\u2014naïve!") == [
        *("don", "t", "stop", "gpt", "2", "s", "3", "5", "x", "ärger", "naïve")
    ]
    assert overlaps(["naïve ÄRGER"], ["Ärger, NAÏVE"], measure="rouge1") == [1.0]


def test_of_several_references_the_best_counts() -> None:
    values = overlaps(
        ["red mat"] * 4, [["the cat", "a red mat", "red"], ["the cat"], ("red mat",), "red mat"], measure="rouge1"
    )
    assert values == [pytest.approx(0.8), 0.0, 1.0, 1.0]  # 2 of 2 and 2 of 3 words


def test_no_reference_is_no_opinion_and_no_words_are_no_overlap() -> None:
    assert overlaps(["a", "a", "", "..."], [None, [], "a", ["a", "b"]]) == [None, None, 0.0, 0.0]


def test_chats_are_compared_by_their_text() -> None:
    assert overlaps([[{"role": "assistant", "content": "red mat"}]], ["red mat"]) == [1.0]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (3, r"row 0 .*the column 'reference' holds int where a reference should be; give a text"),
        (["a", None], r"the column 'reference' holds NoneType where"),
        ("...", r"the column 'reference' holds a reference without words: '...'; give null"),
        (["a", ""], r"reference without words: ''"),
    ],
)
def test_what_is_no_reference_is_refused(reference: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        overlaps(["a"], [reference])


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"measure: unknown value 'rouge_l'\. Did you mean 'rougeL'"):
        make_reward("overlap", {"measure": "rouge_l"})
    with pytest.raises(ConfigError, match="score: unknown value 'f1'"):
        make_reward("overlap", {"score": "f1"})
    with pytest.raises(ConfigError, match="column: expected the name of a data column, not 3"):
        make_reward("overlap", {"column": 3})
    with pytest.raises(RewardError, match=r"overlap compares with the data column 'target'; available: .*reference"):
        overlaps(["a"], ["a"], column="target")


# ---- the longest common subsequence --------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from("abcde"), max_size=40)


def slow_common_subsequence(first: list[str], second: list[str]) -> int:
    """The textbook's table."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first, start=1):
        for j, other in enumerate(second, start=1):
            table[i][j] = table[i - 1][j - 1] + 1 if one == other else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


@given(first=WORDS, second=WORDS)
@settings(max_examples=300, deadline=None)
def test_the_longest_common_subsequence_is_that_of_the_slow_table(first: list[str], second: list[str]) -> None:
    assert common_subsequence(first, second) == slow_common_subsequence(first, second)
    assert common_subsequence(first, second) == common_subsequence(second, first)


def test_the_common_subsequence_of_more_words_than_a_machine_word_has_bits() -> None:
    first = [str(i * 7 % 31) for i in range(300)]
    second = [str(i * 11 % 37) for i in range(400)]
    assert common_subsequence(first, second) == slow_common_subsequence(first, second)


@given(first=WORDS, second=WORDS)
@settings(max_examples=100, deadline=None)
def test_every_measure_lies_between_nothing_and_all(first: list[str], second: list[str]) -> None:
    for measure in ("rouge1", "rouge2", "rougeL"):
        precision, recall, f = (rouge(first, second, measure, score) for score in ("precision", "recall", "f"))
        assert 0 <= min(precision, recall) <= f + 1e-12 <= max(precision, recall) + 2e-12 <= 1 + 2e-12
        assert rouge(second, first, measure, "recall") == precision
    assert rouge(first, second, "rougeL", "f") <= rouge(first, second, "rouge1", "f") + 1e-12


def test_hostile_lengths_take_bounded_work() -> None:
    """A million words on both sides: the table would have 10**12 cells."""
    text = "ab ba " * 500_000
    started = time.monotonic()
    (value,) = overlaps([text], [text[3:]])
    assert time.monotonic() - started < 20  # about two seconds on an idle machine
    # The first ten thousand words of each, of which all but one are common; every word counts for the share.
    assert value == pytest.approx(2 * (MOST_WORDS - 1) / (1_000_000 + 999_999))
