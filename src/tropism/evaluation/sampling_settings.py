"""Several ways to sample the same held-out completions: the recipe's own sampling, changed field by field."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from tropism.errors import ConfigError
from tropism.rollouts.config import Sampling, refuse_sweep
from tropism.schema import build

PLACE = "trainer.evaluation.sampling"
LONGEST_LABEL = 100
"""Characters of a label, which becomes a part of the names of metrics and columns."""


def sampling_settings(sampling: Sampling, changes: Sequence[Mapping[str, Any]]) -> dict[str, Sampling]:
    """Each way to sample by its label: ``temperature=0.7``, or ``temperature=0.7,top_k=20`` where more is changed.

    Args:
        sampling: what is changed.
        changes: of each way, fields of ``Sampling`` with their values; those of a mapping in it are changed one by one.

    Raises:
        ConfigError: names the entry and field: an unknown one (with the closest), a value out of range, two equal
            ways, or what cannot differ in evaluation.
    """
    settings: dict[str, Sampling] = {}
    for index, change in enumerate(changes):
        place = f"{PLACE}[{index}]"
        if not isinstance(change, Mapping) or not change:
            raise ConfigError(f"{place}: expected changes to the sampling, such as {{temperature: 0.7}}")
        made = _changed(sampling, change, place)
        label = label_of(made, change)
        if len(label) > LONGEST_LABEL:
            raise ConfigError(
                f"{place}: {label:.60}... would be a part of the names of metrics and columns; change less in one "
                f"entry (at most {LONGEST_LABEL} characters)"
            )
        for other, same in settings.items():
            if same == made:
                raise ConfigError(f"{place}: {label} samples as {other} does; leave one of them out")
        settings[label] = made
    return settings


def label_of(made: Sampling, change: Mapping[str, Any]) -> str:
    """``field=value`` of everything that is changed, in the given order, with dots into nested fields."""
    return ",".join(f"{path}={_text(_value(made, path))}" for path in _paths(change))


def refuse_ambiguous_names(settings: Mapping[str, Sampling], terms: Iterable[str]) -> None:
    """Refuse names of reward terms that a column of another way to sample could have, too.

    Raises:
        ConfigError: names the term.
    """
    for name in terms:
        for label in settings:
            if name.endswith(f"@{label}"):
                raise ConfigError(f"the reward term {name!r} is called as {label} of {PLACE} is; give it another name")


def _changed(sampling: Sampling, change: Mapping[str, Any], place: str) -> Sampling:
    for name in ("batch_size", "compile"):
        if name in change:
            raise ConfigError(
                f"{place}.{name}: it says how completions are computed, not which; set it in sampling, for all"
            )
    try:
        refuse_sweep(change)
    except ValueError as error:
        raise ConfigError(f"{place}: one value of each field, and one entry for each value") from error
    own = {f.name: getattr(sampling, f.name) for f in fields(sampling)}
    for name, value in change.items():
        before = own.get(name)
        if isinstance(value, Mapping) and is_dataclass(before) and not isinstance(before, type):
            value = {f.name: getattr(before, f.name) for f in fields(before)} | dict(value)
        own[name] = value
    made = build(Sampling, own, path=place)
    if made.max_new_tokens > sampling.max_new_tokens:
        raise ConfigError(
            f"{place}.max_new_tokens: {made.max_new_tokens} is more than sampling.max_new_tokens="
            f"{sampling.max_new_tokens}, by which prompts are fitted into the context; raise that one, or lower this"
        )
    return made


def _paths(change: Mapping[str, Any], before: str = "") -> list[str]:
    """Dotted names of all fields that a change names."""
    found: list[str] = []
    for name, value in change.items():
        path = f"{before}{name}"
        value = vars(value) if is_dataclass(value) else value
        found += _paths(value, f"{path}.") if isinstance(value, Mapping) and value else [path]
    return found


def _value(made: Any, path: str) -> Any:
    for name in path.split("."):
        made = getattr(made, name)
    return made


def _text(value: Any) -> str:
    """A value as in a recipe, on one line: 0.7, 100 (also where it is 100.0), none, true, or text."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, str) and value.isprintable() and "," not in value:
        return value
    return "none" if value is None else json.dumps(value)
