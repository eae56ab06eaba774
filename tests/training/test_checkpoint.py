from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tropism.errors import ModelError
from tropism.training.checkpoint import (
    Checkpoint,
    checkpoint_name,
    find_problem,
    list_checkpoints,
    newest_complete,
    prune,
    read_checkpoint,
    write_checkpoint,
)

STATE = {"counts": {"steps": 3}, "kl_coef": 0.1 + 0.2, "batch": None}
TENSORS = {
    "policy": {"a": torch.tensor([[1.0, float("nan")], [float("inf"), -0.0]]), "b": torch.zeros(0)},
    "batch": {
        "ids": torch.tensor([[1, 2]]),
        "mask": torch.tensor([True, False]),
        "cut": torch.arange(6).view(2, 3)[:, 1:],
    },
    "optimizer": {},
}


def write(folder: Path, *, steps: int = 1, updates: int = 1) -> Path:
    path = folder / checkpoint_name(steps=steps, updates=updates)
    write_checkpoint(path, Checkpoint(state=STATE, tensors=TENSORS))
    return path


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = write(tmp_path)
    read = read_checkpoint(path)
    assert read.state == STATE
    assert read.tensors.keys() == TENSORS.keys()
    for name, tensors in TENSORS.items():
        assert read.tensors[name].keys() == tensors.keys()
        for key, value in tensors.items():
            torch.testing.assert_close(read.tensors[name][key], value, rtol=0, atol=0, equal_nan=True)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}, "nothing pickled"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_names_sort_as_they_were_written(tmp_path: Path) -> None:
    pairs = [(10, 40), (2, 8), (2, 9), (1_000_000, 4_000_000)]
    for steps, updates in pairs:
        write(tmp_path, steps=steps, updates=updates)
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-000001-update-000001").write_text("a file")
    expected = [checkpoint_name(steps=s, updates=u) for s, u in sorted(pairs)]
    assert [path.name for path in list_checkpoints(tmp_path)] == expected
    assert list_checkpoints(tmp_path / "absent") == []


@pytest.mark.parametrize("name", ["policy.safetensors", "state.json", "optimizer.safetensors", "batch.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_damage_is_found_and_the_checkpoint_before_is_taken(name: str, damage: str, tmp_path: Path) -> None:
    good, bad = write(tmp_path, updates=1), write(tmp_path, updates=2)
    data = (bad / name).read_bytes()
    if damage == "missing":
        (bad / name).unlink()
    else:
        (bad / name).write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    assert name in str(find_problem(bad))
    with pytest.raises(ModelError, match=name):
        read_checkpoint(bad)
    path, skipped = newest_complete(tmp_path)
    assert path == good
    assert len(skipped) == 1 and bad.name in skipped[0] and name in skipped[0]


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"files": 3}', '{"files": {"../state.json": {}}}', '{"files": {}}']
)
def test_broken_manifest(text: str | None, tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / "manifest.json").unlink()
    if text is not None:
        (path / "manifest.json").write_text(text)
    assert "manifest" in str(find_problem(path))
    assert newest_complete(tmp_path)[0] is None


def test_only_what_the_manifest_names_is_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / "stranger.safetensors").write_bytes(b"not one of ours")
    assert "stranger" not in read_checkpoint(path).tensors


def test_writing_again_replaces_and_leftovers_are_swept(tmp_path: Path) -> None:
    path = write(tmp_path)
    leftover = tmp_path / f".writing-{path.name}"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    write(tmp_path)
    assert find_problem(path) is None and not leftover.exists()


def test_pruning_keeps_the_newest_and_what_it_did_not_write(tmp_path: Path) -> None:
    paths = [write(tmp_path, updates=updates) for updates in (1, 2, 3, 4)]
    (paths[3] / "manifest.json").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / ".writing-step-000009-update-000009").mkdir()
    prune(tmp_path, keep=2)
    # The last one is incomplete: it is not counted, and stays for whoever wants to look.
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {paths[1].name, paths[2].name, paths[3].name, "notes.txt", "other"}
    prune(tmp_path, keep=5)
    assert {path.name for path in tmp_path.iterdir()} == left


def test_state_is_json_and_floats_survive(tmp_path: Path) -> None:
    state = json.loads((write(tmp_path) / "state.json").read_text())
    assert state["kl_coef"] == 0.1 + 0.2
