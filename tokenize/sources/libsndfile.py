"""What libsndfile needs to read files of every kind truthfully: sequentially, from any binary file, torn ones told."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import soundfile

from codecssl.tokenize.common.errors import UserError

HEADER_SLACK = 1024
"""Bytes: writers that count their own headers into the data promise a little more than there is."""

UNKNOWN_BYTES = 0x7FFF0000
"""Sizes from here on are what programs write that can't know it, as into a pipe."""

UNKNOWN_FRAMES = 1 << 62
"""libsndfile's length of a FLAC whose header does not tell it is above this."""

UNRECOGNISED = 1
"""libsndfile's code for a file that is none that it knows."""

SHORT = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
"""How libsndfile logs a chunk that promises more bytes than follow."""

NIST_SAMPLES = re.compile(rb"\nsample_count -i (\d+)")

WORDS = {
    "File does not exist": "no audio found in it",
    "SF_INFO struct incomplete": "its header gives no possible sample rate, channels or length",
}
"""What libsndfile says wrongly or darkly, and what it means."""


class SequentialFile(soundfile.SoundFile):
    """Reads on and on.

    soundfile seeks to where it is after each block. That restarts the decoder, which changes an MP3's samples by a
    rounding, and fails at the end of a FLAC of unknown length.
    """

    def seekable(self) -> bool:
        return False

    def go_to(self, frame: int, block: int) -> None:
        """Go from the start to `frame`: by seeking where the format can, else by reading `block` frames at a time."""
        if super().seekable():
            self.seek(frame)
            return
        while frame > 0 and (passed := len(self.read(min(block, frame)))):
            frame -= passed


class Virtual:
    """A binary file as libsndfile's callbacks want it: broken headers make it seek to before the start."""

    def __init__(self, file: Any) -> None:
        self.file, self.read, self.readinto, self.tell = file, file.read, file.readinto, file.tell

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return int(self.file.seek(offset, whence))
        except (OSError, ValueError):
            return int(self.file.tell())


@contextmanager
def opened(source: Path | BinaryIO) -> Iterator[SequentialFile]:
    """`source`, a path or a seekable binary file, to read from its first byte. Raises UserError, LibsndfileError."""
    with ExitStack() as stack:
        if not isinstance(source, Path):
            source.seek(0)
            yield stack.enter_context(_open_binary(source, stack))
        elif not source.is_file():
            raise UserError("cannot read: no such file")
        elif source.suffix.lower() == ".raw":
            raise UserError("cannot decode: .raw files have no header to tell their rate; make it a .wav")
        else:
            yield stack.enter_context(SequentialFile(source))


def _open_binary(source: BinaryIO, stack: ExitStack) -> SequentialFile:
    try:
        return SequentialFile(Virtual(source))
    except soundfile.LibsndfileError as error:
        name = str(getattr(source, "name", ""))
        if error.code != UNRECOGNISED or not name.lower().endswith(".mp3") or size_of(source) == 0:
            raise
    # what begins with junk, libsndfile takes for an MP3 by the file's name only
    copy = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".mp3"))  # noqa: SIM115
    source.seek(0)
    shutil.copyfileobj(source, copy)
    copy.flush()
    return SequentialFile(copy.name)


def frames_of(file: SequentialFile, source: Path | BinaryIO) -> int | None:
    """The frames that the header promises, be they there or not; None where it does not tell."""
    if file.frames > UNKNOWN_FRAMES:
        return None
    if file.format == "NIST" and (count := NIST_SAMPLES.search(_head(source))):
        return int(count[1])
    if found := SHORT.search(file.extra_info):
        promised, there = map(int, found.groups())
        if there + HEADER_SLACK < promised < UNKNOWN_BYTES:
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
    """Why `source` could not be decoded: libsndfile's word, but for what it tells wrongly."""
    if size_of(source) == 0:
        return "the file is empty"
    text = str(error).rsplit(": ", 1)[-1].strip()
    return next((meant for said, meant in WORDS.items() if text.startswith(said)), text)
