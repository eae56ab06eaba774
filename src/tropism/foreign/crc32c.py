"""The checksum CRC-32C (Castagnoli), with numpy alone, at some 100 MB a second.

A checksum is a linear map over bits. So a piece of data is cut into lanes of equal length whose checksums are computed
side by side, and neighbours are joined pair by pair: first that of the front lane is carried over the zeros that stand
for the back lane, then the back lane's is added.

Polynomial and test vectors: RFC 3720, appendix B.4.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78
"""Of Castagnoli, lowest bit first."""
_PIECE = 2**23
"""Bytes at a time: its lanes fit into a processor's cache."""
_SHORT = 64
"""Bytes that are taken one by one."""
_BITS = np.arange(32, dtype=np.uint32)

Words = NDArray[np.uint32]


def crc32c(data: bytes | NDArray[np.uint8]) -> int:
    """The checksum of ``data``, from 0 to 2**32 - 1."""
    values = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    register = 0xFFFFFFFF
    for start in range(0, len(values), _PIECE):
        register = _advance(register, values[start : start + _PIECE])
    return register ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | NDArray[np.uint8]) -> int:
    """The checksum as LevelDB and TensorFlow store it: turned by 15 bits, with a constant added."""
    checksum = crc32c(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _advance(register: int, piece: NDArray[np.uint8]) -> int:
    """The register after ``piece``."""
    if len(piece) < _SHORT:
        table = _byte_table()
        for byte in piece.tolist():
            register = int(table[(register ^ byte) & 0xFF]) ^ register >> 8
        return register
    log_length = (len(piece).bit_length() + 1) // 2  # about as many lanes as a lane has bytes
    lanes = -(-len(piece) >> log_length)
    # From an empty register zeros in front change nothing, so lanes are filled up there to a power of two.
    lanes = 1 << (lanes - 1).bit_length()
    filled = np.zeros(lanes << log_length, np.uint8)
    start = len(filled) - len(piece)
    filled[start:] = piece
    # A register that is not empty is the same as one that is, with its bits turned in the first four bytes.
    filled[start : start + 4] ^= np.frombuffer(register.to_bytes(4, "little"), np.uint8)
    columns = np.ascontiguousarray(filled.view("<u2").reshape(lanes, -1).T)
    table, registers = _word_table(), np.zeros(lanes, np.uint32)
    for column in columns:
        registers = table[(registers ^ column) & 0xFFFF] ^ registers >> np.uint32(16)
    while len(registers) > 1:
        registers = _apply(_over_zeros(log_length), registers[0::2]) ^ registers[1::2]
        log_length += 1
    return int(registers[0])


def _apply(matrix: Words, registers: Words) -> Words:
    """Each of ``registers`` times a matrix over bits, whose rows are what single bits become."""
    chosen = np.where(registers[..., None] >> _BITS & 1, matrix, np.uint32(0))
    product: Words = np.bitwise_xor.reduce(chosen, axis=-1)
    return product


@cache
def _over_zeros(log_length: int) -> Words:
    """The matrix that carries a register over 2**log_length zeros."""
    if log_length == 0:
        return _over_byte(np.uint32(1) << _BITS)
    half = _over_zeros(log_length - 1)
    return _apply(half, half)


@cache
def _byte_table() -> Words:
    """[256] what a register holding one byte becomes over eight zero bits."""
    table: Words = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.bitwise_xor(table >> np.uint32(1), (table & np.uint32(1)) * np.uint32(_POLYNOMIAL))
    return table


@cache
def _word_table() -> Words:
    """[65536] the same for two bytes over sixteen zero bits."""
    return _over_byte(_over_byte(np.arange(2**16, dtype=np.uint32)))


def _over_byte(registers: Words) -> Words:
    """Each of ``registers`` over eight zero bits."""
    after: Words = _byte_table()[registers & 0xFF] ^ registers >> np.uint32(8)
    return after
