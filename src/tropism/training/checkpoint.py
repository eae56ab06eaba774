"""Checkpoints: safetensors and JSON only, complete or absent, exact to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tropism.errors import ModelError

MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})-update-(\d{6,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything a run needs to go on."""

    state: Mapping[str, Any]
    """JSON-able."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File name (without ending) -> named tensors."""


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write to a temporary sibling, flush to disk, rename; a manifest with sizes and hashes is written last."""
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, tensors in checkpoint.tensors.items():
        contiguous = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        save_file(contiguous, temporary / f"{name}.safetensors")
    (temporary / STATE).write_text(json.dumps(checkpoint.state, indent=1))
    files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
    (temporary / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    for path in [*temporary.iterdir(), temporary]:
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _flush(folder.parent)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking every file against the manifest.

    Raises:
        ModelError: incomplete or changed; the file is named.
    """
    problem = find_problem(folder)
    if problem:
        raise ModelError(f"checkpoint {folder} cannot be used: {problem}")
    names = sorted(json.loads((folder / MANIFEST).read_text())["files"])
    tensors = {Path(name).stem: load_file(folder / name) for name in names if name.endswith(".safetensors")}
    return Checkpoint(state=json.loads((folder / STATE).read_text()), tensors=tensors)


def find_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return "it has no manifest (its writing was interrupted)"
    try:
        files = dict(json.loads(manifest.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "its manifest cannot be read"
    if STATE not in files or any(Path(name).name != name for name in files):
        return "its manifest is not one that was written here"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _describe(folder / name) != expected:
            return f"{name} is not the file that was written"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders below ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, key=lambda item: tuple(map(int, item[0].groups())))]


def checkpoint_name(*, steps: int, updates: int) -> str:
    """``step-000012-update-000048``: between two updates of a collect the steps alone do not tell."""
    return f"step-{steps:06d}-update-{updates:06d}"


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest usable checkpoint, and a sentence for each newer one that was skipped."""
    skipped: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        problem = find_problem(path)
        if problem is None:
            return path, skipped
        skipped.append(f"skipped {path.name}: {problem}")
    return None, skipped


def prune(folder: Path, *, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints, and leftovers of interrupted writing."""
    complete = [path for path in list_checkpoints(folder) if find_problem(path) is None]
    for path in complete[:-keep]:
        shutil.rmtree(path)
    for path in folder.glob(".writing-step-*"):
        shutil.rmtree(path)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
