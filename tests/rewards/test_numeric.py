"""The number parser: hand-made cases, real references, and texts that try to break it."""

from __future__ import annotations

import gzip
import json
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tropism.errors import ConfigError, RewardError
from tropism.rewards.numeric import answer_of, number_answer, parse_number


@pytest.mark.parametrize(
    ("text", "last", "first"),
    [
        ("18", 18, 18),
        ("He has 3 apples and 4 pears.", 4, 3),
        ("It costs $1,234.50.", Fraction("1234.5"), Fraction("1234.5")),
        ("1,234,567,890", 1234567890, 1234567890),
        ("12,345,678.", 12345678, 12345678),
        ("1,2,3", 3, 1),
        ("1,234,56", 56, 1),
        ("0012", 12, 12),
        ("-5", -5, -5),
        ("+5", 5, 5),
        ("\u22125 degrees", -5, -5),
        ("-$5", -5, -5),
        ("$-5", -5, -5),
        ("\u20ac7", 7, 7),
        ("10-3", 3, 10),
        ("x-3", 3, 3),
        ("(5)-3", 3, 5),
        ("= -3", -3, -3),
        ("pages 3-4", 4, 3),
        (".5", Fraction(1, 2), Fraction(1, 2)),
        ("-.5", Fraction(-1, 2), Fraction(-1, 2)),
        ("5.", 5, 5),
        ("5...", 5, 5),
        ("3/4", Fraction(3, 4), Fraction(3, 4)),
        ("The answer is 3/4.", Fraction(3, 4), Fraction(3, 4)),
        ("-1.5/3", Fraction(-1, 2), Fraction(-1, 2)),
        ("1/2/2024", 2024, 1),
        ("km/5", 5, 5),
        ("1/0", None, None),
        ("50%", 50, 50),
        ("12.5 %", Fraction("12.5"), Fraction("12.5")),
        ("1e3", 1000, 1000),
        ("2.5E-1", Fraction(1, 4), Fraction(1, 4)),
        ("1e999999", None, None),
        ("1e-999999", None, None),
        ("1e51", None, None),
        ("9" * 50, int("9" * 50), int("9" * 50)),
        ("9" * 51, None, None),
        ("7 or " + "9" * 51, None, 7),
        ("1/" + "9" * 51, None, None),
        ("", None, None),
        ("no number", None, None),
        ("nan inf -inf", None, None),
        ("__import__('os').system('exit 3')", 3, 3),
        ("\u0663", None, None),  # digits of other scripts are not read
        ("\u00b2\u00bd", None, None),
        ("0x1F", 1, 0),
        ("\x00 7 \ufffd", 7, 7),
    ],
)
def test_parse_number(text: str, last: Fraction | int | None, first: Fraction | int | None) -> None:
    assert parse_number(text) == last
    assert parse_number(text, last=False) == first


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4\n#### 4", 4),
        ("#### 4 apples, not 5", 4),
        ("#### 3\n#### 4", 4),
        ("the answer is 4\n####", None),
        ("4 #### none", None),
        ("so 2, then 4", 4),
        ("####$1,000", 1000),
    ],
)
def test_the_marker_decides(text: str, answer: int | None) -> None:
    assert answer_of(text) == answer


def test_without_a_marker_the_last_number_counts() -> None:
    assert answer_of("#### 4 apples, not 5", None) == 5
    assert answer_of("A: 3 B", "A:") == 3


