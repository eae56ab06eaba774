from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tropism.errors import ModelError, StorageError
from tropism.training import checkpoint as module
from tropism.training.checkpoint import (
    RUN_PARTS,
    Checkpoint,
    checkpoint_name,
    find_problem,
    list_checkpoints,
    newest_complete,
    prune,
    read_checkpoint,
    read_newest,
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
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "missing"),
        ("cut", "instead of"),
        ("emptied", "instead of"),
        ("longer", "instead of"),
        ("changed", "sha256"),
        ("link", "not a regular file"),
        ("folder", "not a regular file"),
    ],
)
def test_damage_is_found_and_the_checkpoint_before_is_taken(name: str, damage: str, words: str, tmp_path: Path) -> None:
    good, bad = write(tmp_path, updates=1), write(tmp_path, updates=2)
    spoil(bad / name, damage)
    problem = str(find_problem(bad))
    assert name in problem and words in problem
    with pytest.raises(ModelError, match=name):
        read_checkpoint(bad)
    path, skipped = newest_complete(tmp_path)
    assert path == good
    assert len(skipped) == 1 and bad.name in skipped[0] and name in skipped[0]
    checkpoint, told = read_newest(tmp_path)
    assert checkpoint is not None and checkpoint.state == STATE
    assert len(told) == 1 and bad.name in told[0] and name in told[0]


