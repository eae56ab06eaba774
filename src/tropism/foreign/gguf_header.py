"""The header of a GGUF file, read with every count and length checked against the file before it is followed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tropism.errors import ModelError
from tropism.foreign.weights import WeightFacts

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_NAME = 1024
_LONGEST_KEY = 65_535
_MOST_DIMENSIONS = 8
_MOST_ALIGNMENT = 2**20
_COUNTS = re.compile(r"\.(expert_count|head_count|expert_used_count|nextn_predict_layers)$")
_MOST_COUNTED = 10_000


@dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    """What the header of a GGUF file says."""

    settings: dict[str, Any]
    """Key -> number, text, truth value; of an array its length."""
    weights: WeightFacts


def read_gguf_header(path: Path) -> GGUFHeader:
    """The header of a GGUF file.

    Raises:
        ModelError: it is no GGUF file, is cut off, or claims what the file does not hold; names the file.
    """
    with path.open("rb") as file:
        head = file.read(24)
        if len(head) < 24 or head[:4] != _MAGIC:
            raise ModelError(f"{path} is no GGUF file: it does not start with the letters GGUF")
        version, tensors, entries = struct.unpack("<IQQ", head[4:])
        if version not in (2, 3):
            raise ModelError(f"{path} is a GGUF file of version {version}; versions 2 and 3 can be read")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # The smallest tensor entry takes 24 bytes (name length, rank, type, offset), the smallest key 13.
            if 24 * tensors + 13 * entries > len(data):
                raise ModelError(
                    f"{path} is damaged: it claims {tensors} tensors and {entries} keys, which do not fit in it"
                )
            try:
                return _Reader(data).header(tensors, entries)
            except (_DamagedError, struct.error, UnicodeDecodeError) as error:
                raise ModelError(f"{path} is damaged: {error}") from error


class _DamagedError(Exception):
    """What is wrong with a file."""


class _Reader:
    """Reads a GGUF file from front to back."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 24

    def header(self, tensors: int, entries: int) -> GGUFHeader:
        settings: dict[str, Any] = {}
        for _ in range(entries):
            key = self.text(_LONGEST_KEY, "key")
            if key in settings:
                raise _DamagedError(f"the key {key!r:.80} occurs twice")
            settings[key] = self.value(self.number("I"), key)
            most = tensors if key.endswith(".block_count") else _MOST_COUNTED if _COUNTS.search(key) else None
            if most is not None and isinstance(settings[key], int) and not 0 <= settings[key] <= most:
                raise _DamagedError(f"{key} is {settings[key]}, and at most {most} makes sense")
        alignment = settings.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise _DamagedError(
                f"general.alignment is {alignment!r:.40}, which is no power of two from 8 to {_MOST_ALIGNMENT}"
            )
        table: dict[str, tuple[int, int]] = {}
        elements = 0
        for _ in range(tensors):
            name = self.text(_LONGEST_NAME, "tensor name")
            if name in table:
                raise _DamagedError(f"the tensor {name!r:.80} occurs twice")
            count, size, offset = self.tensor(name)
            if offset % alignment:
                raise _DamagedError(f"the tensor {name!r:.80} begins at {offset}, which is no multiple of {alignment}")
            table[name] = (offset, size)
            elements += count
        self.check_places(table, -(-self.place // alignment) * alignment)
        return GGUFHeader(settings=settings, weights=WeightFacts(tensors=tensors, elements=elements))

    def check_places(self, table: dict[str, tuple[int, int]], start: int) -> None:
        """Every tensor lies in the file, and no two of them in the same place."""
        end, before = 0, ""
        for name, (offset, size) in sorted(table.items(), key=lambda entry: entry[1]):
            if start + offset + size > len(self.data):
                raise _DamagedError(f"the tensor {name!r:.80} lies beyond the end of the file; download it again")
            if offset < end:
                raise _DamagedError(f"the tensors {before!r:.80} and {name!r:.80} overlap")
            end, before = offset + size, name

    def tensor(self, name: str) -> tuple[int, int, int]:
        """Elements, bytes, and offset of the next tensor of the table."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        rank = self.number("I")
        if rank > _MOST_DIMENSIONS:
            raise _DamagedError(f"the tensor {name!r:.80} has {rank} dimensions")
        shape = [self.number("Q") for _ in range(rank)]
        kind, offset = self.number("I"), self.number("Q")
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise _DamagedError(f"the tensor {name!r:.80} is of the unknown type {kind}") from None
        if shape and shape[0] % block:
            raise _DamagedError(f"the tensor {name!r:.80} has rows of {shape[0]}, which is no multiple of {block}")
        count = prod(shape)
        return count, count // block * size, offset

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(len(self.data), f"value of {key!r:.80}")
        if kind != _ARRAY:
            return self.number(_scalar(kind, key))
        kind, length = self.number("I"), self.number("Q")
        if kind == _STRING:
            if length > (len(self.data) - self.place) // 8:
                raise _DamagedError(f"the array {key!r:.80} claims {length} texts, which do not fit in the file")
            for _ in range(length):
                self.skip(self.number("Q"))
        else:
            # Arrays of arrays exist in no model, and the readers walk them without a limit.
            self.skip(length * struct.calcsize("<" + _scalar(kind, key)))
        return length

    def text(self, most: int, what: str) -> str:
        length = self.number("Q")
        if length > most:
            raise _DamagedError(f"a {what} claims {length} bytes")
        start = self.place
        self.skip(length)
        return self.data[start : self.place].decode("utf-8")

    def number(self, form: str) -> Any:
        size = struct.calcsize("<" + form)
        start = self.place
        self.skip(size)
        (value,) = struct.unpack("<" + form, self.data[start : self.place])
        return value

    def skip(self, length: int) -> None:
        if length > len(self.data) - self.place:
            raise _DamagedError("it ends in the middle of its header; download it again")
        self.place += length


def _scalar(kind: int, key: str) -> str:
    if kind not in _SCALARS:
        raise _DamagedError(f"the value of {key!r:.80} is of the unknown type {kind}")
    return _SCALARS[kind]
