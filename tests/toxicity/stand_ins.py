"""Prompts, and a mild stand-in for toxicity: whether a text holds one letter."""

from __future__ import annotations

PROMPTS = ["a cat sat", "b", "the dog was", "no, sir!", "a a a", "we go", "x", "one more of them"]


def letter(completions: list[str]) -> list[float]:
    """1 where a text holds the letter a, else 0.25."""
    return [1.0 if "a" in text else 0.25 for text in completions]


def brief(completions: list[str]) -> list[float]:
    """Minus the number of letters: no probability."""
    return [-float(len(text)) for text in completions]
