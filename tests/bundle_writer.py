"""Writes TensorFlow's checkpoint format byte by byte, right or deliberately wrong, with checksums bit by bit."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FLOAT32 = 1


def slow_crc32c(data: bytes) -> int:
    """The definition: a division by the polynomial of Castagnoli, one bit after the other."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    checksum = slow_crc32c(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) % 2**32


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value % 2**64)


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def header(*, shards: int = 1, endianness: int = 0) -> bytes:
    return number(1, shards) + number(2, endianness) + message(3, number(1, 1))


def entry(
    *,
    dtype: int = FLOAT32,
    shape: Sequence[int] = (),
    shard: int = 0,
    offset: int = 0,
    size: int = 0,
    checksum: int = 0,
) -> bytes:
    dimensions = b"".join(message(2, number(1, n)) for n in shape)
    place = number(3, shard) + number(4, offset) + number(5, size)
    return number(1, dtype) + message(2, dimensions) + place + varint(6 << 3 | 5) + struct.pack("<I", checksum % 2**32)


def block(entries: Sequence[tuple[bytes, bytes]], *, restarts: int = 1) -> bytes:
    """Entries whose keys share as much as they can with the one before."""
    out, before = b"", b""
    for key, value in entries:
        shared = 0
        while shared < min(len(key), len(before)) and key[shared] == before[shared]:
            shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    return out + struct.pack("<I", 0) * restarts + struct.pack("<I", restarts)


def stored(content: bytes, *, kind: int = 0) -> bytes:
    """A block with its trailer."""
    return content + bytes([kind]) + struct.pack("<I", masked(content + bytes([kind])))


def footer(meta: tuple[int, int], index: tuple[int, int]) -> bytes:
    handles = b"".join(varint(n) for n in (*meta, *index))
    return handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def table(blocks: Sequence[bytes]) -> bytes:
    """A sorted table of data blocks (as ``block`` makes them, or any bytes)."""
    out = b""
    handles: list[tuple[bytes, bytes]] = []
    for content in blocks:
        handles.append((f"key{len(handles):06d}".encode(), varint(len(out)) + varint(len(content))))
        out += stored(content)
    meta, index = block([]), block(handles)
    places = (len(out), len(meta)), (len(out) + len(stored(meta)), len(index))
    return out + stored(meta) + stored(index) + footer(*places)


def write_bundle(
    folder: Path, name: str, tensors: Mapping[str, Any], *, shards: int = 1, block_size: int = 10**6
) -> None:
    """A whole checkpoint of float32 tensors, which go to the data files in turn."""
    data = [b""] * shards
    rows = [(b"", header(shards=shards))]
    for count, key in enumerate(sorted(tensors, key=str.encode)):
        values = np.asarray(tensors[key])
        content, shard = values.tobytes(), count % shards
        kind = {"float32": FLOAT32, "int64": 9}[values.dtype.name]
        rows.append(
            (
                key.encode(),
                entry(
                    dtype=kind,
                    shape=values.shape,
                    shard=shard,
                    offset=len(data[shard]),
                    size=len(content),
                    checksum=masked(content),
                ),
            )
        )
        data[shard] += content
    blocks = [block(rows[start : start + block_size]) for start in range(0, len(rows), block_size)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.index").write_bytes(table(blocks))
    for shard, content in enumerate(data):
        (folder / f"{name}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)
