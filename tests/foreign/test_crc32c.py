"""The checksum against published vectors and against its definition, bit by bit."""

from __future__ import annotations

import random

import numpy as np
import pytest

from bundle_writer import masked, slow_crc32c
from tropism.foreign import crc32c as module
from tropism.foreign.crc32c import crc32c, masked_crc32c


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"a", 0xC1D04330),
        (b"123456789", 0xE3069283),
        # RFC 3720, B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_vectors(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected == slow_crc32c(data)


@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 127, 128, 129, 255, 256, 1000, 4095, 4096, 4097, 9999])
def test_any_length_is_as_by_definition(length: int) -> None:
    data = random.Random(length).randbytes(length)
    assert crc32c(data) == slow_crc32c(data) == crc32c(np.frombuffer(data, np.uint8))
    assert masked_crc32c(data) == masked(data)


@pytest.mark.parametrize("piece", [1, 3, 64, 100, 1024])
def test_pieces_join(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(0).randbytes(3001)
    monkeypatch.setattr(module, "_PIECE", piece)
    assert crc32c(data) == slow_crc32c(data)
