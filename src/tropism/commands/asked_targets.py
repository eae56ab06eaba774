"""Targets as they are written on the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tropism.errors import ConfigError


def parsed_targets(words: Sequence[str], option: str) -> float | dict[str, float] | None:
    """What an option asks for: one number, or a number per name; None where it was not given.

    Args:
        words: as given, ``0.9`` or ``sentiment=0.9``.
        option: for messages.

    Raises:
        ConfigError: no number, a name given twice, or numbers with and without names.
    """
    named: dict[str, float] = {}
    for word in words:
        name, equals, number = word.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (equals and not name):
            raise ConfigError(f"{option} {word!r}: give a number, or NAME=NUMBER, such as sentiment=0.9")
        if name in named:
            raise ConfigError(f"{option} gives {name or 'a number without a name'} twice; give each reward once")
        named[name] = value
    if "" in named and len(named) > 1:
        raise ConfigError(f"{option} has a number without a name beside others; give NAME=NUMBER for each")
    return named.get("", named or None)
