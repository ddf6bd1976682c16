"""Parse headers of audio files, only to detect truncation and to choose the decoder.

Decoders return what they find in a truncated file. The container shows whether data is missing: RIFF chunks
(Microsoft, Multimedia Programming Interface 1.0), Ogg pages (RFC 3533), MPEG audio frames (ISO 11172-3, 2.4.1.3) and
the Xing count, EBML sizes (RFC 8794), FLAC frames (RFC 9639). Lengths are never taken from these headers.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from codecssl.tokenize.common.errors import UserError

SLACK_BYTES = 1024
"""Tolerated difference of a declared size, since some writers count their own headers."""
UNKNOWN_BYTES = 0x7FFF0000
"""Declared sizes from this value mean "unknown", as written into a pipe."""
TAIL_BYTES = 1 << 16
"""Bytes at the end of a FLAC file in which its last frame is searched."""


def head(source: BinaryIO, size: int, offset: int = 0) -> bytes:
    """Read `size` bytes at `offset`."""
    source.seek(offset)
    return source.read(size)


def after_id3(source: BinaryIO) -> int:
    """Return the offset after the leading ID3v2 tags of a file."""
    at = 0
    while (tag := head(source, 10, at))[:3] == b"ID3" and len(tag) == 10:
        a, b, c, d = (byte & 0x7F for byte in tag[6:10])
        at += 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if tag[5] & 0x10 else 0)
    return at


# ---------------------------------------------------------------- RIFF


@dataclass(frozen=True, kw_only=True)
class Riff:
    """Format and data chunks of a WAV file."""

    codec: int
    """Format tag, or the tag of the sub-format of an extensible format."""
    channels: int
    rate: int
    frame_bytes: int
    bits: int
    data_at: int
    """Offset of the first data byte."""
    declared: int
    """Data size in bytes according to the chunk's header."""
    there: int
    """Bytes from the start of the data to the end of the file."""
    tail: bytes
    """Up to 8 bytes after the declared data."""

    @property
    def length(self) -> int | None:
        """Frames of data whose declared size is 0 or modulo 4 GiB; None if the header is correct."""
        if not self.frame_bytes or not self.there:
            return None
        if self.declared == 0 and not self._is_chunk(self.tail):
            return self.there // self.frame_bytes
        if self.there >= 1 << 32 and self.declared < UNKNOWN_BYTES * 2 and not self._is_chunk(self.tail):
            wraps = (self.there - self.declared) >> 32
            return (self.declared + (wraps << 32)) // self.frame_bytes
        return None

    def _is_chunk(self, tail: bytes) -> bool:
        size = int.from_bytes(tail[4:8], "little")
        return len(tail) == 8 and re.fullmatch(rb"[A-Za-z0-9_ ]{4}", tail[:4]) is not None and size <= self.there


def read_riff(source: BinaryIO, size: int) -> Riff | None:
    """Read the chunks of a little-endian RIFF WAVE file. Returns None for other files or if a chunk is missing."""
    begin = head(source, 12)
    if begin[:4] != b"RIFF" or begin[8:12] != b"WAVE":
        return None
    at, form = 12, b""
    while at + 8 <= size:
        name, count = (chunk := head(source, 8, at))[:4], int.from_bytes(chunk[4:8], "little")
        if name == b"fmt ":
            form = source.read(min(count, 40))
        elif name == b"data":
            if len(form) < 14:
                return None
            codec = int.from_bytes(form[24:26] if form[:2] == b"\xfe\xff" and len(form) >= 26 else form[:2], "little")
            tail = head(source, 8, at + 8 + count + count % 2)
            return Riff(
                codec=codec,
                channels=int.from_bytes(form[2:4], "little"),
                rate=int.from_bytes(form[4:8], "little"),
                frame_bytes=int.from_bytes(form[12:14], "little"),
                bits=int.from_bytes(form[14:16], "little"),
                data_at=at + 8,
                declared=count,
                there=size - at - 8,
                tail=tail,
            )
        at += 8 + count + count % 2
    return None


