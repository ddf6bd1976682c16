"""Codes packed at ceil(log2 size) bits each, in little-endian bit order.

Codes form groups that begin on a byte: four codes of 10 bits in five bytes, eight of 11 bits in eleven. Code j of all
groups is one strided view of the bytes. Packing or unpacking takes one pass over it per j.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 16
CHUNK = 1 << 16
"""Codes packed at a time: they fit a core's cache. A multiple of 8, so every chunk ends on a byte."""


def packed_size(count: int, bits: int) -> int:
    """Bytes used by `count` codes of `bits` bits."""
    return (count * bits + 7) // 8


def pack(codes: NDArray[np.integer], bits: int) -> bytes:
    """Pack 1-D codes at 1 to 16 bits each. The last byte is padded with zero bits.

    Raises ValueError for a code that is negative or not below 2**bits.
    """
    if len(codes) and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    if len(codes) and int(codes.min()) < 0:
        raise ValueError(f"code {int(codes.min())}: must be 0 or more")
    return b"".join(_pack_chunk(codes[i : i + CHUNK], bits) for i in range(0, len(codes), CHUNK))


def pack_planes(planes: Sequence[NDArray[np.integer]], bits: int) -> bytes:
    """Join `pack` of each plane, in a few operations for any number of planes."""
    lengths = np.array([len(plane) for plane in planes], np.int64)
    if not lengths.sum():
        return b""
    per_group, size = _group(bits)
    groups = -(-lengths // per_group)
    codes = np.concatenate(planes)
    padded: NDArray[Any] = np.zeros(int(groups.sum()) * per_group, codes.dtype)
    begins = (np.cumsum(groups) - groups) * per_group
    moved = np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
    padded[np.arange(len(moved)) + moved] = codes
    packed = pack(padded, bits)
    unused = groups * size - (lengths * bits + 7) // 8
    if not unused.any():
        return packed
    ends = np.cumsum(groups) * size
    kept = np.ones(len(packed), bool)
    for back in range(1, int(unused.max()) + 1):
        kept[ends[unused >= back] - back] = False
    return np.frombuffer(packed, np.uint8)[kept].tobytes()


def unpack(buffer: NDArray[np.uint8], bits: int, start: int, stop: int) -> NDArray[np.uint16]:
    """Unpack codes start..stop of packed planes: [..., bytes] to [..., stop - start]. Reads only their bytes."""
    per_group, size = _group(bits)
    first, last = start // per_group, -(-stop // per_group)
    held = buffer[..., first * size : last * size]
    if start == stop:
        return np.zeros((*buffer.shape[:-1], 0), np.uint16)
    # a padded copy: the last group may be incomplete, and words are read past its end
    groups, row = last - first, (last - first) * size + 4
    window = np.zeros((*buffer.shape[:-1], row), np.uint8)
    window[..., : held.shape[-1]] = held
    rows = window.size // row
    codes = np.empty((rows, groups, per_group), np.uint16)
    word = np.dtype("<u2" if all(j * bits % 8 + bits <= 16 for j in range(per_group)) else "<u4")
    for j in range(per_group):
        byte, shift = divmod(j * bits, 8)
        words: NDArray[np.unsignedinteger] = np.ndarray((rows, groups), word, window, byte, (row, size))
        np.right_shift(words, word.type(shift), out=codes[:, :, j], casting="unsafe")
    if bits < MAX_BITS:
        codes &= np.uint16((1 << bits) - 1)
    skipped = start - first * per_group
    return codes.reshape(*buffer.shape[:-1], -1)[..., skipped : skipped + stop - start]


def _pack_chunk(codes: NDArray[np.integer], bits: int) -> bytes:
    per_group, size = _group(bits)
    groups = -(-len(codes) // per_group)
    padded = np.zeros((groups, per_group), np.uint32)
    padded.reshape(-1)[: len(codes)] = codes
    packed = np.zeros((groups, size), np.uint8)
    for j in range(per_group):
        byte, shift = divmod(j * bits, 8)
        wide = padded[:, j] << np.uint32(shift)
        for k in range((shift + bits + 7) // 8):
            packed[:, byte + k] |= (wide >> np.uint32(8 * k)).astype(np.uint8)
    return packed.tobytes()[: packed_size(len(codes), bits)]


def _group(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the shortest run of codes that ends on a byte."""
    common = gcd(bits, 8)
    return 8 // common, bits // common
