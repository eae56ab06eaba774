"""A .jsonl file that a command writes: looked at before anything is read, and there once it is whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tropism.errors import ConfigError


def require_free(path: Path, *, overwrite: bool) -> None:
    """See that a file can be written under this name.

    Raises:
        ConfigError: another kind of file, a folder, or a file that is there already.
    """
    if path.suffix != ".jsonl":
        raise ConfigError(f"{path}: name a .jsonl file to write")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a .jsonl file to write")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is there already; name another file, or replace it with --overwrite")


def write_records(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, all of them or nothing; the folder is made.

    Raises:
        StorageError: it cannot be written.
    """
    from tropism.storage import write_whole, writing

    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(lines).encode())
