"""TensorFlow's checkpoints (tensor bundles), read without TensorFlow, which takes 1.3 GB once it is installed.

A checkpoint NAME is NAME.index, a table from names to where their tensors are, and NAME.data-00000-of-00001, their
numbers side by side. Every offset, length and count is checked against the file before it is followed, and every
checksum is compared.

Formats: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/util/tensor_bundle/tensor_bundle.h
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/protobuf/tensor_bundle.proto
https://github.com/google/leveldb/blob/main/doc/table_format.md
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tropism.errors import ModelError
from tropism.foreign.crc32c import masked_crc32c
from tropism.foreign.paths import file_inside

_MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
_FOOTER = 48
_TRAILER = 5
"""Bytes behind a block: its compression and its checksum."""
_MOST_BYTES = 16_000_000
"""Of an index; that of a model with a thousand tensors takes 100 kB."""
_LONGEST_MESSAGE = 10_000
"""Bytes that describe one tensor; they are fewer than 100 where it was not saved in slices."""
_MOST_TENSORS = 100_000
_LONGEST_NAME = 1024
_MOST_DIMENSIONS = 8
_FLOAT32 = 1
_BYTES_OF_FIXED = {1: 8, 5: 4}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where a tensor is."""

    dtype: int
    """TensorFlow's number of the kind; 1 is float32."""
    shape: tuple[int, ...]
    shard: int
    """Number of the data file."""
    offset: int
    size: int
    """Bytes in the data file."""
    checksum: int
    """Masked CRC-32C of the bytes."""
    sliced: bool
    """Whether it was saved in parts under other names, as partitioned variables are."""


