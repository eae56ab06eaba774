"""A file of records with rewards: it appears once all are there, and until then its rewards grow beside it.

While ``scores.jsonl`` is made, ``scores.jsonl.partial`` takes one line per record with its new columns, and
``scores.jsonl.state.json`` says to which data and reward they belong. Both go when the file is whole.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tropism.errors import ConfigError, DataError, StorageError
from tropism.storage import append_whole, write_whole, writing

VERSION = 1
SUFFIXES = (".jsonl", ".parquet")
"""Kinds of files that can be written."""

Row = Mapping[str, Any]
"""Columns of one record."""


class ScoredFile:
    """The growing columns of a file.

    Args:
        path: the file, ``.jsonl`` or ``.parquet``.
        overwrite: replace a file that is there, once the new one is whole; and begin anew where the columns so far
            belong to something else.

    Raises:
        ConfigError: another kind of file, a folder, or a file that is there already.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path, self._overwrite = Path(path), overwrite
        self._state = self.path.with_name(f"{self.path.name}.state.json")
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._total = self.done = 0
        if self.path.suffix not in SUFFIXES:
            raise ConfigError(f"{self.path}: name a .jsonl or .parquet file to write")
        if self.path.is_dir():
            raise ConfigError(f"{self.path} is a folder; name a .jsonl or .parquet file to write")
        above = next(folder for folder in self.path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise ConfigError(f"{self.path} cannot be written, as {above} is a file; name a file in a folder")
        if self.path.exists() and not overwrite:
            raise ConfigError(f"{self.path} is there already; name another file, or replace it with --overwrite")

    def begin(self, identity: Mapping[str, str], *, total: int, group: int = 1) -> None:
        """Go on where the columns so far end, or begin with none; ``done`` says how many there are.

        Args:
            identity: what the columns depend on: a name that messages use -> its fingerprint.
            total: how many records there will be.
            group: so many records belong together; an incomplete group is made anew.

        Raises:
            ConfigError: the columns so far belong to something else.
            StorageError: they are damaged, or cannot be written.
        """
        self._total = total
        state = {"version": VERSION, "total": total, **identity}
        before = self._read_state()
        if before is not None and self._partial.exists() and not self._is_other(before, state):
            self.done = self._cut(group)
            return
        with writing(self._partial):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.unlink(missing_ok=True)
        write_whole(self._state, json.dumps(state, indent=1).encode())

    def append(self, rows: Sequence[Row]) -> None:
        """The new columns of the next records, all of them or none.

        Raises:
            StorageError: they cannot be written.
        """
        lines = [_json_line({"record": self.done + index, "columns": row}) for index, row in enumerate(rows)]
        append_whole(self._partial, b"".join(lines))
        self.done += len(rows)

    def columns(self) -> list[dict[str, Any]]:
        """The new columns of every record so far.

        Raises:
            StorageError: they are damaged.
        """
        if not self.done:
            return []
        try:
            rows = [json.loads(line) for line in self._partial.read_bytes().splitlines()]
            whole = [row["record"] for row in rows] == list(range(self.done))
            found = [dict(row["columns"]) for row in rows]
        except OSError as error:
            raise StorageError(f"{self._partial} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise StorageError(
                f"{self._partial} is damaged, or two commands wrote to it at once; delete it and begin anew"
            )
        return found

    def finish(self, rows: Sequence[Row]) -> None:
        """Write the whole file, and take away what grew beside it.

        Raises:
            DataError: a value that no such file can hold.
            StorageError: it cannot be written.
        """
        content = _parquet(rows, self.path) if self.path.suffix == ".parquet" else b"".join(map(_json_line, rows))
        write_whole(self.path, content)
        with writing(self.path):
            self._state.unlink(missing_ok=True)
            self._partial.unlink(missing_ok=True)

    def _read_state(self) -> dict[str, Any] | None:
        try:
            state = json.loads(self._state.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            if self._overwrite:
                return None
            raise StorageError(f"{self._state} cannot be read; delete it to begin anew ({error})") from error
        return state if isinstance(state, dict) else {}

    def _is_other(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
        """Whether the columns so far belong to something else; an error, unless they may be thrown away."""
        different = [name for name, value in now.items() if before.get(name) != value]
        if different and not self._overwrite:
            names = {"version": "version of this library", "total": "number of records"}
            what = ", ".join(names.get(name, name) for name in different)
            raise ConfigError(
                f"{self._partial} was begun with another {what}. Give what it was begun with to go on; or begin anew:"
                f" --overwrite, or delete {self._state.name}"
            )
        return bool(different)

    def _cut(self, group: int) -> int:
        """Number of complete records in the growing file, of which everything behind these is cut off."""
        content = self._partial.read_bytes()
        ends = list(itertools.accumulate(len(line) + 1 for line in content.split(b"\n")[:-1]))
        count = min(len(ends), self._total) // group * group
        with writing(self._partial):
            os.truncate(self._partial, ends[count - 1] if count else 0)
        return count


def require_json(rows: Sequence[tuple[str, Row]]) -> None:
    """See that records, each with its place, can be written as JSON.

    Raises:
        DataError: names the record and the column.
    """
    for where, row in rows:
        for name, value in row.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: the column {name!r} cannot be written as JSON ({str(error)[:100]}); write a .parquet"
                    " file"
                ) from error


def _json_line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _parquet(rows: Sequence[Row], path: Path) -> bytes:
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pa.array(values)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            reason = (str(error).splitlines() or [""])[0][:100]
            raise DataError(f"the column {name!r} cannot be written to {path} ({reason}); write .jsonl") from error
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays), buffer)
    return buffer.getvalue()
