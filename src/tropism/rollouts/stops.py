"""Stop strings, seen in the text that the tokens spell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StopStrings:
    """Whether a completion has just spelled one of the stop strings."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        # A token spells at least one byte, so a string can only have been completed within this many tokens.
        self.window = max(len(s.encode()) for s in strings) + 4

    def ended(self, ids: Sequence[int]) -> bool:
        text = self.tokenizer.decode(ids[-self.window :], skip_special_tokens=True)
        return any(string in text for string in self.strings)


def cut_at_stop(text: str, strings: Sequence[str]) -> str:
    """The text before the first of the stop strings, or all of it."""
    places = [place for place in (text.find(string) for string in strings) if place >= 0]
    return text[: min(places)] if places else text
