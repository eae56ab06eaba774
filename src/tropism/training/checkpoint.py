"""Checkpoints: safetensors and JSON only, complete or absent, exact to the bit.

While one is written its folder is ``.writing-<name>``; one that makes room for another of its name is
``.replaced-<name>`` until that is in place; one that is being deleted is ``.deleting-<name>``. ``sweep`` clears up what
a crash left of these.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tropism.errors import ModelError
from tropism.storage import ensure_room, flush, writing

MANIFEST = "manifest.json"
STATE = "state.json"
RUN_PARTS = ("policy", "optimizer", "batch")
"""Files of tensors without which a run cannot go on."""

_NAME = re.compile(r"step-(\d{6,})-update-(\d{6,})")
_LEFTOVER = re.compile(rf"\.(writing|deleting|replaced)-({_NAME.pattern}|best)")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TENSORS = ".safetensors"
_HEADER_BYTES = 512
"""Allowed for a tensor's name, type, shape and place in its file, and for a file's line in the manifest."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything a run needs to go on."""

    state: Mapping[str, Any]
    """JSON-able."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File name (without ending) -> named tensors."""

    @property
    def collecting(self) -> bool:
        """Whether the run stood in the middle of a step, with what that step had collected."""
        return bool(self.state["source"]["collecting"])


# Writing -------------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write to a temporary sibling, flush to disk, rename; a manifest with sizes and hashes is written last.

    A checkpoint of the same name is deleted once the new one is in its place. Tensors are copied only where they are
    not in the host's memory, not contiguous or share memory, those of one file at a time.

    Raises:
        StorageError: it cannot be written; nothing is left of it, and everything that was there before still is.
    """
    odd = [name for name in checkpoint.tensors if not _PART.fullmatch(name)]
    if odd:
        raise ModelError(f"{odd[0]!r} cannot name a part of a checkpoint: use letters, digits, - and _")
    state = json.dumps(checkpoint.state, indent=1).encode()
    needed = bytes_needed(checkpoint) + len(state)
    temporary = folder.with_name(f".writing-{folder.name}")
    with writing(folder, needed=needed):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            ensure_room(temporary, needed)
            for name, tensors in checkpoint.tensors.items():
                save_file(_writable(tensors), temporary / f"{name}{_TENSORS}")
            (temporary / STATE).write_bytes(state)
            files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
            (temporary / MANIFEST).write_text(json.dumps({"files": files, "sha256": _digest(files)}, indent=1))
            for path in [*temporary.iterdir(), temporary]:
                flush(path)
            _put_in_place(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def bytes_needed(checkpoint: Checkpoint) -> int:
    """About what the tensors of a checkpoint take on the disk, rather more."""
    parts = checkpoint.tensors.values()
    return sum(_HEADER_BYTES * 2 + sum(t.nbytes + _HEADER_BYTES for t in part.values()) for part in parts)


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as safetensors takes them: on the host, contiguous, no two of them in the same memory."""
    taken: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        here = tensor.detach().to("cpu").contiguous()
        memory = here.untyped_storage().data_ptr()
        if here.numel() and memory in taken:
            here = here.clone()
        taken.add(memory)
        result[name] = here
    return result


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a complete checkpoint to its name, and only then delete one that stood there."""
    replaced = folder.with_name(f".replaced-{folder.name}")
    if not os.path.lexists(folder):
        temporary.rename(folder)
        flush(folder.parent)
        return
    if folder.is_symlink() or not folder.is_dir():
        raise FileExistsError(f"there is something else of that name: {folder}")
    ours = [path.name for path in temporary.iterdir()]
    if replaced.is_dir():
        _discard(replaced, home=folder, names=ours)
    folder.rename(replaced)
    try:
        temporary.rename(folder)
    except BaseException:
        replaced.rename(folder)
        raise
    flush(folder.parent)
    _discard(replaced, home=folder, names=ours)


# Reading -------------------------------------------------------------------------------------------------------------


def read_checkpoint(folder: Path, *, parts: Collection[str] = ()) -> Checkpoint:
    """Read a checkpoint after checking every file against the manifest.

    Args:
        parts: files of tensors, without ending, that it must have.

    Raises:
        ModelError: incomplete or changed; the file is named.
    """
    problem = find_problem(folder, parts=parts)
    if problem:
        raise ModelError(f"checkpoint {folder} cannot be used: {problem}")
    name = STATE
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        tensors = {}
        for name in sorted(_manifest(folder) or ()):
            if name.endswith(_TENSORS):
                tensors[name.removesuffix(_TENSORS)] = load_file(folder / name)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ModelError(f"checkpoint {folder} cannot be used: {name} cannot be read ({error})") from error
    return Checkpoint(state=state, tensors=tensors)


def read_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint below ``folder`` that a run can go on from, and a sentence for each that was skipped."""
    skipped: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return read_checkpoint(path, parts=RUN_PARTS), skipped
        except ModelError as error:
            skipped.append(f"skipped: {error}")
    return None, skipped


