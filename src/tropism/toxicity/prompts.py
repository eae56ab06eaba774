"""The prompts of a measurement: which records and text, how toxic the data says they are, what the model reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from tropism.data.columns import choose_column, other_columns, text_or_messages, value_of
from tropism.data.config import DataConfig
from tropism.data.prompts import PROMPT_COLUMNS, make_prompts
from tropism.data.readers import Record, locate_records
from tropism.errors import ConfigError, DataError
from tropism.rewards.config import closest
from tropism.texts import plain_text
from tropism.types import Messages, Prompt

PLACE = "{prompt}"
"""Stands in a template where the prompt goes."""
NESTED = "prompt.text"
"""Where RealToxicityPrompts has the text of a prompt."""
OWN_TOXICITY = ("prompt_toxicity", "toxicity")
"""Columns that say how toxic a prompt is, in order of preference, where the records are not nested."""
NO_COLUMN = "none"
"""As ``toxicity_column``: the data says nothing of it."""
_INDEX = "index of the prompt"
_READ = ("path", "split", "subset", "revision", "prompt_column", "limit")
"""Fields of ``DataConfig`` that mean something here."""

Overlong = Literal["error", "truncate_left", "leave_out"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which records of the data are measured; all of them, unless something here says otherwise."""

    prompt_column: str | None = None
    """Column with the prompt. Default: `prompt.text` of RealToxicityPrompts, else `prompt`, `messages` or `text`, else
    the only column."""
    challenging: bool = False
    """Take only prompts that RealToxicityPrompts marks as challenging."""
    skip: int = 0
    """Leave out so many prompts at the front."""
    limit: int | None = None
    """Take at most so many of the others; None: all."""
    overlong: Overlong = "error"
    """A prompt that leaves no room for the completion is an error, loses its beginning, or is left out and counted."""

    toxicity_column: str | None = None
    """Column that says how toxic a prompt is, from 0 to 1; a.b reaches into nested records; `none`: no column. Default:
    beside a nested prompt `toxicity`, else `prompt_toxicity` or `toxicity`, where there is one."""

    def __post_init__(self) -> None:
        if self.skip < 0:
            raise ConfigError(f"skip must not be negative, got {self.skip}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, got {self.limit}")
        if self.overlong not in get_args(Overlong):
            raise ConfigError(f"overlong is {self.overlong!r}; choose one of {', '.join(get_args(Overlong))}")


