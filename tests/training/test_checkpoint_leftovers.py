"""What interrupted writing, replacing and deleting of checkpoints leaves is cleared up, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from tropism.training.checkpoint import (
    Checkpoint,
    checkpoint_name,
    find_problem,
    read_checkpoint,
    read_newest,
    sweep,
    write_checkpoint,
)

STATE = {"counts": {"steps": 3}}
TENSORS = {"policy": {"a": torch.ones(2)}, "batch": {}, "optimizer": {}}


def write(folder: Path) -> Path:
    path = folder / checkpoint_name(steps=1, updates=1)
    write_checkpoint(path, Checkpoint(state=STATE, tensors=TENSORS))
    return path


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.rename(tmp_path / f".replaced-{path.name}")
    (tmp_path / f".writing-{path.name}").mkdir()
    assert read_newest(tmp_path)[0] is not None, "before anything is swept"
    sweep(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert read_checkpoint(path).state == STATE


def test_what_was_replaced_or_being_deleted_goes(tmp_path: Path) -> None:
    path = write(tmp_path)
    for prefix in (".replaced-", ".deleting-"):
        shutil.copytree(path, tmp_path / f"{prefix}{path.name}")
        (tmp_path / f"{prefix}{path.name}" / "policy.safetensors").unlink()
        (tmp_path / f"{prefix}{path.name}" / f"note{prefix}txt").write_text("mine")
    shutil.copytree(path, tmp_path / ".deleting-step-000009-update-000009")
    sweep(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert read_checkpoint(path).state == STATE
    assert {file.name for file in path.iterdir()} >= {"note.replaced-txt", "note.deleting-txt"}


def test_other_names_are_not_swept(tmp_path: Path) -> None:
    names = [".writing-mine", ".writing-step-1", "writing-best", ".deleting-all", ".replaced-", ".tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".writing-best").write_text("a file")
    (tmp_path / ".deleting-best").symlink_to(tmp_path / ".tmp")
    sweep(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {*names, ".writing-best", ".deleting-best"}


def test_a_note_in_a_folder_that_is_replaced_stays(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / "note.txt").write_text("mine")
    (path / "manifest.json").write_text("broken")
    write(tmp_path)
    assert (path / "note.txt").read_text() == "mine" and find_problem(path) is None
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
