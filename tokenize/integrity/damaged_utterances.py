"""Locates damaged utterances within a damaged block, as far as their own bytes show it. The crc32 covers the block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.format.bits import pack, packed_size, unpack
from codecssl.tokenize.format.entropy import SEGMENT_FRAMES, Coder
from codecssl.tokenize.format.layout import stored_bytes

Numbers = Mapping[str, NDArray[Any]]


def suspects(
    codes: NDArray[np.uint8], numbers: Numbers, card: CodecCard, coder: Coder | None
) -> Iterator[tuple[int, int, int, str]]:
    """Yield (place in the block, first byte, last byte + 1, description) of utterances that are certainly damaged.

    codes: KEY.codes. coder: of an entropy-coded shard. A flipped bit that turns a code into another valid one is
    detected only by the block's crc32.
    """
    frames = card.frames_of(numbers["samples"].astype(np.int64))
    ends = np.cumsum(stored_bytes(numbers, frames, card))
    streams = iter(numbers["stream_words"].tolist()) if coder else iter(())
    for within, (start, stop, count) in enumerate(zip([0, *ends.tolist()], ends.tolist(), frames.tolist())):
        own = codes[start:stop]
        wrong = _packed(own, count, card) if coder is None else _compressed(own, count, card, coder, streams)
        if wrong:
            yield within, start, stop, wrong


def _packed(own: NDArray[np.uint8], frames: int, card: CodecCard) -> str:
    """Detect a code too large for its codebook, or set bits in the padding."""
    offset = 0
    for k, (bits, rate, size) in enumerate(zip(card.code_bits, card.codes_per_frame, card.codebook_sizes)):
        stored = own[offset : offset + packed_size(frames * rate, bits)]
        plane = unpack(stored, bits, 0, frames * rate)
        if len(plane) and int(plane.max()) >= size:
            return f"code {int(plane.max())} in codebook {k}, which has {size} entries"
        if pack(plane, bits) != stored.tobytes():
            return f"bits set after the last code of codebook {k}"
        offset += len(stored)
    return ""


def _compressed(own: NDArray[np.uint8], frames: int, card: CodecCard, coder: Coder, streams: Iterator[int]) -> str:
    """Detect a stream that differs from its re-encoded codes. Each code sequence has exactly one stream."""
    offset, wrong = 0, ""
    for segment, first in enumerate(range(0, frames, SEGMENT_FRAMES)):
        size = 4 * next(streams)
        words = np.frombuffer(own[offset : offset + size].tobytes(), "<u4")
        offset += size
        if not _is_canonical(words, min(SEGMENT_FRAMES, frames - first), card, coder):
            wrong = wrong or f"segment {segment} cannot be decoded"
    return wrong


def _is_canonical(words: NDArray[np.uint32], frames: int, card: CodecCard, coder: Coder) -> bool:
    try:
        planes = coder.decode(words, frames, card.num_codebooks)
        return np.array_equal(coder.encode(planes), words)
    except Exception:  # the coder rejects streams that it cannot have written
        return False
