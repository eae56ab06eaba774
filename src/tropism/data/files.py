"""Data files to records: one function per format, each naming the file and line of what it refuses."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tropism.errors import DataError

MAX_DEPTH = 64
"""Deepest nesting of lists and objects in a record."""
MAX_UNPACKED = 2 * 1024**3
"""Most bytes that a gzip or Parquet file may unpack to: a small one can be made to fill any memory."""
MAX_ROWS = 50_000_000
"""Most rows of a Parquet file, of which equal ones take no room in the file."""

_SPACE = re.compile(r"[ \t\r\n]*")
_PIECE = 1 << 20

Located = tuple[str, dict[str, Any]]
"""Where a record stands (``file:line``), and its columns."""


def read_file(path: Path) -> Iterator[Located]:
    """The records of a data file with their places.

    Raises:
        DataError: an unsupported extension, an unreadable, undecodable, malformed or much too large file.
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
        data = _unpacked(path) if path.name.lower().endswith(".gz") else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); copy or download it again") from error
    except MemoryError as error:
        raise DataError(f"{path}: too large for the memory of this machine; use a part of it") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: UTF-16 text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.start counts from behind the BOM, if there is one
        line, byte = _line_ends(error.object[: error.start]) + 1, error.object[error.start]
        mend = "save it as UTF-8"
        if error.reason == "unexpected end of data":
            mend = "the file ends within a character: copy or download it again"
        raise DataError(f"{path}:{line}: not UTF-8 text (byte 0x{byte:02x}); {mend}") from error


def _unpacked(path: Path) -> bytes:
    """What a gzip file holds, read piece by piece, so that a bomb is refused before it fills the memory."""
    pieces: list[bytes] = []
    size = 0
    with gzip.open(path) as stream:
        while piece := stream.read(_PIECE):
            size += len(piece)
            if size > MAX_UNPACKED:
                raise DataError(
                    f"{path}: unpacks to more than {MAX_UNPACKED:,} bytes; unpack it yourself (gunzip) if it is meant"
                    " to be so large, or use a part of it"
                )
            pieces.append(piece)
    return b"".join(pieces)


def _line_ends(text: str | bytes) -> int:
    """How many lines end in the text, whichever kind of line end it has."""
    if isinstance(text, bytes):
        return text.count(b"\n") + text.count(b"\r") - text.count(b"\r\n")
    return text.count("\n") + text.count("\r") - text.count("\r\n")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, counted from 1.

    A newline, a carriage return or both part them (not U+2028, which JSON strings may hold).
    """
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield number, line.removesuffix("\n")


def shown(value: Any, most: int = 60) -> str:
    """The beginning of a value's repr, for messages; the kind alone where it has no repr of a sane size."""
    try:
        text = value[:most] if isinstance(value, str) else value
        return repr(text)[:most]
    except (ValueError, RecursionError):  # whole numbers of thousands of digits, hopeless nesting
        return f"({type(value).__name__})"


def listed(names: Iterable[Any], most: int = 20) -> str:
    """The first names, parted by commas, for messages."""
    texts = [str(name)[:60] for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


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
                raise ValueError(f"duplicate key {shown(key)}; keep one of the two")
            seen.add(key)
    return mapping


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write null for a missing number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:30]} is too large for a number; write null for a missing number")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)


def _decode(text: str, start: int, path: Path, line: int) -> tuple[Any, int]:
    """One JSON value from ``start``, which is in the given line of the file, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        at = line + _line_ends(text[start : error.pos])
        snippet = text[max(error.pos - 30, 0) : error.pos + 30]
        raise DataError(f"{path}:{at}: not valid JSON ({error.msg}) near {snippet!r}") from error
    except RecursionError as error:
        raise DataError(f"{path}:{line}: nested more than {MAX_DEPTH} levels deep") from error
    except ValueError as error:  # duplicate keys, NaN, thousands of digits
        reason = str(error)
        if "int_max_str_digits" in reason:
            reason = "a whole number with thousands of digits; put it in quotes if it is text"
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
        raise DataError(f"{where}: expected an object {{...}}, got {type(value).__name__} {shown(value)}")
    return value


def _skip_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return start if match is None else match.end()


def _json_document(text: str, path: Path) -> Iterator[Located]:
    """A list of objects, or one object of equally long columns."""
    start = _skip_space(text, 0)
    if text[start] != "[":
        value, end = _decode(text, start, path, _line_ends(text[:start]) + 1)
        if text[end:].strip():
            raise DataError(f"{path}: more than one JSON value; a file with one per line is named .jsonl")
        if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
            raise DataError(f"{path}: expected a list of objects or an object of columns (lists)")
        yield from rows_of_columns(value, str(path))
        return
    line, position = _line_ends(text[:start]) + 1, start
    previous, index = 0, 0
    while True:
        following = _skip_space(text, position + 1)
        line += _line_ends(text[position:following])
        if position == start and text[following : following + 1] == "]":
            position = following
            break
        value, end = _decode(text, following, path, line)
        where = f"{path}:{line}" if line != previous else f"{path}:{line}, record {index}"
        yield where, _record(value, where)
        previous, index = line, index + 1
        position = _skip_space(text, end)
        line += _line_ends(text[following:position])
        if text[position : position + 1] != ",":
            break
    if text[position : position + 1] != "]" or text[position + 1 :].strip():
        raise DataError(f"{path}:{line}: not valid JSON (expected , or ]) near {text[position : position + 30]!r}")


def rows_of_columns(columns: dict[str, Any], where: str) -> Iterator[Located]:
    """Rows of a mapping of equally long columns."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where}: columns differ in length: {shown(lengths, 300)}")
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
                raise DataError(f"{where}: {len(row)} fields, but the header has {len(header)}: {listed(header)}")
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
    counts = Counter(names)
    for name, count in counts.items():
        if not name or count > 1:
            raise DataError(
                f"{where}: the header names the column {shown(name)} {count} times: {listed(names)}; give every column"
                " a name of its own"
            )
    return names


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

    try:
        with pq.ParquetFile(path) as file:
            _refuse_bomb(file.metadata, path)
            table = file.read()
        names = table.column_names
        if len(set(names)) < len(names):
            raise DataError(f"{path}: two columns of the same name: {listed(names)}")
        rows = table.to_pylist()
    except DataError:
        raise
    except Exception as error:  # values that Python has no type for raise whatever the conversion raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise DataError(f"{path}: not a readable Parquet file ({reason}); write it again") from error
    for index, row in enumerate(rows):
        yield f"{path}, row {index}", row


def _refuse_bomb(metadata: Any, path: Path) -> None:
    size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    if size > MAX_UNPACKED or metadata.num_rows > MAX_ROWS:
        raise DataError(
            f"{path}: unpacks to {metadata.num_rows:,} rows and {size:,} bytes; at most {MAX_ROWS:,} rows and"
            f" {MAX_UNPACKED:,} bytes are read, so use a part of it"
        )


TEXT_FORMATS: dict[str, Callable[[str, Path], Iterator[Located]]] = {
    ".txt": _text_lines,
    ".jsonl": _json_lines,
    ".json": _json_document,
    ".csv": _table(","),
    ".tsv": _table("\t"),
}
"""Reader by extension: text of the file and its path -> records with their places."""
