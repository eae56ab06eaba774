"""Records (one mapping of columns each) from whatever a user has: files, data sets, lists, columns."""

from __future__ import annotations

import difflib
import errno
import itertools
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropism.data.config import DataConfig
from tropism.data.files import MAX_DEPTH, TEXT_FORMATS, Located, listed, read_file, rows_of_columns, shown
from tropism.errors import DataError
from tropism.foreign.paths import file_inside

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record and where it came from."""

    where: str
    """``file:line``, ``file, row N`` or ``record N``, for messages; rows and records count from 0."""
    columns: dict[str, Any]
    """Column name -> value."""


def read_records(source: Any) -> list[dict[str, Any]]:
    """All records of a source; the columns are as they stand there (``DataConfig.limit`` and the like do not apply).

    Args:
        source: ``DataConfig``, path of a file or saved data set, hub id, list (of texts, records or message lists),
            ``datasets.Dataset``, or mapping of columns.

    Raises:
        DataError: names the file and line or the record, and the mend.
    """
    return [record.columns for record in locate_records(source)]


def locate_records(source: Any) -> list[Record]:
    """As ``read_records``, with the place of each record; a list of records with their places stays as it is."""
    if isinstance(source, list) and source and all(isinstance(item, Record) for item in source):
        return source
    name, located = _open(source)
    cleaner = _Cleaner()
    records = [Record(where=where, columns=cleaner.record(columns, where)) for where, columns in located]
    if not records:
        raise DataError(f"{name}: no records")
    if cleaner.replaced:
        logger.warning("%s: replaced %d NUL or lone surrogate characters by U+FFFD", name, cleaner.replaced)
    remembered = _remembered.get()
    if remembered is not None:
        remembered.append((source, records))
    return records


_remembered: ContextVar[list[tuple[Any, list[Record]]] | None] = ContextVar("remembered", default=None)


@contextmanager
def remembering() -> Iterator[list[tuple[Any, list[Record]]]]:
    """A list that gets every source and its records as they are read inside, so that an error can show them."""
    read: list[tuple[Any, list[Record]]] = []
    token = _remembered.set(read)
    try:
        yield read
    finally:
        _remembered.reset(token)


class _Cleaner:
    """Replaces what tokenizers and UTF-8 files cannot hold, and refuses hopeless nesting."""

    def __init__(self) -> None:
        self.replaced = 0

    def record(self, columns: dict[str, Any], where: str) -> dict[str, Any]:
        if not columns:
            raise DataError(f"{where}: the record has no columns")
        for name in columns:
            if not isinstance(name, str):
                raise DataError(f"{where}: the column name {shown(name)} is not text")
        return self._mapping(columns, where, 0)

    def _value(self, value: Any, where: str, depth: int) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if not isinstance(value, list | tuple | dict):
            return value
        if depth >= MAX_DEPTH:
            raise DataError(f"{where}: nested more than {MAX_DEPTH} levels deep; flatten the record")
        if isinstance(value, dict):
            return self._mapping(value, where, depth)
        items = [self._value(item, where, depth + 1) for item in value]
        return tuple(items) if isinstance(value, tuple) else items

    def _mapping(self, mapping: dict[Any, Any], where: str, depth: int) -> dict[Any, Any]:
        clean = {
            self._text(key) if isinstance(key, str) else key: self._value(item, where, depth + 1)
            for key, item in mapping.items()
        }
        if len(clean) < len(mapping):
            raise DataError(
                f"{where}: two names differ only in characters that are no text (NUL, lone surrogates); rename one"
            )
        return clean

    def _text(self, text: str) -> str:
        if text.isascii() and "\0" not in text:
            return text
        clean, count = _UNUSABLE.subn("\ufffd", text)
        self.replaced += count
        return clean


def _open(source: Any) -> tuple[str, Iterable[Located]]:
    """A name for messages, and the records."""
    if isinstance(source, DataConfig):
        return source.path, _open_path(source)
    if isinstance(source, str | os.PathLike):
        if not str(source):
            raise DataError("the path of the data is empty")
        return str(source), _open_path(DataConfig(path=str(source)))
    if _is_from_datasets(source):
        return "the data set", _rows_of_dataset(source)
    if isinstance(source, Mapping):
        return "the columns", _rows_of_mapping(source)
    if isinstance(source, Sequence) and not isinstance(source, bytes | bytearray):
        return "the list", _items(source)
    raise DataError(
        f"cannot read data from {type(source).__name__}; pass a path, a list of texts or records, a mapping of columns,"
        " or a datasets.Dataset"
    )


def _items(items: Sequence[Any]) -> Iterator[Located]:
    for index, item in enumerate(items):
        where = f"record {index}"
        if isinstance(item, str):
            yield where, {"text": item}
        elif isinstance(item, Mapping):
            yield where, dict(item)
        elif isinstance(item, list | tuple) and item and all(isinstance(m, Mapping) and "role" in m for m in item):
            yield where, {"messages": [dict(message) for message in item]}
        else:
            raise DataError(
                f"{where}: expected text, a mapping of columns or a list of messages with roles,"
                f" got {type(item).__name__} {shown(item)}"
            )


def _rows_of_mapping(columns: Mapping[Any, Any]) -> Iterator[Located]:
    lists: dict[str, Any] = {}
    for name, column in columns.items():
        if isinstance(column, str | bytes) or not hasattr(column, "__len__") or not hasattr(column, "__getitem__"):
            raise DataError(f"column {shown(name)}: expected a list of values, got {type(column).__name__}")
        try:
            lists[name] = list(column)
        except TypeError as error:  # an array without dimensions
            raise DataError(f"column {shown(name)}: expected a list of values ({error})") from error
    return rows_of_columns(lists, "the columns")


# ---- datasets ------------------------------------------------------------------------------------------------------


def _is_from_datasets(source: Any) -> bool:
    """Whether the object comes from the library ``datasets``, without importing it."""
    return type(source).__module__.partition(".")[0] == "datasets"


def _rows_of_dataset(source: Any) -> Iterator[Located]:
    import datasets  # type: ignore[import-untyped,unused-ignore]

    if isinstance(source, datasets.DatasetDict):
        raise DataError(f"the data set has splits; pass one of them: {', '.join(map(repr, source))}")
    if not isinstance(source, datasets.Dataset):
        raise DataError(
            f"{type(source).__name__} streams its rows, but training needs to know how many there are; take a part:"
            " Dataset.from_list(list(stream.take(10_000)))"
        )
    rows = iter(source)
    for index in itertools.count():
        try:
            row = next(rows, None)
        except Exception as error:  # values that are decoded only now raise whatever their decoder raises
            raise DataError(f"record {index}: cannot be read from the data set ({_first_line(error)})") from error
        if row is None:
            return
        yield f"record {index}", dict(row)


def require_there(source: Any) -> None:
    """Look whether a path of data is there, before anything slow is done; other sources are let pass.

    Raises:
        DataError: there is no such file or folder, and the name cannot be one of the hub, or it is no regular file.
    """
    if isinstance(source, str | os.PathLike) and str(source):
        source = DataConfig(path=str(source))
    if isinstance(source, DataConfig):
        _mode_of_data(source)


def _open_path(config: DataConfig) -> Iterable[Located]:
    mode, path = _mode_of_data(config), Path(config.path)
    if mode is None:
        return _rows_of_dataset(_load_from_hub(config))
    return _rows_of_dataset(_load_saved(path, config)) if stat.S_ISDIR(mode) else read_file(path)


def _mode_of_data(config: DataConfig) -> int | None:
    """That of a file or folder; None for what the hub may have."""
    path, mode = Path(config.path), _mode(config.path)
    if mode is not None:
        for is_kind, kind in _KINDS:
            if is_kind(mode):
                raise DataError(f"{path}: {kind}, not a regular file; save the data to a file first")
        return mode
    if os.path.islink(config.path):
        raise DataError(f"{path}: a link to {os.readlink(config.path)!r}, which is not there")
    suffix = Path(config.path.lower().removesuffix(".gz")).suffix
    if suffix in TEXT_FORMATS or suffix == ".parquet" or not _HUB_ID.fullmatch(config.path):
        raise DataError(
            f"{config.path[:200]!r}: no such file or folder{_nearest_name(path)}. Texts themselves are given as a list"
        )
    return None


def _mode(path: str) -> int | None:
    """What is at the path, links followed; None where there is nothing.

    Raises:
        DataError: there may be something, but it cannot be looked at.
    """
    try:
        return os.stat(path).st_mode
    except ValueError:  # a NUL in the path
        return None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EIO):
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        return None


def _nearest_name(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else ""


def _load_saved(path: Path, config: DataConfig) -> Any:
    """A folder of ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    import datasets

    try:
        path = _saved_split(path, config.split)
        _check_inside(path)
        return datasets.load_from_disk(str(path))
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its parts raise
        raise DataError(f"{path}: cannot be read as a saved data set ({_first_line(error)})") from error


