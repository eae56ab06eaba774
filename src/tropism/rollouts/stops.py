"""The text that completion tokens spell, and the stop strings in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tropism.errors import ConfigError

CONTEXT = 4
"""Tokens before a piece of text that settle how it begins: the space of its first word, a character cut into bytes."""


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of token ids: special tokens left out, what is no text as U+FFFD, spaces as they are."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)


def added_text(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """What ``ids`` add to the text of ``before``: decoded alone, many tokenizers lose a leading space."""
    if not before:
        return decode(tokenizer, ids)
    head, whole = decode(tokenizer, before), decode(tokenizer, [*before, *ids])
    return whole[len(head) :] if whole.startswith(head) else decode(tokenizer, ids)


class StopStrings:
    """Whether a completion has just spelled one of the stop strings."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        """Raises ConfigError for a string that no text can hold."""
        for string in strings:
            if _LONE_SURROGATE.search(string):
                raise ConfigError(f"sampling.stop: {string!r:.60} holds half a surrogate pair, which no text can")
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)
        # A token that is text spells at least one byte, so a string was completed within this many tokens or not now.
        self.window = max(len(s.encode()) for s in strings) + CONTEXT

    def ended(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> bool:
        """Whether the newest token of the completion ``ids`` completes a stop string; the prompt's text is no part."""
        tail: list[int] = []
        for token in reversed(ids):
            if len(tail) == self.window:
                break
            if token not in self.special:
                tail.append(token)
        context = prompt_ids[-CONTEXT:] if len(tail) < self.window else ()
        text = added_text(self.tokenizer, context, tail[::-1])
        return any(string in text for string in self.strings)


def cut_at_stop(text: str, strings: Sequence[str]) -> str:
    """The text before the first of the stop strings, or all of it."""
    places = [place for place in (text.find(string) for string in strings) if place >= 0]
    return text[: min(places)] if places else text
