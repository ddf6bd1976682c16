"""Codes packed at ceil(log2 size) bits each, little-endian bit order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: NDArray[np.integer], bits: int) -> bytes:
    """Pack 1-D codes, each below 2**bits, bits in 1..16; the last byte is filled up with zero bits."""
    if len(codes) and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    planes = (codes.astype(np.uint16)[:, None] >> np.arange(bits, dtype=np.uint16)) & 1
    return np.packbits(planes.astype(np.uint8), bitorder="little").tobytes()


def unpack(buffer: NDArray[np.uint8], bits: int, start: int, stop: int) -> NDArray[np.uint16]:
    """Codes start..stop of a packed plane; only the bytes that hold them are touched."""
    positions = np.arange(start, stop, dtype=np.int64) * bits
    first, last = start * bits // 8, (stop * bits + 7) // 8
    window = np.zeros(last - first + 2, dtype=np.uint32)  # a code of up to 16 bits lies in three bytes
    window[:-2] = buffer[first:last]
    byte, shift = positions // 8 - first, (positions % 8).astype(np.uint32)
    words = window[byte] | window[byte + 1] << 8 | window[byte + 2] << 16
    return ((words >> shift) & np.uint32((1 << bits) - 1)).astype(np.uint16)
