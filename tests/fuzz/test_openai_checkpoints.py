"""Whatever is in the files of a checkpoint: the right tensors, or a ModelError. Nothing else, and little memory."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle_writer import block, entry, header, masked, message, number, table
from fuzz_budget import HUGE, enlarged, examples, within
from openai_gpt2 import CHECKPOINTS, SIZES, encoder, variables, weights_of
from tropism.errors import ModelError
from tropism.foreign.tensor_bundle import TensorBundle
from tropism.models.openai_checkpoint import convert_openai_checkpoint

SECONDS = 20.0
MOST_MEMORY = 10e6
DATA = "model.ckpt.data-00000-of-00001"
INDEX = "model.ckpt.index"

CHANGES = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "cut", "insert", "delete"]), st.floats(0, 1), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, changes: list[tuple[str, float, int]]) -> bytes:
    for kind, place, byte in changes:
        at = min(int(place * len(data)), max(len(data) - 1, 0))
        middle = {
            "flip": bytes([data[at] ^ (byte or 1)]) if data else b"",
            "set": bytes([byte]),
            "cut": b"",
            "insert": bytes([byte]) + data[at : at + 1],
            "delete": b"",
        }[kind]
        data = data[:at] + middle + (b"" if kind == "cut" else data[at + 1 :])
    return data


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        with within(SECONDS):
            yield
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


def read_all(folder: Path, name: str) -> dict[str, Any]:
    """The tensors of a checkpoint that are not refused."""
    found = {}
    with little_memory():
        try:
            bundle = TensorBundle(folder, name)
        except ModelError as error:
            check_message(error)
            return {}
        for tensor in bundle.entries:
            try:
                found[tensor] = bundle.read(tensor)
            except ModelError as error:
                check_message(error)
    return found


def check_message(error: ModelError) -> None:
    assert 0 < len(str(error)) < 2000


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a checkpoint, in which every example replaces one file."""
    folder = tmp_path_factory.mktemp("checkpoint") / "gpt2"
    shutil.copytree(CHECKPOINTS / "gpt2", folder)
    return folder


@contextmanager
def replaced(folder: Path, name: str, content: bytes) -> Iterator[None]:
    (folder / name).write_bytes(content)
    try:
        yield
    finally:
        shutil.copy(CHECKPOINTS / "gpt2" / name, folder / name)


@pytest.mark.parametrize("name", [INDEX, DATA])
@examples(60)
@given(changes=CHANGES)
def test_damaged_checkpoints_give_right_tensors_or_none(
    name: str, changes: list[tuple[str, float, int]], copy: Path
) -> None:
    with replaced(copy, name, changed((CHECKPOINTS / "gpt2" / name).read_bytes(), changes)):
        found = read_all(copy, "model.ckpt")
    shapes = dict(variables("model", SIZES["gpt2"]))
    for tensor, values in found.items():
        assert np.array_equal(values, weights_of(tensor, shapes[tensor]))


NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 8, 16, -1, -4, 2**31, 2**32, 2**62, 2**63 - 1, 2**63]) | st.integers(0, 40)
ENTRIES = st.builds(
    entry,
    dtype=st.sampled_from([1, 1, 1, 0, 2, 9, 2**40]),
    shape=st.lists(NUMBERS, max_size=3),
    shard=st.sampled_from([0, 0, 0, 1, -1, 2**62]),
    offset=NUMBERS,
    size=NUMBERS,
    checksum=st.just(masked(bytes(16))) | st.integers(0, 2**32 - 1),
)
RIGHT = st.just(entry(shape=[4], size=16, checksum=masked(bytes(16))))
MESSAGES = st.recursive(
    st.binary(max_size=12) | st.builds(number, st.integers(0, 8), NUMBERS),
    lambda inner: st.builds(message, st.integers(0, 8), inner) | st.tuples(inner, inner).map(b"".join),
    max_leaves=6,
)
ROWS = st.lists(st.tuples(st.binary(max_size=6), ENTRIES | MESSAGES | RIGHT), max_size=5)
BLOCKS = st.binary(max_size=60) | ROWS.map(lambda rows: block([(b"", header()), *rows]))


@examples(150)
@given(blocks=st.lists(BLOCKS, min_size=1, max_size=3), shards=st.just(1) | NUMBERS, held=st.sampled_from([0, 16, 40]))
def test_hostile_indices_with_right_checksums(
    blocks: list[bytes], shards: int, held: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "x.index").write_bytes(table([block([(b"", header(shards=shards))]), *blocks]))
    (folder / "x.data-00000-of-00001").write_bytes(bytes(held))
    for values in read_all(folder, "x").values():
        assert values.dtype == np.float32 and values.nbytes <= held and not values.any()


VALUES = st.none() | st.booleans() | NUMBERS | st.floats() | st.just(HUGE) | st.text(max_size=3) | st.lists(NUMBERS)
SETTINGS = st.dictionaries(st.sampled_from([*SIZES["gpt2"], "embd_pdrop", "dtype"]), VALUES, min_size=1, max_size=3)


@examples(60)
@given(fields=SETTINGS)
def test_any_settings_are_refused_or_the_models_own(fields: dict[str, Any], copy: Path) -> None:
    settings = {**SIZES["gpt2"], **enlarged(fields)}
    try:
        content = json.dumps(settings)
    except ValueError:  # Python writes numbers of 5,000 digits as little as it reads them
        content = json.dumps({**SIZES["gpt2"], **fields}).replace(f'"{HUGE}"', "9" * 5001)
    with replaced(copy, "hparams.json", content.encode()):
        convert(copy)


TOKENS = st.sampled_from([*encoder(), "\ud800", "\0", "", " ", "a b", "<|pad|>"])


@examples(40)
@given(ids=st.dictionaries(TOKENS, st.integers(-1, 65) | VALUES, max_size=3), changes=CHANGES, how=st.integers(0, 3))
def test_any_vocabulary_is_refused_or_used(
    ids: dict[str, Any], changes: list[tuple[str, float, int]], how: int, copy: Path
) -> None:
    if how < 2:
        name, content = "encoder.json", json.dumps({**encoder(), **ids}).encode()
    else:
        name = "encoder.json" if how == 2 else "vocab.bpe"
        content = changed((CHECKPOINTS / "gpt2" / name).read_bytes(), changes)
    with replaced(copy, name, content):
        convert(copy)


@examples(40)
@given(changes=CHANGES)
def test_damaged_names_of_checkpoints(changes: list[tuple[str, float, int]], copy: Path) -> None:
    with replaced(copy, "checkpoint", changed((CHECKPOINTS / "gpt2" / "checkpoint").read_bytes(), changes)):
        convert(copy)


def convert(folder: Path) -> None:
    """Convert, or refuse with nothing left behind."""
    out = folder.parent / "out" / "model"
    shutil.rmtree(out.parent, ignore_errors=True)
    try:
        with within(SECONDS):
            convert_openai_checkpoint(folder, out)
    except ModelError as error:
        check_message(error)
        assert not out.parent.exists() or not list(out.parent.iterdir())
    else:
        assert (out / "model.safetensors").is_file()
