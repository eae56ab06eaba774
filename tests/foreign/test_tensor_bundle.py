"""TensorFlow's checkpoint format: what TensorFlow itself wrote, what it may write, and what it never would."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bundle_writer import block, entry, footer, header, masked, message, number, stored, table, varint, write_bundle
from openai_gpt2 import CHECKPOINTS, SIZES, variables, weights_of
from tropism.errors import ModelError
from tropism.foreign import tensor_bundle
from tropism.foreign.tensor_bundle import TensorBundle


def refusal(folder: Path, name: str = "x") -> str:
    """The message with which a checkpoint is refused, when it is opened or its tensor "a" is read."""
    with pytest.raises(ModelError) as caught:
        TensorBundle(folder, name).read("a")
    return str(caught.value)


def write_index(folder: Path, entries: Sequence[tuple[bytes, bytes]], *, data: bytes = b"") -> None:
    (folder / "x.index").write_bytes(table([block([(b"", header()), *entries])]))
    (folder / "x.data-00000-of-00001").write_bytes(data)


def test_what_tensorflow_wrote_is_read() -> None:
    bundle = TensorBundle(CHECKPOINTS / "gpt2", "model.ckpt")
    expected = dict(variables("model", SIZES["gpt2"]))
    assert bundle.entries.keys() == expected.keys()
    for name, shape in expected.items():
        found = bundle.read(name)
        assert found.dtype == np.float32 and found.shape == shape
        assert np.array_equal(found, weights_of(name, shape))


def test_numbers_that_are_no_floats_are_listed_but_not_read() -> None:
    bundle = TensorBundle(CHECKPOINTS / "run" / "policy", "checkpoints/model.ckpt-7")
    assert bundle.entries["global_step"].shape == ()
    with pytest.raises(ModelError, match=r"'global_step' .* no float32 tensor \(TensorFlow's type 9\)"):
        bundle.read("global_step")
    assert bundle.read("policy/model/heads/value/b") == np.float32(0.25)


@pytest.mark.parametrize(("shards", "block_size"), [(1, 100), (1, 2), (3, 100), (3, 1)])
def test_several_data_files_and_blocks(shards: int, block_size: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [(), (3,), (2, 5), (0,), (1, 2, 3), (7, 1)]
    tensors = {f"model/part{n}/w": generator.random(shape, np.float32) for n, shape in enumerate(shapes)}
    write_bundle(tmp_path, "x", tensors, shards=shards, block_size=block_size)
    bundle = TensorBundle(tmp_path, "x")
    assert bundle.entries.keys() == tensors.keys()
    for name, values in tensors.items():
        assert np.array_equal(bundle.read(name), values) and bundle.read(name).shape == values.shape


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 47, 48, 100, 500, 918])
def test_an_index_that_is_cut_off(length: int, tmp_path: Path) -> None:
    data = (CHECKPOINTS / "gpt2" / "model.ckpt.index").read_bytes()
    assert len(data) == 919
    (tmp_path / "x.index").write_bytes(data[:length])
    assert f"{tmp_path / 'x'}.index is damaged" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [("x.index", "the checksum of a block differs"), ("x.data-00000-of-00001", "its checksum differs from the one")],
)
def test_a_flipped_bit_of_the_index_or_the_data(file: str, message: str, tmp_path: Path) -> None:
    write_bundle(tmp_path, "x", {"a": np.arange(4, dtype=np.float32)})
    whole = (tmp_path / file).read_bytes()
    for place in (0, 7, 15):
        data = bytearray(whole)
        data[place] ^= 16
        (tmp_path / file).write_bytes(data)
        assert message in refusal(tmp_path)


def test_data_that_is_cut_off_or_missing(tmp_path: Path) -> None:
    write_bundle(tmp_path, "x", {"a": np.ones(4, np.float32)})
    data = tmp_path / "x.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-1])
    assert "'a'" in refusal(tmp_path) and "ends at byte 16, and x.data-00000-of-00001 has 15" in refusal(tmp_path)
    data.unlink()
    assert "has no file x.data-00000-of-00001" in refusal(tmp_path)
    (tmp_path / "x.index").unlink()
    assert "has no file x.index" in refusal(tmp_path)


# Hostile files, all checksums right -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"offset": 4, "size": 16}, "ends at byte 20"),
        ({"offset": 2**62, "size": 16}, "ends at byte"),
        ({"offset": -4}, "negative size or offset"),
        ({"size": -16}, "negative size or offset"),
        ({"shape": (-4,)}, "negative size or offset"),
        ({"shape": (-2, -2)}, "negative size or offset"),
        ({"shape": (2**40, 2**22), "size": 2**62}, "takes 4611686018427387904 bytes; it is damaged"),
        ({"shape": (2**40,), "size": 2**42}, "ends at byte"),
        ({"shape": (5,)}, "has the shape [5], but takes 16 bytes"),
        ({"shape": (4,) * 9}, "has 9 dimensions"),
        ({"shape": ()}, "has the shape [], but takes 16 bytes"),
        ({"dtype": 7}, "no float32 tensor"),
        ({"dtype": -1}, "negative"),
        ({"shard": 1}, "in data file 1 of 1"),
        ({"shard": -1}, "negative"),
        ({"checksum": 5}, "checksum differs"),
    ],
    ids=str,
)
def test_entries_that_do_not_fit(wrong: dict[str, int], message: str, tmp_path: Path) -> None:
    data = np.ones(4, np.float32).tobytes()
    right = {"shape": (4,), "size": 16, "checksum": masked(data)}
    write_index(tmp_path, [(b"a", entry(**right))], data=data)  # type: ignore[arg-type]
    assert np.array_equal(TensorBundle(tmp_path, "x").read("a"), np.ones(4, np.float32))
    write_index(tmp_path, [(b"a", entry(**{**right, **wrong}))], data=data)  # type: ignore[arg-type]
    assert message in refusal(tmp_path)


def test_slices_are_refused_by_name(tmp_path: Path) -> None:
    write_index(tmp_path, [(b"a", entry(shape=(4,)) + message(7, b""))])
    assert "'a'" in refusal(tmp_path) and "was saved in slices" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (struct.pack("<I", 2**32 - 1), "more restarts"),
        (b"\x01\x01\x01ab" + block([]), "goes on from a longer one"),
        (b"\x00\x01\x05ab" + block([]), "cut off"),
        (b"\x00" + b"\xff" * 9 + b"\x01\x01ab" + block([]), "too long"),
        (b"\x00" + b"\xff" * 10 + b"\x01" + block([]), "more than 64 bits"),
        (b"\x00" + b"\xff" * 9 + b"\x7f" + block([]), "more than 64 bits"),
        (b"\x00\x80" + block([]), "cut off"),
        (block([(b"n" * 2000, b"")]), "too long"),
        (block([(b"", header()), (b"a", b"x" * 20_000)]), "too long"),
        (block([(b"a", entry())]), "in data file 0 of 0"),
        (block([(b"", header()), (b"a", entry()), (b"a", entry())]), "occurs twice"),
        (block([(b"", header(endianness=1))]), "begin with the highest byte"),
        (block([(b"", header()), (b"a", b"\x0f")]), "unknown kind 7"),
        (block([(b"", header()), (b"a", b"\x0a\x50")]), "a message is cut off"),
        (block([(b"", header()), (b"a", b"\x0d\x00")]), "a message is cut off"),
        (block([(b"", header()), (b"a", message(1, b"x"))]), "field 1 of a message is no number"),
        (block([(b"", header()), (b"a", number(2, 5))]), "field 2 of a message is no message"),
        (block([(b"", header()), (b"a", message(2, number(2, 5)))]), "field 2 of a message is no message"),
    ],
)
def test_blocks_that_no_writer_makes(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.index").write_bytes(table([content]))
    found = refusal(tmp_path)
    assert message in found and f"{tmp_path / 'x'}.index is damaged" in found


@pytest.mark.parametrize("handle", [(0, 10**9), (2**63, 5), (0, 2**63), (60, 1)])
def test_blocks_outside_of_the_file(handle: tuple[int, int], tmp_path: Path) -> None:
    index = block([(b"", varint(handle[0]) + varint(handle[1]))])
    (tmp_path / "x.index").write_bytes(stored(index) + footer((0, 0), (0, len(index))))
    assert "a block lies beyond its end" in refusal(tmp_path)


def test_blocks_that_overlap(tmp_path: Path) -> None:
    """Many handles of one large block would be a bomb."""
    content = block([(b"", header())])
    out = stored(content)
    index = block([(key, varint(0) + varint(len(content))) for key in (b"a", b"b")])
    (tmp_path / "x.index").write_bytes(out + stored(index) + footer((0, 0), (len(out), len(index))))
    assert "two of its blocks overlap" in refusal(tmp_path)


def test_compressed_blocks_are_refused(tmp_path: Path) -> None:
    index = block([])
    (tmp_path / "x.index").write_bytes(stored(index, kind=1) + footer((0, 0), (0, len(index))))
    assert "a block is compressed (kind 1)" in refusal(tmp_path)


def test_a_small_index_cannot_take_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that share a long beginning take a few bytes each in the file, and all of it when they are read."""
    rows = b"".join(varint(990) + b"\x0a\x00" + f"{n:010d}".encode() for n in range(2000))
    first = block([(b"", header())])[:-8] + b"\x00" + varint(1000) + b"\x00" + b"n" * 1000
    (tmp_path / "x.index").write_bytes(table([first + rows + block([])]))
    monkeypatch.setattr(tensor_bundle, "_MOST_TENSORS", 500)
    tracemalloc.start()
    try:
        assert "names more than 500 tensors" in refusal(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_files_that_are_links_out_of_the_folder_or_pipes(tmp_path: Path) -> None:
    write_bundle(tmp_path / "other", "x", {"a": np.ones(4, np.float32)})
    write_bundle(tmp_path / "own", "x", {"a": np.ones(4, np.float32)})
    for name in ("x.data-00000-of-00001", "x.index"):
        path = tmp_path / "own" / name
        path.unlink()
        path.symlink_to(tmp_path / "other" / name)
        assert "leads outside its folder" in refusal(tmp_path / "own")
        path.unlink()
        os.mkfifo(path)
        assert "no regular file" in refusal(tmp_path / "own")
        path.unlink()
        path.write_bytes((tmp_path / "other" / name).read_bytes())
    assert TensorBundle(tmp_path / "own", "x").read("a").sum() == 4


def test_a_large_index_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "x.index").open("wb") as file:
        file.truncate(10**12)
    assert "takes 1,000,000,000,000 bytes" in refusal(tmp_path)
