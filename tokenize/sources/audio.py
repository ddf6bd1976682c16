"""Read encoded audio as float32 blocks at the codec's rate, in bounded memory.

`decoder` chooses the decoder. soxr (HQ) resamples the whole file as one stream. Its output is bit-exact with
resampling the file at once, whatever the block boundaries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soxr
from numpy.typing import NDArray

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources.decoder import AudioDecoder, opened

BLOCK_FRAMES = 1 << 17

END_TOLERANCE = 0.5
"""Seconds by which a segment may exceed its file. Such a segment is cut and counted. Lhotse allows the same."""

LEAST_RATE, MOST_RATE = 1000, 1_000_000
"""Bounds of a file's sample rate in Hz. At 1 Hz, a file of 80 kB would be resampled to gigabytes."""

MOST_FRAMES = 1 << 40
"""Bound of positions in a file, above the length of any (66 days at 192 kHz) and small enough for FFmpeg's seek."""

SILENCED = 1e-3
"""Power ratio of the downmix to the mean of the channels, below which the channels count as cancelling."""

# fmt: off
EXTENSIONS = (
    ".wav", ".wave", ".bwf", ".rf64", ".w64", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".voc", ".flac", ".sph",
    ".nist", ".wv1", ".wv2", ".mp3", ".mp2", ".mp1", ".mpga", ".ogg", ".oga", ".opus", ".spx", ".m4a", ".m4b", ".aac",
    ".webm", ".weba", ".mka", ".wma", ".wv", ".ape", ".tta", ".mpc", ".amr", ".ac3", ".eac3", ".dts", ".dsf", ".3gp",
)
"""Suffixes of audio files, which are read from a folder."""

OTHER_MEDIA = (
    ".mp4", ".m4v", ".mov", ".mkv", ".avi", ".flv", ".ts", ".mpg", ".mpeg", ".3g2", ".wmv", ".ogv", ".raw", ".pcm",
    ".shn", ".ra", ".mid",
)
"""Suffixes of files that may hold audio. They are counted but not read from a folder."""
# fmt: on