@dataclass(frozen=True, kw_only=True)
class Framing:
    """What the model reads around a prompt."""

    custom_prompt: str = PLACE
    """The text that the model reads, with `{prompt}` where the prompt goes; other braces are plain text."""
    chat: bool = False
    """Send it as a user's message through the model's chat template."""
    system_prompt: str | None = None
    """System message before every chat."""

    def __post_init__(self) -> None:
        if PLACE not in self.custom_prompt:
            raise ConfigError(
                f"custom_prompt is {self.custom_prompt!r:.120} and does not hold {PLACE}, so the model would never see"
                f" a prompt; write {PLACE} where the prompt goes"
            )
        if self.system_prompt is not None and not self.chat:
            raise ConfigError("system_prompt needs chat=True (--chat)")

    def applied(self, text: str | Messages, where: str) -> str | Messages:
        """The text of a prompt as the model is to read it, before any chat template."""
        if isinstance(text, str):
            return self.custom_prompt.replace(PLACE, text)
        if self.custom_prompt != PLACE:
            raise ConfigError(f"{where}: custom_prompt frames plain text, but the prompt is a list of chat messages")
        return text


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One prompt of a measurement."""

    text: str
    """As it stands in the data, without the template; of chat messages their contents."""
    toxicity: float
    """What the data says, in [0, 1]; NaN where it says nothing."""
    prompt: Prompt
    """What the model reads."""
    where: str = ""
    """Its place in the data, for messages."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A record that is measured, before a tokenizer has seen it."""

    record: Record
    text: str | Messages
    toxicity: float
    columns: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen of the data, and of how much."""

    prompts: tuple[Chosen, ...]
    records: int
    """In the data."""
    filtered: int
    """Of these what the filter left."""


def choose(source: Any, selection: Selection) -> Choice:
    """The prompts of a data set that are measured.

    Args:
        source: a list of texts or records, a file, a ``datasets.Dataset``, a hub id, or a ``DataConfig``.

    Raises:
        DataError: no such data or column, a toxicity that is no number in [0, 1], or no prompt that is left.
    """
    selection = _with_settings_of(source, selection)
    records = locate_records(source)
    column = selection.prompt_column or _column(records)
    toxicity = _toxicity_column(records, column, selection.toxicity_column)
    kept = [pair for pair in zip(records, other_columns(records, column), strict=True) if _wanted(pair[0], selection)]
    part = kept[selection.skip :][: selection.limit]
    if not part:
        filters = [f"challenging keeps {len(kept)}"] if selection.challenging else []
        filters += [f"skip leaves out {selection.skip}"] if selection.skip else []
        raise DataError(f"none of the {len(records)} prompts is left: {', '.join(filters)}. Choose fewer filters")
    chosen = [
        Chosen(
            record=record,
            text=text_or_messages(record, column),
            toxicity=_toxicity(record, toxicity),
            columns=columns,
        )
        for record, columns in part
    ]
    return Choice(prompts=tuple(chosen), records=len(records), filtered=len(kept))


def encode(choice: Choice, tokenizer: Any, framing: Framing, *, room: int | None, overlong: Overlong) -> list[Asked]:
    """What the model reads of every prompt.

    Args:
        room: most tokens of a prompt; None: any number.
        overlong: as in ``Selection``; those left out are missing in the list.

    Raises:
        DataError: a prompt that cannot be read, or is too long; none is left.
    """
    framed = [
        Record(where=one.record.where, columns={"prompt": framing.applied(one.text, one.record.where), _INDEX: index})
        for index, one in enumerate(choice.prompts)
    ]
    config = DataConfig(
        path="the prompts", prompt_column="prompt", chat=framing.chat, system_prompt=framing.system_prompt
    )
    asked = []
    for prompt in make_prompts(framed, tokenizer, config, max_length=room, overlong=overlong):
        one = choice.prompts[prompt.columns[_INDEX]]
        own = replace(prompt, columns=one.columns)
        asked.append(Asked(text=plain_text(one.text), toxicity=one.toxicity, prompt=own, where=one.record.where))
    if not asked:
        raise DataError(
            f"none of the {len(choice.prompts)} prompts is left: each has more than {room} tokens, beside which no"
            " completion fits; sample fewer tokens"
        )
    return asked


def _with_settings_of(source: Any, selection: Selection) -> Selection:
    """The selection with the column and limit of a ``DataConfig``, whose other fields have no meaning here."""
    if not isinstance(source, DataConfig):
        return selection
    plain = DataConfig(path=source.path)
    for name in (f.name for f in fields(DataConfig)):
        if name not in _READ and getattr(source, name) != getattr(plain, name):
            raise ConfigError(
                f"data.{name} is not for measuring toxicity; custom_prompt, chat and overlong say how prompts are read"
            )
    return replace(
        selection,
        prompt_column=selection.prompt_column or source.prompt_column,
        limit=selection.limit if selection.limit is not None else source.limit,
    )


def _column(records: Sequence[Record]) -> str:
    first = records[0].columns.get("prompt")
    return NESTED if isinstance(first, Mapping) and "text" in first else choose_column(records, PROMPT_COLUMNS)


def _wanted(record: Record, selection: Selection) -> bool:
    if not selection.challenging:
        return True
    value = value_of(record, "challenging")
    if not isinstance(value, bool):
        raise DataError(f"{record.where}: challenging is {value!r:.60}, neither true nor false")
    return value


def _toxicity_column(records: Sequence[Record], column: str, chosen: str | None) -> str | None:
    """Where the data says how toxic its prompts are; None where it does not.

    Raises:
        DataError: no record has the chosen column.
    """
    if chosen == NO_COLUMN:
        return None
    if chosen is not None:
        first = chosen.partition(".")[0]
        if not any(name in record.columns for record in records for name in (chosen, first)):
            names = {name for record in records for name in record.columns}
            raise DataError(f"toxicity_column: there is no column {chosen!r}. {closest(chosen, names)}")
        return chosen
    parent, dot, _ = column.rpartition(".")
    if dot and column not in records[0].columns:
        return f"{parent}.toxicity"
    known = {name for record in records for name in record.columns}
    return next((name for name in OWN_TOXICITY if name in known), None)


def _toxicity(record: Record, column: str | None) -> float:
    if column is None:
        return math.nan
    value: Any = record.columns
    for part in [column] if column in record.columns else column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None or value == "":
        return math.nan
    try:
        number = float(value)  # in a table every value is text
    except (TypeError, ValueError):
        number = math.inf
    if math.isnan(number):
        return math.nan
    if not 0 <= number <= 1:
        raise DataError(
            f"{record.where}: {column} is {value!r:.60}, expected the toxicity of the prompt, a number from 0 to 1; if"
            f" the column is something else, name another or {NO_COLUMN} (toxicity_column, --toxicity-column)"
        )
    return number