def _saved_split(path: Path, split: str) -> Path:
    """The folder of one split; the folder itself where it holds a data set without splits."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if (entry / "state.json").is_file())
        if split not in splits:
            raise DataError(f"{path}: no split {split!r}; there are: {listed(splits) or 'none'}")
        if not (path / split).resolve().is_relative_to(path.resolve()):
            raise DataError(
                f"{path / split} is a link that leads outside the data set; put a copy of that folder there"
            )
        path = path / split
    if not (path / "state.json").is_file():
        names = sorted(entry.name for entry in path.iterdir())[:10]
        raise DataError(
            f"{path}: a folder, but none written by Dataset.save_to_disk; name one of its files:"
            f" {', '.join(names) or '(it is empty)'}"
        )
    return path


def _check_inside(path: Path) -> None:
    """A saved data set names its own files: none of these may lead out of its folder."""
    for own in ("state.json", "dataset_info.json"):
        file_inside(path, own, error=DataError)
    state = json.loads((path / "state.json").read_bytes())
    for entry in state["_data_files"]:
        name = entry["filename"]
        if not (path / name).resolve().is_relative_to(path.resolve()):
            raise DataError(f"{path}/state.json: the file {name!r} is outside the folder")
        if not (path / name).is_file():
            raise DataError(f"{path}/state.json: the file {name!r} is missing or no regular file; save the data again")


def _load_from_hub(config: DataConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(config.path, config.subset, split=config.split, revision=config.revision)
    except Exception as error:  # network, missing id, missing split: the library has a class for each
        near = _nearest_name(Path(config.path))
        raise DataError(
            f"{config.path!r}: no such file or folder{near}, and no data set of this id could be loaded from the hub"
            f" ({type(error).__name__}: {_first_line(error)}). Check the id, split and subset; without network, give"
            " the path of a file"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