class AudioReader:
    """Read a file, or the part between two times, as float32 blocks at `sample_rate`.

    `source` is a path or a seekable binary file, read from its first byte. With `channels` 1, blocks are [n], the mean
    of the file's channels. With `channels` 2, blocks are [2, n]: a single channel is duplicated, more than two are
    refused. `channel` selects one channel of the file, counted from 0, instead. `duration` is the length from the start
    if there is no `stop_seconds`; if the file ends within END_TOLERANCE after it, the rest is included.
    After iteration, `source_samples` is the number of decoded samples per channel at the file's own rate. `notes` may
    contain "clipped" (the segment exceeded the file) and "cancelled" (the mean of the channels is almost silent).
    """

    def __init__(
        self,
        source: Path | BinaryIO,
        sample_rate: int,
        start_seconds: float | None = None,
        stop_seconds: float | None = None,
        channels: int = 1,
        channel: int | None = None,
        duration: float | None = None,
    ) -> None:
        if channels not in (1, 2):
            raise ValueError(f"channels {channels}: 1 or 2")
        self.source, self.sample_rate, self.channels, self.channel = source, sample_rate, channels, channel
        self.start_seconds, self.stop_seconds = start_seconds or 0.0, stop_seconds
        self.duration = duration if stop_seconds is None else None
        self.source_rate = 0
        self.source_samples = 0
        self.notes: list[str] = []
        self._power = np.zeros(2)

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield blocks of any length. Raises UserError for audio that cannot be read completely."""
        self.source_samples, self.notes, self._power = 0, [], np.zeros(2)
        with opened(self.source) as file:
            yield from self._resampled(file)
        if self.source_samples == 0:
            raise UserError("no samples: the file or segment holds no audio")
        if self._power[0] < SILENCED * self._power[1]:
            self.notes.append("cancelled")

    def _resampled(self, file: AudioDecoder) -> Iterator[NDArray[np.float32]]:
        self.source_rate = file.samplerate
        if not LEAST_RATE <= file.samplerate <= MOST_RATE:
            raise UserError(
                f"sample rate {file.samplerate} Hz: must be from {LEAST_RATE} to {MOST_RATE}; correct the file's header"
            )
        there = file.channels
        if self.channel is not None:
            if self.channel >= there:
                raise UserError(f"channel {self.channel}: the file has {there}, counted from 0")
            there = 1
        kept = min(self.channels, there)
        if self.channels == 2 and there > 2:
            raise UserError(f"{there} channels: this codec takes one or two; mix the file down first")
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
        """Convert a block [n] or [n, 2] to [n], or to [2, n] for two channels."""
        if self.channels == 1:
            return block
        return np.stack([block, block]) if block.ndim == 1 else np.ascontiguousarray(block.T)

    def _frames(self, file: AudioDecoder) -> Iterator[NDArray[np.float32]]:
        """Yield blocks [n], or [n, 2] if two channels are kept."""
        begin, wanted = self._span(file.samplerate, file.length)
        if begin:
            file.go_to(begin, BLOCK_FRAMES)
        while wanted is None or self.source_samples < wanted:
            left = BLOCK_FRAMES if wanted is None else wanted - self.source_samples
            block = file.decode(min(BLOCK_FRAMES, left))
            if not len(block):
                if wanted is None:
                    return
                if file.length is None:  # the end is known now
                    self._span(file.samplerate, begin + self.source_samples)
                    return
                raise UserError(f"truncated: the header promises {wanted} samples, {self.source_samples} are there")
            yield self._mixed(block, file.samplerate)
        if self.duration is not None and file.length is None:
            rest = file.decode(round(END_TOLERANCE * file.samplerate) + 1)
            if 0 < len(rest) <= END_TOLERANCE * file.samplerate:
                yield self._mixed(rest, file.samplerate)

    def _mixed(self, block: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
        """Return the selected channel, both of two, or the mean of [n, C]. Counts the samples."""
        if not np.isfinite(block).all():
            raise UserError(f"NaN or infinite samples after {self.source_samples / rate:.3f} s")
        self.source_samples += len(block)
        if self.channel is not None:
            return np.ascontiguousarray(block[:, self.channel])
        if block.shape[1] == 1:
            return block[:, 0]
        if self.channels == 2:
            return block
        mixed: NDArray[np.float32] = block.mean(axis=1)
        self._power += np.vdot(mixed, mixed), np.vdot(block, block) / block.shape[1]
        return mixed

    def _span(self, rate: int, length: int | None) -> tuple[int, int | None]:
        """Return the first frame and number of frames of the file or segment, None if the end is unknown."""
        begin = _frames_in(self.start_seconds, rate)
        end = length
        if self.stop_seconds is not None:
            end = _frames_in(self.stop_seconds, rate)
        elif self.duration is not None:
            end = begin + _frames_in(self.duration, rate)
        if length is None:
            return begin, None if end is None else end - begin
        if begin and begin >= length:
            raise UserError(f"segment starts at {self.start_seconds} s, the file ends before")
        if end is not None and end > length:
            if end - length > END_TOLERANCE * rate:
                raise UserError(f"segment ends at {end / rate} s, the file at {length / rate} s")
            self.notes.append("clipped")
            end = length
        if self.duration is not None and end is not None and length - end <= END_TOLERANCE * rate:
            end = length
        return begin, None if end is None else end - begin


def _frames_in(seconds: float, rate: int) -> int:
    """Convert a time to frames, MOST_FRAMES at most: a list may state 1e308 s."""
    return round(min(seconds * rate, MOST_FRAMES))


def read_wave(source: Path | BinaryIO, sample_rate: int, channels: int = 1) -> NDArray[np.float32]:
    """Read a file as float32 at `sample_rate`: [n], or [2, n] for `channels` 2. Raises UserError naming the file."""
    try:
        return np.concatenate(list(AudioReader(source, sample_rate, channels=channels).blocks()), axis=-1)
    except UserError as error:
        name = source if isinstance(source, Path) else getattr(source, "name", "")
        raise UserError(f"{name}: {error}" if name else str(error)) from error


def sha256_of(source: Path | BinaryIO) -> str:
    """Return the hex sha256 of a whole file. Raises UserError if it cannot be read."""
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
