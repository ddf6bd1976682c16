"""Decode PCM, FLAC and SPHERE with libsndfile: sequentially, from any binary file, with truncated files detected."""

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
"""libsndfile's length of a FLAC whose header does not tell it is above this."""

SHORT = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
"""How libsndfile logs a chunk that promises more bytes than follow."""

NIST_SAMPLES = re.compile(rb"\nsample_count -i (\d+)")

EXACT = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
"""Encodings of one sample each, and FLAC's: libsndfile's count of frames is right and its seeks are exact."""

RAW = {(1, 8): "PCM_U8", (1, 16): "PCM_16", (1, 24): "PCM_24", (1, 32): "PCM_32", (3, 32): "FLOAT", (3, 64): "DOUBLE",
       (6, 8): "ALAW", (7, 8): "ULAW"}  # fmt: skip
"""libsndfile's name of the samples of a WAV by its format tag and bits."""

WORDS = {
    "File does not exist": "no audio found in it",
    "SF_INFO struct incomplete": "its header gives no possible sample rate, channels or length",
}
"""Messages of libsndfile that are wrong or unclear, and their meaning."""


class PcmFile(soundfile.SoundFile):
    """One file, decoded from its start or from a later frame on.

    soundfile itself seeks to the place where it is after each block, which fails at the end of a FLAC of unknown
    length; this class reads sequentially.
    """

    length: int | None
    """Frames that the header promises, be they there or not; None where it does not tell."""

    def __init__(self, source: Path | BinaryIO, raw: Riff | None = None) -> None:
        """raw: the format of the samples of a file without a header; its size gives the length."""
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
        """Up to `frames` following frames [n, C]; [0, C] at the end. Raises UserError for damaged files."""
        try:
            block: NDArray[np.float32] = self.read(frames, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise UserError(f"cannot decode: {reason(self.source, error)}") from error
        return block

    def go_to(self, frame: int, block: int) -> None:
        """Go from the start to `frame`: by seeking where the format can, else by reading `block` frames at a time."""
        if not super().seekable():
            while frame > 0 and (passed := len(self.decode(min(block, frame)))):
                frame -= passed
            return
        try:
            self.seek(frame)
        except soundfile.LibsndfileError as error:
            raise UserError(f"cannot decode: {reason(self.source, error)}") from error


class Virtual:
    """A binary file for libsndfile's callbacks, which seek to before the start where a header is broken."""

    def __init__(self, file: Any) -> None:
        self.file, self.read, self.readinto, self.tell = file, file.read, file.readinto, file.tell
        file.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return int(self.file.seek(offset, whence))
        except (OSError, ValueError):
            return int(self.file.tell())


def frames_of(file: PcmFile, source: Path | BinaryIO) -> int | None:
    """The frames that the header promises, be they there or not; None where it does not tell."""
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
    """Bytes of a file; a binary file is at its end then."""
    return source.stat().st_size if isinstance(source, Path) else source.seek(0, os.SEEK_END)


def reason(source: Path | BinaryIO, error: soundfile.LibsndfileError) -> str:
    """The reason why `source` could not be decoded, in libsndfile's words or in clearer ones."""
    if size_of(source) == 0:
        return "the file is empty"
    text = str(error).rsplit(": ", 1)[-1].strip()
    return next((meant for said, meant in WORDS.items() if text.startswith(said)), text)
