"""Rule-based rewards against hand-made values."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tropism.errors import ConfigError, RewardError
from tropism.rewards import RewardConfig, RewardHarness
from tropism.rewards.registry import make_reward
from tropism.rewards.rules import repeated_share
from tropism.types import RewardInputs

Make = Callable[..., RewardInputs]


def rule(name: str, completions: list[Any], ids: list[list[int]] | None = None, **args: Any) -> list[Any]:
    inputs = RewardInputs(
        prompts=["p"] * len(completions),
        completions=completions,
        completion_ids=ids or [[0]] * len(completions),
        finish_reasons=["eos"] * len(completions),
    )
    return RewardHarness(RewardConfig.of({"use": name, "args": args})).evaluate(inputs).values[name]


TEXTS = ["Good food, GOOD mood!", "goodness me", "", "it's a well-made film"]


def test_words() -> None:
    assert rule("words", TEXTS, words=["good", "it's"]) == [2.0, 0.0, 0.0, 1.0]
    assert rule("words", TEXTS, words=["good", "it's"], mode="share") == [0.5, 0.0, 0.0, 0.25]
    assert rule("words", TEXTS, words=["good", "it's"], mode="presence") == [1.0, 0.0, 0.0, 1.0]
    assert rule("words", TEXTS, words=["good"], case_sensitive=True) == [0.0] * 4
    assert rule("words", TEXTS, words=["well-made"]) == [0.0, 0.0, 0.0, 1.0]


def test_keywords() -> None:
    texts = ["The GOOD food", "good", "no goodness", "food, and it is good"]
    assert rule("keywords", texts, keywords=["good", "food"]) == [1.0, 1.0, 0.0, 1.0]
    assert rule("keywords", texts, keywords=["good", "food"], mode="all") == [1.0, 0.0, 0.0, 1.0]
    assert rule("keywords", texts, keywords=["good", "food"], mode="share") == [1.0, 0.5, 0.0, 1.0]
    assert rule("keywords", texts, keywords=["it is", "(.*)"]) == [0.0, 0.0, 0.0, 1.0]
    assert rule("keywords", texts, keywords=["good"], case_sensitive=True) == [0.0, 1.0, 0.0, 1.0]


def test_length() -> None:
    texts, ids = ["one two", "", "äöü"], [[1, 2, 3], [], [4]]
    assert rule("length", texts, ids, target=2) == [-1.0, -2.0, -1.0]
    assert rule("length", texts, ids, target=2, unit="words") == [0.0, -2.0, -1.0]
    assert rule("length", texts, ids, target=3, unit="characters") == [-4.0, -3.0, 0.0]
    assert rule("length", texts, ids, goal="maximise") == [3.0, 0.0, 1.0]
    assert rule("length", texts, ids, goal="minimise", unit="characters") == [-7.0, 0.0, -3.0]


def test_regex() -> None:
    texts = ["abc", "xabcx", "a\nc"]
    assert rule("regex", texts, pattern="a.c") == [1.0, 0.0, 0.0]
    assert rule("regex", texts, pattern="(?s)a.c") == [1.0, 0.0, 1.0]
    assert rule("regex", texts, pattern="b", match=r"search") == [1.0, 1.0, 0.0]
    assert rule("regex", texts, pattern="b", match=r"search", reward=-2.0) == [-2.0, -2.0, 0.0]


def test_regex_of_exponential_time_is_stopped() -> None:
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"row 1 .*took more than 0.2 s; simplify"):
        rule("regex", ["b", "a" * 200 + "!"], pattern=r"(?:a|aa|(a+)b?\1?)+$", timeout=0.2)
    assert time.monotonic() - start < 5


def test_repetition() -> None:
    texts = ["a b a b a b", "a b c d", "a b", "The the THE the"]
    # trigrams: aba bab aba bab -> 2 of 4 seen before; the-the-the twice -> 1 of 2
    assert rule("repetition", texts) == [-0.5, 0.0, 0.0, -0.5]
    assert rule("repetition", texts, n=1) == [pytest.approx(-4 / 6), 0.0, 0.0, -0.75]
    ids = [[7, 7, 7], [1, 2, 1, 2, 1], [], [5]]
    assert rule("repetition", texts, ids, n=2, unit="tokens") == [-0.5, -0.5, 0.0, 0.0]


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_repeated_share_against_a_slow_count(items: list[int], n: int) -> None:
    seen: list[list[int]] = []
    repeated = 0
    for start in range(len(items) - n + 1):
        gram = items[start : start + n]
        repeated += gram in seen
        seen.append(gram)
    assert repeated_share(items, n) == pytest.approx(repeated / len(seen) if seen else 0.0)


def test_rules_read_chat_messages() -> None:
    chat = [{"role": "assistant", "content": "good film"}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "good "}, {"type": "image"}, {"text": "film"}]}]
    silent = [{"role": "assistant", "content": None}]
    assert rule("words", [chat, parts, silent], words=["good", "film"]) == [2.0, 2.0, 0.0]
    assert rule("length", [chat, parts, silent], unit="characters", goal="maximise") == [9.0, 9.0, 0.0]


@pytest.mark.parametrize("name", ["words", "keywords", "length", "regex", "repetition", "vader"])
@settings(max_examples=20, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=[]), max_size=60))
def test_any_text_gets_a_finite_reward(name: str, text: str) -> None:
    needed: dict[str, dict[str, Any]] = {
        "words": {"words": ["a"]},
        "keywords": {"keywords": ["a"]},
        "length": {"goal": "maximise", "unit": "words"},
        "regex": {"pattern": "a+"},
    }
    assert len(rule(name, [text, "\x00\ufffd" + text], **needed.get(name, {}))) == 2


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("words", {"words": "good"}, "expected a list of texts"),
        ("words", {"words": []}, "not empty"),
        ("words", {"words": ["two words"]}, "'two words' is not a single word"),
        ("words", {"words": ["a"], "mode": "cuont"}, "Did you mean 'count'"),
        ("keywords", {"keywords": [1]}, "expected a list of texts"),
        ("keywords", {"keywords": ["a"], "mode": "some"}, "unknown value 'some'"),
        ("length", {}, "give a target"),
        ("length", {"target": 3, "goal": "maximise"}, "without one"),
        ("length", {"target": 3.5}, "whole number of tokens"),
        ("length", {"target": 3, "unit": "token"}, "Did you mean 'tokens'"),
        ("regex", {"pattern": "("}, "pattern"),
        ("regex", {"pattern": 3}, "expected a regular expression"),
        ("regex", {"pattern": "a", "match": "match"}, "unknown value 'match'"),
        ("repetition", {"n": 0}, "at least 1"),
        ("repetition", {"unit": "letters"}, "unknown value"),
        ("vader", {"score": "comp"}, "Did you mean 'compound'"),
        ("vader", {"text": "prompt"}, "unknown value 'prompt'"),
    ],
)
def test_bad_arguments_are_named(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"reward '{name}': .*{message}"):
        make_reward(name, args)


def test_vader() -> None:
    analyzer = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    texts = ["I love this wonderful film", "a dreadful, boring mess", ""]
    rewards = rule("vader", texts)
    assert rewards == [analyzer.polarity_scores(text)["compound"] for text in texts]
    assert rewards[0] > 0.8 and rewards[1] < -0.5 and rewards[2] == 0.0
    assert rule("vader", texts, score="neg")[1] == analyzer.polarity_scores(texts[1])["neg"]
    both = make_reward("vader", {"text": "prompt+completion"})
    assert both(prompts=["I do not "], completions=["love it"]) == [
        analyzer.polarity_scores("I do not love it")["compound"]
    ]


def test_vader_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError, match=r"reward 'vader'.*pip install 'tropism\[lexicon\]'"):
        make_reward("vader", {})
