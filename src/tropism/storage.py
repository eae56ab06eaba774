"""Writing to disk: what stands under a name is whole, and a failure says what was missing and how to mend it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tropism.errors import StorageError

_CODE = re.compile(r"\(os error (\d+)\)")
_MENDS = {
    errno.ENOSPC: "Free space there",
    errno.EDQUOT: "Free space there, or have the quota raised",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "Choose a folder that can be written",
    errno.EACCES: "Make it writable for this user",
    errno.EPERM: "Make it writable for this user",
}


@contextmanager
def writing(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """A block that writes ``path``, a file or a folder.

    Args:
        needed: bytes that it takes, where known; the error names them beside those that are free.

    Raises:
        StorageError: in place of whatever the system or safetensors raise because something cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _code_of(error)
        reason = os.strerror(code) if code else str(error)
        mend = _MENDS.get(code or 0, "Mend that, or choose another place")
        raise StorageError(f"{path} cannot be written: {reason}{_room(path, needed)}. {mend}") from error


def ensure_room(path: Path, needed: int) -> None:
    """Look before writing ``needed`` bytes to ``path``.

    Raises:
        OSError: fewer are free.
    """
    free = _free(path)
    if free is not None and free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """A file that appears, or replaces an older one, only once all of it is on the disk; its owner alone may read it.

    Raises:
        StorageError: it cannot be written; an older one is as it was.
    """
    temporary = path.with_name(f".{path.name}.writing")
    with writing(path, needed=len(content)):
        try:
            temporary.unlink(missing_ok=True)
            with open(temporary, "xb", opener=_private) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append_whole(path: Path, content: bytes) -> None:
    """Add to the end of a file, all of it or nothing; made anew, its owner alone may read it.

    Raises:
        StorageError: it cannot be written, or is a link; the file is as it was.
    """
    with writing(path, needed=len(content)):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = _private(path, flags)
        try:
            before = os.fstat(descriptor).st_size
            left = memoryview(content)
            try:
                while left:  # a disk that is almost full takes a part
                    left = left[os.write(descriptor, left) :]
            except BaseException:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)


def _private(path: str | Path, flags: int) -> int:
    """Open a file that, where it is made anew, only its owner may read: messages and settings can be telling."""
    return os.open(path, flags, 0o600)


def _code_of(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _CODE.search(str(error))
    return int(found.group(1)) if found else None


def _room(path: Path, needed: int | None) -> str:
    free = _free(path)
    return "" if needed is None or free is None else f"; it needs {needed:,} bytes, and {free:,} are free on its disk"


def _free(path: Path) -> int | None:
    """Bytes left on the disk where ``path`` is or will be; None where the system does not say."""
    try:
        existing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), None)
        usage = None if existing is None else shutil.disk_usage(existing)
    except OSError:
        return None
    return usage.free if usage and usage.total else None