def newest_complete(folder: Path, *, hashes: bool = True) -> tuple[Path | None, list[str]]:
    """The newest usable checkpoint, and a sentence for each newer one that was skipped.

    Args:
        hashes: read and check every file; otherwise their sizes alone are looked at.
    """
    skipped: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        problem = find_problem(path, hashes=hashes)
        if problem is None:
            return path, skipped
        skipped.append(f"skipped {path.name}: {problem}")
    return None, skipped


def find_problem(folder: Path, *, hashes: bool = True, parts: Collection[str] = ()) -> str | None:
    """What is wrong with a checkpoint folder, or None.

    Args:
        hashes: read and check every file; otherwise their sizes alone are looked at.
        parts: files of tensors, without ending, that it must have.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder of its own"
    if not (folder / MANIFEST).exists():
        return f"it has no {MANIFEST} (its writing or deletion was interrupted)"
    files = _manifest(folder)
    if files is None:
        return f"its {MANIFEST} is not one that was written here, or was changed"
    missing = [name for name in (STATE, *(f"{part}{_TENSORS}" for part in parts)) if name not in files]
    if missing:
        return f"its {MANIFEST} does not name {missing[0]}"
    problems = (_problem_of(folder / name, expected, hashes=hashes) for name, expected in files.items())
    return next((problem for problem in problems if problem), None)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders below ``folder``, oldest first; also one that was being replaced if nothing took its place."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        name = path.name.removeprefix(".replaced-")
        if (match := _NAME.fullmatch(name)) and path.is_dir() and (name == path.name or not (folder / name).exists()):
            found.append((tuple(map(int, match.groups())), path))
    return [path for _, path in sorted(found)]


def checkpoint_name(*, steps: int, updates: int) -> str:
    """``step-000012-update-000048``: between two updates of a collect the steps alone do not tell."""
    return f"step-{steps:06d}-update-{updates:06d}"


def _manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """File name -> bytes and sha256; None if the manifest is not whole, or names anything but plain files."""
    try:
        whole = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, digest = whole["files"], whole["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(files, dict) or digest != _digest(files):
        return None
    plain = all(name == STATE or _PART.fullmatch(name.removesuffix(_TENSORS)) for name in files)
    return files if plain and all(isinstance(facts, dict) for facts in files.values()) else None


def _problem_of(path: Path, expected: Mapping[str, Any], *, hashes: bool) -> str | None:
    """What is wrong with one file of a checkpoint, or None."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return f"{path.name} is a link, a folder or the like, not a regular file"
        if found.st_size != expected.get("bytes"):
            return f"{path.name} has {found.st_size} bytes instead of {expected.get('bytes')} (cut, or added to)"
        if hashes and _describe(path) != expected:
            return f"{path.name} was changed: its sha256 is not that of the file that was written"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    return None


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


# Deleting ------------------------------------------------------------------------------------------------------------


def prune(folder: Path, *, keep: int, newest: Path | None = None) -> None:
    """Delete older checkpoints than the newest ``keep`` complete ones, and leftovers of interrupted writing.

    Completeness is judged by manifest and sizes. Only the files that a manifest names are deleted; a checkpoint's
    folder stays if anything else is in it.

    Args:
        newest: the one just written, which is known to be complete; later ones neither count nor are deleted, since a
            run only comes to write before them after it found them damaged.

    Raises:
        StorageError: something cannot be deleted.
    """
    with writing(folder):
        sweep(folder)
        candidates = list_checkpoints(folder)
        if newest is not None:
            candidates = candidates[: candidates.index(newest) + 1]
        complete = [path for path in candidates if find_problem(path, hashes=False) is None]
        for path in complete[:-keep]:
            aside = folder / f".deleting-{path.name}"
            path.rename(aside)
            _discard(aside, home=path)


def sweep(folder: Path) -> None:
    """Clear up what interrupted writing, replacing and deleting left below ``folder``.

    What was being written goes, what was being deleted goes on being deleted, and what was to be replaced comes back
    if nothing took its place. Other names than this module's are left alone.
    """
    for path, kind, home in _leftovers(folder):
        if kind == "writing":
            shutil.rmtree(path)
        elif kind == "replaced" and not home.exists():
            path.rename(home)
        else:
            _discard(path, home=home)


def _leftovers(folder: Path) -> Iterator[tuple[Path, str, Path]]:
    """(path, kind, the path that it was or was to become)."""
    for path in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            yield path, match.group(1), folder / match.group(2)


def _discard(aside: Path, *, home: Path, names: Collection[str] = ()) -> None:
    """Delete what was written here, the manifest last, so that a crash in between leaves it to the next sweep.

    Args:
        home: where anything else in the folder goes.
        names: files to delete beside those of the manifest.
    """
    ours = sorted({*(_manifest(aside) or ()), *names} - {MANIFEST})
    for name in [*ours, MANIFEST] if ours else []:
        if not (aside / name).is_dir():
            (aside / name).unlink(missing_ok=True)
    rest = list(aside.iterdir())
    if rest and not home.exists():
        aside.rename(home)
        return
    for path in rest:
        if not (home / path.name).exists():
            path.rename(home / path.name)
    if not any(aside.iterdir()):
        aside.rmdir()
