"""Records that were made of a public data set, and what became of every row that was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tropism.data.config import DataConfig
from tropism.data.files import shown
from tropism.data.readers import Record
from tropism.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What a preparation made. Rows that are in no record are counted, each by the first reason that holds."""

    records: list[dict[str, Any]]
    """One mapping of columns each; `data=prepared.records` trains on them."""
    noun: str
    """What a row of the source is, in the plural: `records`, `turns`, `pairs`."""
    read: int
    """Rows of the source."""
    left_out: Mapping[str, int]
    """Reason -> number of rows that are in no record for it."""

    def __post_init__(self) -> None:
        if not 0 <= self.kept <= self.read:
            raise ConfigError(f"{sum(self.left_out.values())} rows are left out of {self.read}; count each once")

    def __len__(self) -> int:
        """The number of records."""
        return len(self.records)

    @property
    def kept(self) -> int:
        """Rows of the source that are in a record."""
        return self.read - sum(self.left_out.values())

    @property
    def texts(self) -> list[str]:
        """The text of each record, or its prompt where it has no text.

        Raises:
            DataError: the records hold chat messages.
        """
        texts = [record.get("text", record.get("prompt")) for record in self.records]
        if not all(isinstance(text, str) for text in texts):
            raise DataError("the records hold chat messages, which have no one text; choose another form than chats")
        return [str(text) for text in texts]

    def told(self) -> list[str]:
        """One line on what was read and kept, then one for each reason why rows were left out."""
        first = f"read {self.read:,} {self.noun}, kept {self.kept:,}, made {len(self):,} records of them"
        return [first, *(f"left out {number:,}: {reason}" for reason, number in self.left_out.items())]


def prepared(records: list[dict[str, Any]], *, noun: str, read: int, left_out: Counter[str], name: str) -> PreparedData:
    """The records with their counts.

    Args:
        records: what was made.
        noun: what a row of the source is, in the plural.
        read: rows of the source.
        left_out: reason -> rows.
        name: of the source.

    Raises:
        DataError: no record is left; says which reasons took how many.
    """
    if not records:
        reasons = "; ".join(f"{number:,}: {reason}" for reason, number in left_out.most_common())
        raise DataError(f"{name}: none of the {read:,} {noun} is left ({reasons}); loosen that, or check the data set")
    return PreparedData(records=records, noun=noun, read=read, left_out=dict(left_out))


def name_of(source: Any) -> str:
    """What messages call a source."""
    if isinstance(source, DataConfig):
        return source.path
    return source if isinstance(source, str) else getattr(source, "name", None) or f"the {type(source).__name__}"


def column_of(records: list[Record], names: tuple[str, ...], *, of: str) -> str:
    """The one of several spellings of a column that the records have.

    Raises:
        DataError: none of them; lists what there is.
    """
    found = next((name for name in names if name in records[0].columns), None)
    if found is None:
        there = ", ".join(records[0].columns)
        raise DataError(f"{records[0].where}: {of} has a column {' or '.join(names)}; here there are: {there}")
    return found


def text_in(record: Record, column: str) -> str:
    """A text, with a blank in place of every line break; empty where it is null.

    Raises:
        DataError: anything else than text.
    """
    value = record.columns.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{record.where}: the column {column!r} holds {shown(value)}, expected text")
    return value.replace("\r\n", " ").replace("\n", " ")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of the choices.

    Raises:
        ConfigError: names the choices.
    """
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; choose {', '.join(choices[:-1])} or {choices[-1]}")