@pytest.mark.parametrize(
    "text",
    [
        "9" * 10**6,
        "1," * 500_000,
        "1,111" * 200_000,
        "-" * 10**6,
        "." * 10**6,
        "1/" * 500_000,
        "1e" * 500_000,
        "$-" * 500_000,
        "####" * 250_000,
        "1.1" * 300_000,
        "(" * 10**6 + "1" + ")" * 10**6,
    ],
    ids=lambda text: text[:6],
)
def test_huge_texts_take_no_time(text: str) -> None:
    start = time.monotonic()
    answer_of(text)
    answer_of("#### " + text)
    parse_number(text, last=False)
    assert time.monotonic() - start < 1.0


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789,./-+eE$%# ()x\u2212\n", max_size=200))
def test_any_text_gives_a_number_or_none(text: str) -> None:
    for value in (parse_number(text), parse_number(text, last=False), answer_of(text)):
        assert value is None or isinstance(value, Fraction)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-(10**15), 10**15), st.integers(0, 6), st.sampled_from(["", "$"]), st.sampled_from(["", "%", ".", "!"])
)
def test_written_numbers_are_read_back(number: int, places: int, before: str, after: str) -> None:
    value = Fraction(number, 10**places)
    sign = "-" if number < 0 else ""
    whole, rest = divmod(abs(number), 10**places)
    decimals = f".{rest:0{places}d}" if places else ""
    for written in (f"{whole}{decimals}", f"{whole:,}{decimals}"):
        text = f"The answer to question 7 is {sign}{before}{written}{after}"
        assert parse_number(text) == value
        assert answer_of(f"We get 12.\n#### {sign}{before}{written}{after} and 5 more") == value


@settings(max_examples=100, deadline=None)
@given(st.integers(-999, 999), st.integers(1, 999))
def test_fractions_are_exact(above: int, below: int) -> None:
    assert parse_number(f"so {above}/{below}.") == Fraction(above, below)


def reward(completions: list[Any], references: list[Any], **args: Any) -> list[Any]:
    return number_answer(**args)(completions=completions, answer=references, prompts=[])


def test_rewards() -> None:
    references = ["steps 1, 2\n#### 1,000", "1000", 1000, 1000.0, Fraction(1000)]
    assert reward(["#### 1000"] * 5, references) == [1.0] * 5
    assert reward(["$1,000.00", "999", "none", "9" * 10**6, "1e3"], ["1000"] * 5) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert reward(["0.1"], [0.1]) == [1.0]
    assert reward(["1", "2"], [1, 3], correct=2.0, wrong=-1.0) == [2.0, -1.0]
    assert reward(["0.333", "0.3"], ["1/3"] * 2, tolerance=0.001) == [1.0, 0.0]
    assert reward([[{"role": "assistant", "content": "#### 4"}]], [4]) == [1.0]
    assert reward(["#### 4"], [None]) == [None]


@pytest.mark.parametrize("text", ["9**9**9", "__import__('os').abort()", "1e9**9", "(" * 10**5 + "9" + ")" * 10**5])
def test_nothing_is_evaluated(text: str) -> None:
    start = time.monotonic()
    assert reward([text], [9**9]) == [0.0]  # what it would come to is never asked
    assert time.monotonic() - start < 1.0


def test_the_column_is_named_where_it_is_missing() -> None:
    with pytest.raises(RewardError, match=r"data column 'solution'; available: answer, prompts"):
        reward(["4"], [4], column="solution")


NO_NUMBERS = ["none", "", float("nan"), True, "9" * 100, 10**5000, -(10**60)]


@pytest.mark.parametrize("reference", NO_NUMBERS, ids=range(len(NO_NUMBERS)))
def test_a_reference_without_a_number_is_an_error(reference: Any) -> None:
    with pytest.raises(RewardError, match=r"'answer' holds no number"):
        reward(["4", "4"], [4, reference])


@pytest.mark.parametrize("args", [{"column": ""}, {"tolerance": -1}, {"tolerance": float("nan")}, {"tolerance": "1"}])
def test_bad_arguments(args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(args))):
        number_answer(**args)


def test_real_references(shared: Path) -> None:
    with gzip.open(shared / "data" / "gsm8k" / "test.jsonl.gz", "rt") as lines:
        answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 1319
    plain = [int(answer.split("####")[1].replace(",", "")) for answer in answers]
    assert [answer_of(answer) for answer in answers] == plain
    assert reward(answers, answers) == [1.0] * len(answers)
    assert sum(reward(answers[1:], answers[:-1])) < 60  # a neighbour's answer is rarely right
