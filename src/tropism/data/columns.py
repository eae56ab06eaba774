"""Which column of a record is the prompt, and what it says: text or chat messages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from tropism.data.config import DataConfig, template_parts
from tropism.data.files import listed
from tropism.data.readers import Record
from tropism.errors import ConfigError, DataError
from tropism.types import Messages

_WORD = re.compile(r"\S+")


def choose_column(records: Sequence[Record], preferred: Sequence[str], *, but: str | None = None) -> str:
    """The first of the preferred columns that a record has, else the only column.

    Args:
        records: at least one.
        preferred: names in order of preference.
        but: a column that is spoken for.

    Raises:
        DataError: several columns, none of them preferred; lists them.
    """
    names = [name for name in _column_names(records) if name != but]
    for name in preferred:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise DataError(
        f"{records[0].where}: none of the columns is called {' or '.join(preferred)}; name the one to use in"
        f" prompt_column. There are: {listed(names) or 'none'}"
    )


def _column_names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.columns))


def other_columns(records: Sequence[Record], but: str | None) -> Iterator[dict[str, Any]]:
    """For each record all columns of the data but one; a column that the record lacks is None."""
    names = [name for name in _column_names(records) if name != but]
    for record in records:
        yield {name: record.columns.get(name) for name in names}


def value_of(record: Record, name: str) -> Any:
    """A column's value; ``a.b`` reaches into a nested record, unless there is a column of that very name.

    Raises:
        DataError: no such column, or no value (null) in it.
    """
    value: Any = record.columns
    for part in [name] if name in record.columns else name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise DataError(f"{record.where}: there is no column {name!r}; there are: {listed(record.columns)}")
        value = value[part]
    if value is None:
        raise DataError(f"{record.where}: the column {name!r} is null")
    return value


def text_or_messages(record: Record, name: str) -> str | Messages:
    """A column that must hold text or chat messages."""
    value = value_of(record, name)
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return _messages(value, f"{record.where}, column {name!r}")
    hint = ""
    if isinstance(value, Mapping):
        hint = f"; reach into it, for example with {name}.{next(iter(value), 'text')}"
    if isinstance(value, bytes | bytearray):
        hint = "; store it as text (a string column), not as bytes"
    raise DataError(
        f"{record.where}: the column {name!r} is {type(value).__name__}, expected text or chat messages{hint}"
    )


def _messages(value: Sequence[Any], where: str) -> Messages:
    if not value:
        raise DataError(f"{where}: the list of messages is empty")
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {index} is not of the form {{role: ..., content: ...}}")
        content = message.get("content")
        if isinstance(content, str | list) or (content is None and message.get("tool_calls")):
            continue
        raise DataError(f"{where}: the content of message {index} ({message['role'][:60]}) is not text")
    return [dict(message) for message in value]


def fill_template(template: str, record: Record) -> str:
    """The template with the record's values in place of the names in braces."""
    pieces: list[str] = []
    for literal, name in template_parts(template):
        pieces.append(literal)
        if name is not None:
            value = value_of(record, name)
            if not isinstance(value, str | int | float):
                raise DataError(f"{record.where}: {{{name}}} of the template is {type(value).__name__}, not text")
            pieces.append(_as_text(value, f"{record.where}: {{{name}}} of the template"))
    return "".join(pieces)


def _as_text(value: str | int | float, what: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{what} is {value}, which stands for a missing number; leave the record out")
    try:
        return str(value)
    except ValueError as error:  # Python's limit on digits
        raise DataError(f"{what} is a whole number with thousands of digits; give it as text") from error


def prompt_value(record: Record, column: str | None, config: DataConfig | None) -> str | Messages:
    """What the user wrote: the filled template or the column, before ``first_words`` and chat settings."""
    if config is not None and config.template is not None:
        return fill_template(config.template, record)
    return text_or_messages(record, cast(str, column))


def end_of_words(text: str, count: int) -> int | None:
    """Where the ``count``-th word of the text ends; None where there are fewer."""
    for number, word in enumerate(_WORD.finditer(text), start=1):
        if number == count:
            return word.end()
    return None


def as_chat(prompt: str | Messages, config: DataConfig | None) -> str | Messages:
    """Text as one user message where the settings say ``chat``, and the system prompt before a chat without one."""
    if config is None:
        return prompt
    if isinstance(prompt, str):
        if not config.chat:
            if config.system_prompt is not None:
                raise ConfigError("system_prompt needs chat messages, but the prompts are plain text; set chat: true")
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if config.system_prompt is not None and prompt[0]["role"] != "system":
        return [{"role": "system", "content": config.system_prompt}, *prompt]
    return prompt
