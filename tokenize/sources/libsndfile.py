"""Decode PCM, FLAC and SPHERE with libsndfile, sequentially and from any binary file, and detect truncation."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
from numpy.typing import NDArray

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources.containers import SLACK_BYTES, UNKNOWN_BYTES, Riff

UNKNOWN_FRAMES = 1 << 62
"""libsndfile reports a length above this for a FLAC file without a length in its header."""

SHORT = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
"""libsndfile's log entry for a chunk that declares more bytes than follow."""

NIST_SAMPLES = re.compile(rb"\nsample_count -i (\d+)")

EXACT = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
"""Encodings for which libsndfile's frame count is correct and its seeks are exact, as for FLAC."""

RAW = {(1, 8): "PCM_U8", (1, 16): "PCM_16", (1, 24): "PCM_24", (1, 32): "PCM_32", (3, 32): "FLOAT", (3, 64): "DOUBLE",
       (6, 8): "ALAW", (7, 8): "ULAW"}  # fmt: skip
"""libsndfile's subtype of a WAV file by its format tag and bits."""

WORDS = {
    "File does not exist": "no audio found in it",
    "SF_INFO struct incomplete": "its header gives no possible sample rate, channels or length",
}
"""Clear replacements for wrong or unclear messages of libsndfile."""


class PcmFile(soundfile.SoundFile):
    """An audio file, decoded from its start or from a later frame.

    soundfile seeks to its current position after each block, which fails at the end of a FLAC file of unknown length.
    This class reads sequentially.
    """

    length: int | None
    """Number of frames declared by the header, even if truncated; None if unknown."""

    def __init__(self, source: Path | BinaryIO, raw: Riff | None = None) -> None:
        """Open a file. `raw` is the sample format of a file without a header, whose size gives the length."""
        try:
            if raw is not None:
                kind = RAW.get((raw.codec, raw.bits), "PCM_16")
                form = {"format": "RAW", "subtype": kind, "endian": "LITTLE"}
                super().__init__(Virtual(source), samplerate=raw.rate, channels=raw.channels, **form)
            else:
                super().__init__(source if isinstance(source, Path) else Virtual(source))
        except soundfile.LibsndfileError as error:
            raise UserError(f"cannot decode: {reason(source, error)}") from error
        self.source = source
        self.length = frames_of(self, source)

    def seekable(self) -> bool:
        return False

    def decode(self, frames: int) -> NDArray[np.float32]:
        """Return the next frames [n, C], n <= `frames`; [0, C] at the end. Raises UserError for damaged files."""
        try:
            block: NDArray[np.float32] = self.read(frames, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise UserError(f"cannot decode: {reason(self.source, error)}") from error
        return block

    def go_to(self, frame: int, block: int) -> None:
        """Move from the start to `frame` by seeking if possible, else by reading `block` frames at a time."""
        if not super().seekable():
            while frame > 0 and (passed := len(self.decode(min(block, frame)))):
                frame -= passed
            return
        try:
            self.seek(frame)
        except soundfile.LibsndfileError as error:
            raise UserError(f"cannot decode: {reason(self.source, error)}") from error


class Virtual:
    """Binary file for libsndfile's callbacks, which seek to before the start if a header is damaged."""

    def __init__(self, file: Any) -> None:
        self.file, self.read, self.readinto, self.tell = file, file.read, file.readinto, file.tell
        file.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return int(self.file.seek(offset, whence))
        except (OSError, ValueError):
            return int(self.file.tell())


def frames_of(file: PcmFile, source: Path | BinaryIO) -> int | None:
    """Return the number of frames declared by the header, even if truncated; None if unknown."""
    if file.frames > UNKNOWN_FRAMES:
        return None
    if file.format == "NIST" and (count := NIST_SAMPLES.search(_head(source))):
        return int(count[1])
    if found := SHORT.search(file.extra_info):
        promised, there = map(int, found.groups())
        if there + SLACK_BYTES < promised < UNKNOWN_BYTES:
            return round(file.frames * promised / there) if there else file.frames + 1
    return int(file.frames)


def _head(source: Path | BinaryIO) -> bytes:
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(1024)
    place = source.tell()
    source.seek(0)
    head = source.read(1024)
    source.seek(place)
    return head


def size_of(source: Path | BinaryIO) -> int:
    """Return the size of a file in bytes. Leaves a binary file at its end."""
    return source.stat().st_size if isinstance(source, Path) else source.seek(0, os.SEEK_END)


def reason(source: Path | BinaryIO, error: soundfile.LibsndfileError) -> str:
    """Return the reason why `source` could not be decoded: libsndfile's message or a clearer one."""
    if size_of(source) == 0:
        return "the file is empty"
    text = str(error).rsplit(": ", 1)[-1].strip()
    return next((clearer for start, clearer in WORDS.items() if text.startswith(start)), text)
