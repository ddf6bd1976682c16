"""Choose the decoder of a file by its content: libsndfile for PCM, FLAC and SPHERE, FFmpeg for everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources import containers
from codecssl.tokenize.sources.libsndfile import EXACT, PcmFile, size_of
from codecssl.tokenize.sources.open_audio import FileSlice

DECODING = 2
"""Version of the rules below, written to plan.json. Version 1 has no entry and decoded all files with libsndfile."""

MAGICS = (b"RIFF", b"RIFX", b"RF64", b"riff", b"FORM", b"caff", b".snd", b"dns.", b"NIST", b"fLaC", b"Crea")
"""Magic bytes of files that libsndfile opens first: WAV, W64, AIFF, CAF, AU, SPHERE, FLAC, VOC."""
PCM_TAGS = (1, 3, 6, 7)
"""WAV format tags of PCM, float, A-law and mu-law."""


class AudioDecoder(Protocol):
    """An open audio file, read from its start or from a later frame to its end."""

    samplerate: int
    channels: int
    length: int | None
    """Number of frames from a reliable header; None if only decoding determines it."""

    def decode(self, frames: int) -> NDArray[np.float32]:
        """Return the next frames [n, C], n <= frames; [0, C] at the end. Raises UserError for damage or truncation."""

    def go_to(self, frame: int, block: int) -> None:
        """Move from the start to `frame`. Call it before decoding."""


@contextmanager
def opened(source: Path | BinaryIO) -> Iterator[AudioDecoder]:
    """Open `source`, a path or a seekable binary file, at its first frame. Raises UserError."""
    with ExitStack() as stack:
        if isinstance(source, Path):
            if not source.is_file():
                raise UserError("cannot read: no such file" if not source.exists() else "cannot read: not a file")
            if source.suffix.lower() == ".raw":
                raise UserError("cannot decode: .raw files have no header to tell their rate; make it a .wav")
            source = stack.enter_context(source.open("rb"))
        if size_of(source) == 0:
            raise UserError("cannot decode: the file is empty")
        decoder: Any = _decoder(source)
        stack.callback(decoder.close)
        yield decoder


def _decoder(source: BinaryIO) -> AudioDecoder:
    size = size_of(source)
    magic = containers.head(source, 12, containers.after_id3(source))
    if not magic.startswith(MAGICS):
        return _ffmpeg_or_libsndfile(source)
    if riff := containers.read_riff(source, size):
        if riff.codec not in PCM_TAGS:
            return _ffmpeg_or_libsndfile(source)
        if riff.length is not None:
            return PcmFile(FileSlice(source, "", riff.data_at, riff.length * riff.frame_bytes), raw=riff)  # type: ignore[arg-type]
        if (wave := Pcm16.of(source, riff)) is not None:
            return wave
    elif magic[:4] == b"fLaC":
        promised, last = containers.flac_total(source, size)
        if promised and last > promised:
            return _ffmpeg(source)  # libsndfile stops at the declared length
    try:
        file = PcmFile(source)
    except UserError:
        if magic[:4] == b"NIST":  # compressed by shorten
            return _ffmpeg(source)
        raise
    if file.subtype in EXACT:
        return _Flac(file, source) if magic[:4] == b"fLaC" and file.length is not None else file
    file.close()
    return _ffmpeg_or_libsndfile(source)


class Pcm16:
    """Decoder of whole WAV files of 16-bit PCM, the most common kind. libsndfile takes twice as long to open one."""

    def __init__(self, source: BinaryIO, riff: containers.Riff) -> None:
        self.source, self.samplerate, self.channels = source, riff.rate, riff.channels
        self.frame_bytes, self.begin = riff.frame_bytes, riff.data_at
        self.length: int | None = riff.declared // riff.frame_bytes
        self.at = 0

    @classmethod
    def of(cls, source: BinaryIO, riff: containers.Riff) -> Pcm16 | None:
        """Return the decoder; None for other sample formats and for a data chunk that is empty or not all there."""
        plain = riff.codec == 1 and riff.bits == 16 and 1 <= riff.channels <= 2
        plain = plain and riff.frame_bytes == 2 * riff.channels and riff.declared % riff.frame_bytes == 0
        return cls(source, riff) if plain and riff.rate and 0 < riff.declared <= riff.there else None

    def decode(self, frames: int) -> NDArray[np.float32]:
        count = min(frames, (self.length or 0) - self.at)
        data = containers.head(self.source, count * self.frame_bytes, self.begin + self.at * self.frame_bytes)
        self.at += count
        return np.frombuffer(data, "<i2").reshape(-1, self.channels) * np.float32(2**-15)

    def go_to(self, frame: int, block: int) -> None:
        self.at = frame

    def close(self) -> None:
        """The caller closes the file."""


def _ffmpeg(source: BinaryIO) -> AudioDecoder:
    from codecssl.tokenize.sources.ffmpeg import FfmpegFile  # PyAV costs 50 ms, and PCM does not need it

    return FfmpegFile(source)


def _ffmpeg_or_libsndfile(source: BinaryIO) -> AudioDecoder:
    """Open with FFmpeg, or with libsndfile for formats that only it supports."""
    try:
        return _ffmpeg(source)
    except UserError as error:
        if not str(error).startswith("cannot decode"):
            raise
        try:
            return PcmFile(source)
        except UserError:
            raise error from None


class _Flac:
    """FLAC decoder that uses libsndfile, and FFmpeg for the rest of the files at which libsndfile fails.

    The reader compares the number of frames with the header, since FFmpeg drops damaged frames.
    """

    def __init__(self, file: PcmFile, source: BinaryIO) -> None:
        self.file: Any = file
        self.source, self.at, self.second = source, 0, False
        self.samplerate, self.channels, self.length = file.samplerate, file.channels, file.length

    def decode(self, frames: int) -> NDArray[np.float32]:
        try:
            block: NDArray[np.float32] = self.file.decode(frames)
        except UserError as error:
            if self.second:
                raise
            self.second = True
            self.file.close()
            try:
                self.file = _ffmpeg(self.source)
            except UserError:
                raise error from None
            if (self.file.samplerate, self.file.channels) != (self.samplerate, self.channels):
                raise error
            if self.at:
                self.file.go_to(self.at, 1 << 17)
            block = self.file.decode(frames)
        self.at += len(block)
        return block

    def go_to(self, frame: int, block: int) -> None:
        self.file.go_to(frame, block)
        self.at = frame

    def close(self) -> None:
        self.file.close()
