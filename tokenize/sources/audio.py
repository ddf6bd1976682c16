"""Encoded audio in, float32 blocks at the codec's rate out, in bounded memory.

soundfile decodes (wav, flac, ogg, opus, mp3, aiff, ...) without ffmpeg. soxr (HQ) resamples as one stream over the
whole file: its output is bit for bit that of resampling the file at once, wherever the blocks are cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources.libsndfile import SequentialFile, frames_of, opened, reason

BLOCK_FRAMES = 1 << 17

MP3_SLACK = 2 * 1152
"""Samples: an MP3's header counts the encoder's padding, so that whole files end up to two MP3 frames early."""

EXTENSIONS = (
    ".wav",
    ".flac",
    ".ogg",
    ".oga",
    ".opus",
    ".mp3",
    ".aif",
    ".aiff",
    ".aifc",
    ".au",
    ".snd",
    ".sph",
    ".w64",
    ".caf",
)


class AudioReader:
    """One file, or the part of it between two times, as float32 blocks at `sample_rate`.

    `source` is a path or a seekable binary file, read from its first byte. With `channels` 1 blocks are [n], the mean
    of the file's channels; with 2 they are [2, n], one channel doubled, more than two refused. After iterating,
    `source_samples` is what was decoded, per channel at the file's own rate.
    """

    def __init__(
        self,
        source: Path | BinaryIO,
        sample_rate: int,
        start_seconds: float | None = None,
        stop_seconds: float | None = None,
        channels: int = 1,
    ) -> None:
        if channels not in (1, 2):
            raise ValueError(f"channels {channels}: 1 or 2")
        self.source, self.sample_rate, self.channels = source, sample_rate, channels
        self.start_seconds, self.stop_seconds = start_seconds or 0.0, stop_seconds
        self.source_rate = 0
        self.source_samples = 0

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield blocks of any length. Raises UserError for what cannot be read whole."""
        self.source_samples = 0
        try:
            with opened(self.source) as file:
                yield from self._resampled(file)
        except soundfile.LibsndfileError as error:
            raise UserError(f"cannot decode: {reason(self.source, error)}") from error
        if self.source_samples == 0:
            raise UserError("no samples: the file or segment holds no audio")

    def _resampled(self, file: SequentialFile) -> Iterator[NDArray[np.float32]]:
        self.source_rate = file.samplerate
        kept = min(self.channels, file.channels)
        if self.channels == 2 and file.channels > 2:
            raise UserError(f"{file.channels} channels: this codec takes one or two; mix the file down first")
        if file.samplerate == self.sample_rate:
            for block in self._frames(file):
                yield self._shaped(block)
            return
        stream = soxr.ResampleStream(file.samplerate, self.sample_rate, kept, dtype="float32", quality="HQ")
        for block in self._frames(file):
            yield self._shaped(stream.resample_chunk(block))
        end = np.zeros(0 if kept == 1 else (0, kept), np.float32)
        yield self._shaped(stream.resample_chunk(end, last=True))

    def _shaped(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n] or [n, 2] -> [n], or [2, n] where two channels are wanted."""
        if self.channels == 1:
            return block
        return np.stack([block, block]) if block.ndim == 1 else np.ascontiguousarray(block.T)

    def _frames(self, file: SequentialFile) -> Iterator[NDArray[np.float32]]:
        """Blocks [n], or [n, 2] where two channels are kept."""
        length = frames_of(file, self.source)
        begin, wanted = self._span(file.samplerate, length)
        if begin:
            file.go_to(begin, BLOCK_FRAMES)
        slack = MP3_SLACK if file.format == "MP3" else 0
        while wanted is None or self.source_samples < wanted:
            left = BLOCK_FRAMES if wanted is None else wanted - self.source_samples
            block = file.read(min(BLOCK_FRAMES, left), dtype="float32", always_2d=True)
            if not len(block):
                if wanted is None or left <= slack:
                    return
                if length is None:
                    self._span(file.samplerate, begin + self.source_samples)  # now known: the segment ends after it
                raise UserError(f"truncated: the header promises {wanted} samples, {self.source_samples} are there")
            if not np.isfinite(block).all():
                raise UserError(f"NaN or infinite samples after {self.source_samples / file.samplerate:.3f} s")
            self.source_samples += len(block)
            if block.shape[1] == 1:
                yield block[:, 0]
            else:
                yield block if self.channels == 2 else block.mean(axis=1)

    def _span(self, rate: int, length: int | None) -> tuple[int, int | None]:
        """(first frame, number of frames) of the file or segment; None where it goes to an unknown end."""
        begin = round(self.start_seconds * rate)
        end = length if self.stop_seconds is None else round(self.stop_seconds * rate)
        if length is not None and end is not None and end > length:
            raise UserError(f"segment ends at {self.stop_seconds} s, the file at {length / rate} s")
        if length is not None and begin and begin >= length:
            raise UserError(f"segment starts at {self.start_seconds} s, the file ends before")
        return begin, None if end is None else end - begin


def read_wave(source: Path | BinaryIO, sample_rate: int, channels: int = 1) -> NDArray[np.float32]:
    """A whole file as float32 at `sample_rate`: [n], or [2, n] for `channels` 2. Raises UserError naming the file."""
    try:
        return np.concatenate(list(AudioReader(source, sample_rate, channels=channels).blocks()), axis=-1)
    except UserError as error:
        name = source if isinstance(source, Path) else getattr(source, "name", "")
        raise UserError(f"{name}: {error}" if name else str(error)) from error


def sha256_of(source: Path | BinaryIO) -> str:
    """Hex sha256 of a file's bytes, from its first. Raises UserError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with _opened(source) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror}") from error
    return digest.hexdigest()


@contextmanager
def _opened(source: Path | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(source, Path):
        with source.open("rb") as file:
            yield file
    else:
        source.seek(0)
        yield source
