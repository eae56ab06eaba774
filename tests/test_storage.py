"""What cannot be written is an error that says what is missing, and leaves what was there as it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from full_disk import file_size_limit
from tropism.errors import StorageError
from tropism.storage import append_whole, ensure_room, write_whole, writing


@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (errno.ENOSPC, "Free space"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "Choose a folder"),
        (errno.EACCES, "Make it writable"),
    ],
)
def test_the_error_names_path_reason_room_and_mend(code: int, mend: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, writing(tmp_path / "x", needed=12345):
        raise OSError(code, os.strerror(code))
    message = str(caught.value)
    assert str(tmp_path / "x") in message and os.strerror(code) in message
    assert "it needs 12,345 bytes" in message and "are free" in message and mend in message


def test_errors_of_safetensors_are_understood(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="File too large"), file_size_limit(1000), writing(tmp_path / "x"):
        save_file({"a": torch.zeros(1000)}, tmp_path / "x")


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("no matter of storage")


def test_room_is_looked_for_before_writing(tmp_path: Path) -> None:
    ensure_room(tmp_path / "not" / "there", 1)
    with pytest.raises(OSError, match="No space left"):
        ensure_room(tmp_path, 2**60)


def append(path: Path) -> None:
    append_whole(path, b"y" * 600)


def replace(path: Path) -> None:
    write_whole(path, b"y" * 1600)


@pytest.mark.parametrize("write", [append, replace])
def test_nothing_is_half_written(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 500)
    with file_size_limit(1000), pytest.raises(StorageError, match=r"log cannot be written: File too large; it needs"):
        write(path)
    assert path.read_bytes() == b"x" * 500
    assert [entry.name for entry in tmp_path.iterdir()] == ["log"]
    write(path)
    assert path.read_bytes() == (b"x" * 500 + b"y" * 600 if write is append else b"y" * 1600)


@pytest.mark.parametrize("write", [append, replace])
def test_new_files_are_their_owners_alone(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


def test_a_link_is_not_appended_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="log cannot be written"):
        append_whole(tmp_path / "log", b"y")
    assert (tmp_path / "elsewhere").read_text() == "mine"