class TensorBundle:
    """A checkpoint whose index has been read; tensors are read one by one."""

    def __init__(self, folder: Path, name: str) -> None:
        """Read ``name``.index in ``folder``.

        Raises:
            ModelError: it is not there, no index, damaged, or claims what cannot be; names the file.
        """
        self.folder, self.name = folder, name
        path = self._file(f"{name}.index")
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise ModelError(f"{folder / name}.index takes {size:,} bytes, more than any index needs; it is damaged")
        try:
            self._shards, self.entries = _read_index(path.read_bytes())
        except _DamagedError as error:
            raise ModelError(f"{folder / name}.index is damaged: {error}; download it again") from error

    def read(self, name: str) -> NDArray[np.float32]:
        """The tensor ``name``, which must be one of ``entries``.

        Raises:
            ModelError: it is no whole float32 tensor, lies beyond the end of its file, or its checksum differs.
        """
        entry, shown = self.entries[name], f"the tensor {name!r:.80} of {self.folder / self.name}"
        if entry.sliced:
            raise ModelError(f"{shown} was saved in slices, which cannot be read; save the model without partitions")
        if entry.dtype != _FLOAT32:
            raise ModelError(f"{shown} is no float32 tensor (TensorFlow's type {entry.dtype}); save it as one")
        if entry.size != 4 * prod(entry.shape):
            raise ModelError(f"{shown} has the shape {list(entry.shape)}, but takes {entry.size} bytes; it is damaged")
        data = f"{self.name}.data-{entry.shard:05d}-of-{self._shards:05d}"
        path = self._file(data)
        held, end = path.stat().st_size, entry.offset + entry.size
        if end > held:
            raise ModelError(
                f"{shown} ends at byte {end}, and {data} has {held}; one of them is damaged: download both again"
            )
        with path.open("rb") as file:
            file.seek(entry.offset)
            values: NDArray[np.float32] = np.fromfile(file, "<f4", entry.size // 4)
        if masked_crc32c(values.view(np.uint8)) != entry.checksum:
            raise ModelError(f"{shown} is damaged: its checksum differs from the one in the index; download it again")
        return values.reshape(entry.shape)

    def _file(self, name: str) -> Path:
        path = file_inside(self.folder, name)
        if path is None:
            raise ModelError(f"{self.folder} has no file {name}, which its checkpoint needs; download it")
        return path


class _DamagedError(Exception):
    """What is wrong with an index."""


def _read_index(data: bytes) -> tuple[int, dict[str, TensorEntry]]:
    """Number of data files, and the entries by name."""
    entries: dict[str, TensorEntry] = {}
    shards = 0
    for key, value in _table(data):
        if len(entries) > _MOST_TENSORS:
            raise _DamagedError(f"it names more than {_MOST_TENSORS} tensors")
        if not key:
            shards = _header(value)
            continue
        name = key.decode("utf-8", "surrogateescape")
        if name in entries:
            raise _DamagedError(f"the tensor {name!r:.80} occurs twice")
        entries[name] = _entry(value, name)
        if entries[name].shard >= shards:
            raise _DamagedError(f"the tensor {name!r:.80} is in data file {entries[name].shard} of {shards}")
    return shards, entries


def _header(message: bytes) -> int:
    """The number of data files; the header comes first, under the empty name."""
    fields = _fields(message)
    if _number(fields, 2):
        raise _DamagedError("its numbers begin with the highest byte, as no usual machine writes them")
    return _number(fields, 1)


def _entry(message: bytes, name: str) -> TensorEntry:
    fields = _fields(message)
    shape = _fields(_messages(fields, 2)[-1]) if 2 in fields else {}
    dimensions = _messages(shape, 2)
    if len(dimensions) > _MOST_DIMENSIONS:
        raise _DamagedError(f"the tensor {name!r:.80} has {len(dimensions)} dimensions")
    numbers = {n: _number(fields, n) for n in (1, 3, 4, 5, 6)}
    sizes = tuple(_number(_fields(dimension), 1) for dimension in dimensions)
    if max((*numbers.values(), *sizes)) >= 2**63:
        raise _DamagedError(f"the tensor {name!r:.80} has a negative size or offset")
    return TensorEntry(
        dtype=numbers[1],
        shape=sizes,
        shard=numbers[3],
        offset=numbers[4],
        size=numbers[5],
        checksum=numbers[6],
        sliced=7 in fields,
    )


# Sorted tables --------------------------------------------------------------------------------------------------------


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a sorted table, in order."""
    if len(data) < _FOOTER or not data.endswith(_MAGIC):
        raise _DamagedError("it does not end as such a file does")
    footer = data[-_FOOTER:-8]
    place = 0
    for _ in range(2):  # where the names of filters are, which these tables do not have
        _, place = _varint(footer, place)
    end = 0
    for _, handle in _block(data, footer[place:])[0]:
        # Blocks that lie side by side cannot be more than the file holds, however many there are said to be.
        entries, (start, size) = _block(data, handle)
        if start < end:
            raise _DamagedError("two of its blocks overlap")
        end = start + size
        yield from entries


def _block(data: bytes, handle: bytes) -> tuple[Iterator[tuple[bytes, bytes]], tuple[int, int]]:
    """The entries of the block that a handle leads to, and the block's offset and size."""
    start, place = _varint(handle, 0)
    size, _ = _varint(handle, place)
    end = start + size
    if end + _TRAILER > len(data) - _FOOTER:
        raise _DamagedError("a block lies beyond its end")
    if data[end]:
        raise _DamagedError(f"a block is compressed (kind {data[end]}), which TensorFlow never does")
    (checksum,) = struct.unpack_from("<I", data, end + 1)
    if masked_crc32c(data[start : end + 1]) != checksum:
        raise _DamagedError("the checksum of a block differs")
    return _entries(data[start:end]), (start, size)


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block; a key is written as what it shares with the one before it, and the rest."""
    if len(block) < 4:
        raise _DamagedError("a block is too short")
    (restarts,) = struct.unpack_from("<I", block, len(block) - 4)
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise _DamagedError("a block claims more restarts than it holds")
    block = block[:end]
    place, key = 0, b""
    while place < end:
        shared, place = _varint(block, place)
        unshared, place = _varint(block, place)
        length, place = _varint(block, place)
        if shared > len(key) or shared + unshared > _LONGEST_NAME:
            raise _DamagedError("a name is too long, or goes on from a longer one than there is")
        if length > _LONGEST_MESSAGE or unshared + length > end - place:
            raise _DamagedError("an entry is too long, or cut off")
        key = key[:shared] + block[place : place + unshared]
        place += unshared + length
        yield key, block[place - length : place]


# Protocol buffers -----------------------------------------------------------------------------------------------------


def _fields(message: bytes) -> dict[int, list[int | bytes]]:
    """The values of a message by the number of their field."""
    fields: dict[int, list[int | bytes]] = {}
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, kind = tag >> 3, tag & 7
        value: int | bytes
        if kind == 0:
            value, place = _varint(message, place)
        else:
            if kind == 2:
                length, place = _varint(message, place)
            elif kind in _BYTES_OF_FIXED:
                length = _BYTES_OF_FIXED[kind]
            else:
                raise _DamagedError(f"a message has a field of the unknown kind {kind}")
            if length > len(message) - place:
                raise _DamagedError("a message is cut off")
            piece = message[place : place + length]
            place += length
            value = piece if kind == 2 else int.from_bytes(piece, "little")
        fields.setdefault(number, []).append(value)
    return fields


def _number(fields: dict[int, list[int | bytes]], number: int) -> int:
    """The field ``number``, whose last value counts; 0 where it is left out."""
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise _DamagedError(f"field {number} of a message is no number")
    return value


def _messages(fields: dict[int, list[int | bytes]], number: int) -> list[bytes]:
    """All values of the field ``number``, which are messages."""
    values = fields.get(number, [])
    messages = [value for value in values if isinstance(value, bytes)]
    if len(messages) < len(values):
        raise _DamagedError(f"field {number} of a message is no message")
    return messages


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of up to 64 bits, seven a byte, and the place behind it."""
    value = 0
    for count in range(10):
        if place + count >= len(data):
            raise _DamagedError("a number is cut off")
        byte = data[place + count]
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, place + count + 1
    raise _DamagedError("a number takes more than 64 bits")