def check_riff(source: BinaryIO, size: int) -> None:
    """Raise UserError for a truncated WAV file."""
    riff = read_riff(source, size)
    if riff and riff.there + SLACK_BYTES < riff.declared < UNKNOWN_BYTES:
        raise UserError(f"truncated: the header promises {riff.declared} bytes of data, {riff.there} are there")


# ---------------------------------------------------------------- Ogg

REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def is_ogg(source: BinaryIO) -> bool:
    return head(source, 4, after_id3(source)) == b"OggS"


def _pages(source: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of each page. Data after the last page is yielded as an invalid page."""
    at = after_id3(source)
    while begin := head(source, 27, at):
        table = source.read(begin[26]) if len(begin) == 27 and begin[:4] == b"OggS" else b""
        page = begin + table + source.read(sum(table))
        yield at, page
        if not table and begin[:4] != b"OggS":
            return
        at += len(page)


def check_ogg(source: BinaryIO, size: int) -> None:
    """Raise UserError unless every page matches its checksum and the last page of each stream is marked as such."""
    open_streams: set[bytes] = set()
    for at, page in _pages(source):
        if page[:4] != b"OggS":
            if page.strip(b"\0") and not page.startswith(b"TAG"):
                raise UserError(f"damaged: no Ogg page at byte {at}")
            break
        if len(page) < 27 or len(page) < 27 + page[26] or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            raise UserError(f"truncated: its last Ogg page ends {size - at} bytes after it begins")
        reflected = zlib.crc32((page[:22] + bytes(4) + page[26:]).translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        if int(f"{reflected:032b}"[::-1], 2) != int.from_bytes(page[22:26], "little"):
            raise UserError(f"damaged: the checksum of the Ogg page at byte {at} is wrong")
        (open_streams.discard if page[5] & 4 else open_streams.add)(page[14:18])
    if open_streams:
        raise UserError("truncated: its last Ogg page is not marked as the last of its stream")


def ogg_links(source: BinaryIO) -> int:
    """Count the chained groups of streams."""
    links, before = 0, False
    for _, page in _pages(source):
        begins = page[:4] == b"OggS" and bool(page[5] & 2)
        links, before = links + (begins and not before), begins
    return links


# ---------------------------------------------------------------- Matroska


def check_matroska(source: BinaryIO, size: int) -> None:
    """Raise UserError for a truncated Matroska or WebM file, which ends before its segment."""
    if head(source, 4) != b"\x1aE\xdf\xa3":
        return
    _, at = _ebml_size(source, 4)
    count, begin = _ebml_size(source, 4)
    at = begin + (count or 0)
    if head(source, 4, at) == b"\x18S\x80g":
        count, begin = _ebml_size(source, at + 4)
        if count is not None and begin + count > size:
            raise UserError(f"truncated: the header promises {begin + count} bytes, {size} are there")


def _ebml_size(source: BinaryIO, at: int) -> tuple[int | None, int]:
    """Return an EBML size (None if unknown) and the offset after it."""
    first = int.from_bytes(head(source, 1, at), "big")
    length = 9 - first.bit_length()
    value = int.from_bytes(bytes([first]) + source.read(length - 1), "big") & ((1 << 7 * length) - 1)
    return (None if value == (1 << 7 * length) - 1 else value), at + length


# ---------------------------------------------------------------- MPEG audio

HIGH = {
    3: (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
LOW = {
    3: (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""Bit rates in kbit/s of MPEG-1 and of MPEG-2 and 2.5, by the layer's bits (3: layer I) and the header's index."""


def mpeg_frame_bytes(frame: bytes) -> int | None:
    """Return the bytes of an MPEG audio frame from its header; None for an invalid header or a free bit rate."""
    word = int.from_bytes(frame[:4], "big")
    version, layer, rate, index = word >> 19 & 3, word >> 17 & 3, word >> 10 & 3, word >> 12 & 15
    if len(frame) < 4 or word >> 21 != 0x7FF or version == 1 or layer == 0 or rate == 3 or index in (0, 15):
        return None
    hertz = (44_100, 48_000, 32_000)[rate] // {3: 1, 2: 2, 0: 4}[version]
    bits = 1000 * (HIGH[layer] if version == 3 else LOW[3 if layer == 3 else 2])[index]
    padding = word >> 9 & 1
    if layer == 3:
        return (12 * bits // hertz + padding) * 4
    return (144 if version == 3 or layer == 2 else 72) * bits // hertz + padding


def xing_frames(source: BinaryIO) -> int:
    """Return the number of frames declared by an MP3's Xing, Info or VBRI header; 0 without such a header."""
    first = head(source, 4096, after_id3(source))
    start = next(
        (m.start() for m in re.finditer(rb"\xff[\xe0-\xff]", first) if mpeg_frame_bytes(first[m.start() :])), 0
    )
    first = first[start : start + 400]
    for name in (b"Xing", b"Info"):
        at = first.find(name, 0, 60)
        if at >= 0 and first[at + 7] & 1:
            return int.from_bytes(first[at + 8 : at + 12], "big")
    return int.from_bytes(first[50:54], "big") if first[36:40] == b"VBRI" else 0


# ---------------------------------------------------------------- the end of a decoded file


def check_count(promised: int, packets: int) -> None:
    """Raise UserError if a completely decoded file has fewer frames than its header declares."""
    if packets + 1 < promised:
        raise UserError(f"truncated: the header promises {promised} frames, {packets} are there")


def check_last(demuxer: str, last: bytes) -> None:
    """Raise UserError if the last packet of an MP3 or ADTS file is shorter than its header declares."""
    size = mpeg_frame_bytes(last) if demuxer == "mp3" else None
    if demuxer == "aac" and last[:1] == b"\xff":
        size = (int.from_bytes(last[3:6], "big") >> 5) & 0x1FFF
    if size and size > len(last):
        raise UserError(f"truncated: its last frame has {len(last)} of {size} bytes")


# ---------------------------------------------------------------- FLAC


def flac_total(source: BinaryIO, size: int) -> tuple[int, int]:
    """Return the samples declared by STREAMINFO and the samples up to the end of the last frame; 0 if unknown."""
    at = after_id3(source)
    info = head(source, 42, at)
    if info[:4] != b"fLaC" or len(info) < 42:
        return 0, 0
    promised = int.from_bytes(info[21:26], "big") & ((1 << 36) - 1)
    fixed = int.from_bytes(info[10:12], "big")
    begin = max(at + 42, size - TAIL_BYTES)
    tail, last = head(source, size - begin, begin), 0
    for match in re.finditer(rb"\xff[\xf8\xf9]", tail):
        last = max(last, _flac_frame_end(tail[match.start() : match.start() + 17], fixed))
    return promised, last


def _flac_frame_end(frame: bytes, fixed: int) -> int:
    """Return the number of samples up to the end of a frame; 0 for bytes that are not a frame header by CRC-8."""
    if len(frame) < 6 or frame[2] >> 4 == 0 or frame[2] & 15 == 15 or frame[3] & 1 or frame[3] >> 4 > 10:
        return 0
    more = 8 - (frame[4] ^ 0xFF).bit_length()  # bytes of the coded number, as in UTF-8
    more = 1 if more == 0 else more
    if more > 7 or (more == 1 and frame[4] & 0x80):
        return 0
    number = frame[4] & (0x7F if more == 1 else 0x7F >> more)
    for byte in frame[5 : 4 + more]:
        number = number << 6 | byte & 0x3F
    at, kind = 4 + more, frame[2] >> 4
    if kind in (6, 7):
        block = int.from_bytes(frame[at : at + kind - 5], "big") + 1
        at += kind - 5
    else:
        block = 192 if kind == 1 else 576 << (kind - 2) if kind < 6 else 256 << (kind - 8)
    at += {12: 1, 13: 2, 14: 2}.get(frame[2] & 15, 0)
    if at >= len(frame) or _crc8(frame[:at]) != frame[at]:
        return 0
    return number + block if frame[1] & 1 else number * fixed + block


def _crc8(content: bytes) -> int:
    value = 0
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ 0x07) & 0xFF if value & 0x80 else value << 1
    return value
