"""Names that stand in files: each must lead to a regular file inside the folder of the file that names it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tropism.errors import ModelError, TropismError


def is_plain_name(name: object) -> bool:
    """Whether ``name`` is the name of a file and nothing else: no folder, no way up, no NUL."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def file_inside(folder: Path, name: object, *, error: type[TropismError] = ModelError) -> Path | None:
    """The regular file ``name`` of ``folder`` with every link followed, or None if there is none.

    Links may lead anywhere inside the folder. A folder of the hub's cache, ``models--*/snapshots/<commit>``, is made
    of links into ``models--*/blobs``, so its links may lead anywhere inside ``models--*``.

    Args:
        name: relative to ``folder``; parts are separated by "/".
        error: the class of what is raised.

    Raises:
        TropismError: of the class ``error``: the name leads out of the folder, by itself or by a link, or to a pipe,
            a device or a folder.
    """
    if not isinstance(name, str) or not all(is_plain_name(part) for part in name.split("/")):
        raise error(f"{folder} names a file outside its folder: {name!r:.200}")
    path = folder / name
    try:
        if not os.path.lexists(path):
            return None
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as reason:  # a link to nothing, a circle of links, a name that is too long
        raise error(f"{path} cannot be read: {getattr(reason, 'strerror', None) or reason}") from reason
    if not real.is_relative_to(_root(folder)):
        raise error(f"{path} is a link that leads outside its folder, to {real}; put a copy of that file there")
    if not stat.S_ISREG(mode):
        raise error(f"{path} is no regular file; put a plain file there, or take it away")
    return real


def _root(folder: Path) -> Path:
    """Where the links of a folder may lead."""
    real = folder.resolve()
    repository = real.parent.parent
    in_hub_cache = real.parent.name == "snapshots" and repository.name.startswith(("models--", "datasets--"))
    return repository if in_hub_cache else real
