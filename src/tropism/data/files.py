"""Data files to records: one function per format, each naming the file and line of what it refuses."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tropism.errors import DataError

MAX_DEPTH = 64
"""Deepest nesting of lists and objects in a record."""

Located = tuple[str, dict[str, Any]]
"""Where a record stands (``file:line``), and its columns."""


def read_file(path: Path) -> Iterator[Located]:
    """The records of a data file with their places.

    Raises:
        DataError: an unsupported extension, an unreadable, undecodable or malformed file.
    """
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix == ".parquet" and not name.endswith(".gz"):
        return _parquet(path)
    if suffix not in TEXT_FORMATS:
        supported = ", ".join([*TEXT_FORMATS, ".parquet"])
        raise DataError(f"{path}: unsupported kind of file {suffix or name}; supported: {supported} (text also .gz)")
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return TEXT_FORMATS[suffix](text, path)


def _read_text(path: Path) -> str:
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as stream:
                data = stream.read()
        else:
            data = path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); copy or download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: UTF-16 text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.start counts from behind the BOM, if there is one
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text (byte 0x{error.object[error.start]:02x})") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, counted from 1. Only newlines part them (not U+2028, which JSON strings may hold)."""
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if line.strip():
            yield number, line


def _refuse_nul(line: str, where: str) -> None:
    if "\0" in line:
        raise DataError(f"{where}: a NUL character; the file is damaged or not plain text")


def _text_lines(text: str, path: Path) -> Iterator[Located]:
    for number, line in _lines(text):
        _refuse_nul(line, f"{path}:{number}")
        yield f"{path}:{number}", {"text": line}


# ---- JSON ----------------------------------------------------------------------------------------------------------


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key!r}; keep one of the two")
            seen.add(key)
    return mapping


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write null for a missing number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _decode(text: str, start: int, path: Path, line: int) -> tuple[Any, int]:
    """One JSON value from ``start``, which is in the given line of the file, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        at = line + text.count("\n", start, error.pos)
        snippet = text[max(error.pos - 30, 0) : error.pos + 30]
        raise DataError(f"{path}:{at}: not valid JSON ({error.msg}) near {snippet!r}") from error
    except RecursionError as error:
        raise DataError(f"{path}:{line}: nested more than {MAX_DEPTH} levels deep") from error
    except ValueError as error:  # duplicate keys, NaN, thousands of digits
        reason = "a whole number with thousands of digits" if "int_max_str_digits" in str(error) else str(error)
        raise DataError(f"{path}:{line}: {reason}") from error


def _json_lines(text: str, path: Path) -> Iterator[Located]:
    for number, line in _lines(text):
        line = line.strip()
        value, end = _decode(line, 0, path, number)
        if line[end:].strip():
            raise DataError(f"{path}:{number}: more than one JSON value on the line: {line[end : end + 30]!r}")
        yield f"{path}:{number}", _record(value, f"{path}:{number}")


def _record(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object {{...}}, got {type(value).__name__} {repr(value)[:60]}")
    return value


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    return start


def _json_document(text: str, path: Path) -> Iterator[Located]:
    """A list of objects, or one object of equally long columns."""
    start = _skip_space(text, 0)
    if text[start] != "[":
        value, end = _decode(text, start, path, text.count("\n", 0, start) + 1)
        if text[end:].strip():
            raise DataError(f"{path}: more than one JSON value; a file with one per line is named .jsonl")
        if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
            raise DataError(f"{path}: expected a list of objects or an object of columns (lists)")
        yield from rows_of_columns(value, str(path))
        return
    line, position = text.count("\n", 0, start) + 1, start
    while True:
        following = _skip_space(text, position + 1)
        line += text.count("\n", position, following)
        if position == start and text[following : following + 1] == "]":
            position = following
            break
        value, end = _decode(text, following, path, line)
        yield f"{path}:{line}", _record(value, f"{path}:{line}")
        position = _skip_space(text, end)
        line += text.count("\n", following, position)
        if text[position : position + 1] != ",":
            break
    if text[position : position + 1] != "]" or text[position + 1 :].strip():
        raise DataError(f"{path}:{line}: not valid JSON (expected , or ]) near {text[position : position + 30]!r}")


def rows_of_columns(columns: dict[str, Any], where: str) -> Iterator[Located]:
    """Rows of a mapping of equally long columns."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where}: columns differ in length: {lengths}")
    for index in range(next(iter(lengths.values()), 0)):
        yield f"{where}, row {index}", {name: column[index] for name, column in columns.items()}


# ---- tables --------------------------------------------------------------------------------------------------------


def _table(delimiter: str) -> Callable[[str, Path], Iterator[Located]]:
    def read(text: str, path: Path) -> Iterator[Located]:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        line = 1
        while True:
            row = _next_row(rows, len(text), f"{path}:{line}")
            if row is None:
                return
            where, line = f"{path}:{line}", rows.line_num + 1
            if not any(field.strip() for field in row):
                continue
            for field in row:
                _refuse_nul(field, where)
            if header is None:
                header = _header(row, where)
            elif len(row) != len(header):
                raise DataError(f"{where}: {len(row)} fields, but the header has {len(header)}: {', '.join(header)}")
            else:
                yield where, dict(zip(header, row, strict=True))

    return read


def _next_row(rows: Any, longest: int, where: str) -> list[str] | None:
    """The next row. The limit on a field's length is global to the process, so it is lifted for one call only."""
    limit = csv.field_size_limit(max(longest, 1))
    try:
        row: list[str] | None = next(rows, None)
    except csv.Error as error:
        raise DataError(f"{where}: not a valid table ({error})") from error
    finally:
        csv.field_size_limit(limit)
    return row


def _header(row: list[str], where: str) -> list[str]:
    names = [name.strip() for name in row]
    for name in names:
        if not name or names.count(name) > 1:
            raise DataError(
                f"{where}: the header names the column {name!r} {names.count(name)} times: {', '.join(names)}"
            )
    return names


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

    try:
        table = pq.ParquetFile(path).read()
        names = table.column_names
        if len(set(names)) < len(names):
            raise DataError(f"{path}: two columns of the same name: {', '.join(names)}")
        rows = table.to_pylist()
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
    for index, row in enumerate(rows):
        yield f"{path}, row {index}", row


TEXT_FORMATS: dict[str, Callable[[str, Path], Iterator[Located]]] = {
    ".txt": _text_lines,
    ".jsonl": _json_lines,
    ".json": _json_document,
    ".csv": _table(","),
    ".tsv": _table("\t"),
}
"""Reader by extension: text of the file and its path -> records with their places."""
