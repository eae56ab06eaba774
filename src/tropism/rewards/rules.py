"""Rewards that follow a rule: words, keywords, length, regular expressions, repetition."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, get_args

import regex as timed_regex  # type: ignore[import-untyped]

from tropism.errors import ConfigError
from tropism.rewards.config import closest
from tropism.rewards.raw import RowError
from tropism.texts import plain_text

Rule = Callable[..., list[float]]

WordsMode = Literal["count", "share", "presence"]
KeywordsMode = Literal["any", "all", "share"]
LengthUnit = Literal["tokens", "words", "characters"]
LengthGoal = Literal["target", "maximise", "minimise"]
RegexMatch = Literal["fullmatch", "search"]
RepetitionUnit = Literal["words", "tokens"]

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


def split_words(text: str) -> list[str]:
    """Runs of letters and digits; an apostrophe or hyphen inside belongs to the word."""
    return _WORD.findall(text)


def words(words: Sequence[str], mode: WordsMode = "count", case_sensitive: bool = False) -> Rule:
    """How many words of a completion are in a list.

    Args:
        words: single words, matched whole.
        mode: `count` of matching words, their `share` of all words (0 of none), or `presence`: 1 if there is any.
        case_sensitive: tell upper from lower case.
    """
    _check_choice("mode", mode, WordsMode)
    fold: Callable[[str], str] = str if case_sensitive else str.casefold
    wanted = {fold(word) for word in _texts("words", words)}
    for word in words:
        if split_words(word) != [word]:
            raise ConfigError(f"words: {word!r} is not a single word; use the reward `keywords` for phrases")

    def reward_words(completions: list[Any]) -> list[float]:
        rewards = []
        for completion in completions:
            found = [fold(word) in wanted for word in split_words(plain_text(completion))]
            count = sum(found)
            rewards.append(
                float(count > 0) if mode == "presence" else count / (max(len(found), 1) if mode == "share" else 1)
            )
        return rewards

    return reward_words


def keywords(keywords: Sequence[str], mode: KeywordsMode = "any", case_sensitive: bool = False) -> Rule:
    """Whether a completion contains words or phrases, bounded by non-letters on both sides.

    Args:
        keywords: words or phrases.
        mode: 1 if it contains `any`, 1 if it contains `all`, or the `share` of them that it contains.
        case_sensitive: tell upper from lower case.
    """
    _check_choice("mode", mode, KeywordsMode)
    flags = re.NOFLAG if case_sensitive else re.IGNORECASE
    patterns = [re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", flags) for phrase in _texts("keywords", keywords)]

    def reward_keywords(completions: list[Any]) -> list[float]:
        rewards = []
        for completion in completions:
            text = plain_text(completion)
            found = [pattern.search(text) is not None for pattern in patterns]
            rewards.append(
                sum(found) / len(found) if mode == "share" else float(any(found) if mode == "any" else all(found))
            )
        return rewards

    return reward_keywords


def length(target: int | None = None, unit: LengthUnit = "tokens", goal: LengthGoal = "target") -> Rule:
    """The length of a completion: near a target, long or short.

        target:    -|length - target|
        maximise:   length
        minimise:  -length

    Args:
        target: the wanted length; needed by the goal `target` and refused by the others.
        unit: `tokens` (the final eos included where the model produced it), `words` or `characters`.
        goal: what is rewarded.
    """
    _check_choice("unit", unit, LengthUnit)
    _check_choice("goal", goal, LengthGoal)
    if (target is None) == (goal == "target"):
        raise ConfigError("length: give a target, or the goal 'maximise' or 'minimise' without one")
    if target is not None and (isinstance(target, bool) or not isinstance(target, int) or target < 0):
        raise ConfigError(f"target: expected a whole number of {unit}, not {target!r}")

    def rewards_of(lengths: list[int]) -> list[float]:
        if target is not None:
            return [-float(abs(count - target)) for count in lengths]
        return [float(count if goal == "maximise" else -count) for count in lengths]

    def reward_length(completions: list[Any]) -> list[float]:
        measured: Callable[[str], int] = len if unit == "characters" else lambda text: len(split_words(text))
        return rewards_of([measured(plain_text(completion)) for completion in completions])

    def reward_tokens(completion_ids: list[list[int]]) -> list[float]:
        return rewards_of([len(ids) for ids in completion_ids])

    return reward_tokens if unit == "tokens" else reward_length


def regex(pattern: str, match: RegexMatch = "fullmatch", reward: float = 1.0, timeout: float = 1.0) -> Rule:
    """A reward where a regular expression matches, 0 elsewhere.

    The syntax is that of Python's `re`. A pattern that takes exponential time on what the model writes is stopped.

    Args:
        pattern: the regular expression; `(?s)` at its start lets a dot match line breaks.
        match: the whole completion (`fullmatch`) or anywhere in it (`search`).
        reward: what a match is worth; negative to punish one.
        timeout: seconds per completion; more is an error that names the row.
    """
    _check_choice("match", match, RegexMatch)
    if not isinstance(pattern, str):
        raise ConfigError(f"pattern: expected a regular expression, not {pattern!r}")
    try:
        compiled = timed_regex.compile(pattern)
    except timed_regex.error as error:
        raise ConfigError(f"pattern {pattern!r}: {error}") from error

    def reward_regex(completions: list[Any]) -> list[float]:
        rewards = []
        for row, completion in enumerate(completions):
            apply = compiled.fullmatch if match == "fullmatch" else compiled.search
            try:
                rewards.append(float(reward) if apply(plain_text(completion), timeout=timeout) else 0.0)
            except TimeoutError:
                message = f"the pattern {pattern!r} took more than {timeout} s; simplify its nested repetitions"
                raise RowError(message, row) from None
        return rewards

    return reward_regex


def repetition(n: int = 3, unit: RepetitionUnit = "words") -> Rule:
    """A penalty between -1 and 0: minus the share of a completion's n-grams that occurred in it before.

        -(1 - distinct n-grams / n-grams), 0 for a completion with no n-gram

    Args:
        n: length of the n-grams.
        unit: n-grams of `words` (case-insensitive) or of `tokens`.
    """
    _check_choice("unit", unit, RepetitionUnit)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError(f"n: expected a whole number of at least 1, not {n!r}")

    def reward_repetition(completions: list[Any]) -> list[float]:
        return [-repeated_share(split_words(plain_text(completion).casefold()), n) for completion in completions]

    def reward_repeated_tokens(completion_ids: list[list[int]]) -> list[float]:
        return [-repeated_share(ids, n) for ids in completion_ids]

    return reward_repeated_tokens if unit == "tokens" else reward_repetition


def repeated_share(items: Sequence[Hashable], n: int) -> float:
    """Share of the n-grams of a sequence that occurred in it before; 0 where there is none."""
    grams = [tuple(items[start : start + n]) for start in range(len(items) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"{name}: unknown value {value!r}. {closest(str(value), get_args(choices))}")


def _texts(name: str, values: Any) -> list[str]:
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or not values or not all(isinstance(value, str) and value.strip() for value in values):
        raise ConfigError(f"{name}: expected a list of texts that is not empty, not {values!r}")
    return list(values)