def spoil(path: Path, damage: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "link":
        elsewhere = path.parent.parent / "elsewhere"
        elsewhere.write_bytes(data)
        path.symlink_to(elsewhere)
    elif damage != "missing":
        changed = data[:-1] + bytes([data[-1] ^ 1])
        path.write_bytes({"cut": data[:-1], "emptied": b"", "longer": data + b"x", "changed": changed}[damage])


def test_any_bit_of_any_file_counts(tmp_path: Path) -> None:
    path = write(tmp_path)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        step = max(1, len(data) // 40)
        for place in range(0, len(data), step):
            file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            with pytest.raises(ModelError):
                read_checkpoint(path)
        file.write_bytes(data)
    assert read_checkpoint(path).state == STATE


def forged(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the list of files, and sign it like a manifest that was written here."""
    files = json.loads((path / "manifest.json").read_text())["files"]
    change(files)
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"files": files, "sha256": digest}))


@pytest.mark.parametrize("part", [*RUN_PARTS, "state"])
def test_a_manifest_that_lacks_a_file(part: str, tmp_path: Path) -> None:
    """A run without, say, its optimizer's moments would go on as if nothing had happened."""
    path = write(tmp_path)
    name = "state.json" if part == "state" else f"{part}.safetensors"
    forged(path, lambda files: files.pop(name))
    (path / name).unlink()
    with pytest.raises(ModelError, match=name):
        read_checkpoint(path, parts=RUN_PARTS)
    checkpoint, skipped = read_newest(tmp_path)
    assert checkpoint is None and name in skipped[0]


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", ".hidden", "manifest.json", "a\0b"]
)
def test_a_manifest_names_plain_files_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    path = write(tmp_path)
    forged(path, lambda files: files.update({name: {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}))
    assert "manifest" in str(find_problem(path))


@pytest.mark.parametrize("name", ["../policy", "a/b", "", ".policy", "a b"])
def test_parts_have_plain_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot name a part"):
        write_checkpoint(tmp_path / "x", Checkpoint(state={}, tensors={name: {}}))


def test_a_link_to_a_checkpoint_is_not_one(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere")
    (tmp_path / "here").mkdir()
    name = checkpoint_name(steps=1, updates=1)
    (tmp_path / "here" / name).symlink_to(tmp_path / "elsewhere" / name)
    checkpoint, skipped = read_newest(tmp_path / "here")
    assert checkpoint is None and "no folder of its own" in skipped[0]
    prune(tmp_path / "here", keep=1)
    assert (tmp_path / "here" / name).is_symlink()


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", '{"files": 3}', '{"files": {}}', '{"files": {}, "sha256": ""}', "[" * 100_000, "\0", "null"],
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


def test_pruning_leaves_what_it_did_not_write(tmp_path: Path) -> None:
    paths = [write(tmp_path, updates=updates) for updates in (1, 2, 3)]
    (paths[0] / "why-this-one.txt").write_text("mine")
    (paths[1] / "notes").mkdir()
    prune(tmp_path, keep=1)
    assert [
        path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*")) if paths[2] != path.parent
    ] == [
        paths[0].name,
        f"{paths[0].name}/why-this-one.txt",
        paths[1].name,
        f"{paths[1].name}/notes",
        paths[2].name,
    ]
    assert (paths[0] / "why-this-one.txt").read_text() == "mine"
    assert read_newest(tmp_path)[0] is not None


def test_the_last_complete_one_stays_whatever_comes_after_it(tmp_path: Path) -> None:
    """After a run found later ones damaged, by a hash or by a size, it writes before them."""
    write(tmp_path, updates=1)
    for updates, damage in ((6, "changed"), (7, "cut")):
        spoil(write(tmp_path, updates=updates) / "policy.safetensors", damage)
    written = write(tmp_path, updates=2)
    prune(tmp_path, keep=1, newest=written)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["2", "6", "7"]
    assert newest_complete(tmp_path)[0] == written


def test_pruning_does_not_read_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for updates in (1, 2, 3):
        write(tmp_path, updates=updates)
    monkeypatch.setattr(module, "_describe", lambda path: pytest.fail(f"{path} was read"))
    prune(tmp_path, keep=1)
    assert len(list_checkpoints(tmp_path)) == 1


# Failures ------------------------------------------------------------------------------------------------------------


def limited(size: int) -> Callable[[], None]:
    """No file may grow beyond ``size`` bytes, as if the disk were full; returns what takes that back."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


BIG = Checkpoint(state=STATE, tensors={**TENSORS, "policy": {"a": torch.arange(5000.0)}})


@pytest.mark.parametrize("size", [0, 40, 300, 6000, 20_000])
@pytest.mark.parametrize("again", [False, True])
def test_a_disk_that_fills_leaves_what_was_there(size: int, again: bool, tmp_path: Path) -> None:
    path = write(tmp_path)
    new = path if again else path.with_name(checkpoint_name(steps=1, updates=2))
    unlimited = limited(size)
    try:
        with pytest.raises(
            StorageError, match=r"cannot be written: File too large; it needs .* bytes, and .* are free"
        ):
            write_checkpoint(new, BIG)
    finally:
        unlimited()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert len(read_checkpoint(path).tensors["policy"]["a"]) == 2
    write_checkpoint(new, BIG)
    assert len(read_checkpoint(new).tensors["policy"]["a"]) == 5000


@pytest.mark.parametrize("failing", ["_put_in_place", "flush", "_describe"])
def test_what_stood_there_is_not_touched_before_the_new_one_is_complete(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(module, failing, fail)
        with pytest.raises(StorageError, match="the disk is gone"):
            write_checkpoint(path, BIG)
    assert read_checkpoint(path).state == STATE and len(list(tmp_path.iterdir())) == 1


def test_what_stood_there_comes_back_if_the_new_one_cannot_have_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    rename = Path.rename

    def fail(source: Path, target: Path) -> Path:
        if source.name.startswith(".writing"):
            raise OSError("the disk is gone")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StorageError, match="the disk is gone"):
        write_checkpoint(path, BIG)
    assert read_checkpoint(path).state == STATE and len(list(tmp_path.iterdir())) == 1


def test_room_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=20_000))
    monkeypatch.setattr(module, "save_file", lambda *args: pytest.fail("writing had begun"))
    with pytest.raises(
        StorageError, match=r"No space left on device; it needs 2\d,\d{3} bytes, and 20,000 are free.*Free"
    ):
        write_checkpoint(tmp_path / "new", BIG)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (Path("/proc/tropism"), tmp_path / "file"):
        with pytest.raises(StorageError, match="cannot be written"):
            write(folder)


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def flushed(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append(f"rename to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    path = write(tmp_path / "checkpoints")
    place = done.index(f"rename to {path.name}")
    assert set(done[:place]) == {*(file.name for file in path.iterdir()), f".writing-{path.name}"}
    assert done[place + 1 :] == ["checkpoints"]


def test_tensors_are_copied_only_where_they_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole copy of the weights and the moments would be three times what is trained."""
    whole, other = torch.arange(6.0).view(2, 3), torch.ones(4)
    given = {"whole": whole, "other": other, "row": whole[1], "twice": other, "turned": torch.arange(6.0).view(2, 3).T}
    seen: dict[str, int] = {}

    def watched(tensors: dict[str, torch.Tensor], path: Path) -> None:
        seen.update({name: tensor.data_ptr() for name, tensor in tensors.items()})
        save_file(tensors, path)

    monkeypatch.setattr(module, "save_file", watched)
    write_checkpoint(tmp_path / "x", Checkpoint(state={}, tensors={"policy": given}))
    same = {name for name, tensor in given.items() if seen[name] == tensor.data_ptr()}
    assert same == {"whole", "other"}
    for name, tensor in read_checkpoint(tmp_path / "x").tensors["policy"].items():
        assert torch.equal(tensor, given[name])


def test_state_is_json_and_floats_survive(tmp_path: Path) -> None:
    state = json.loads((write(tmp_path) / "state.json").read_text())
    assert state["kl_coef"] == 0.1 + 0.2
