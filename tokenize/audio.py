"""Audio files in, float32 mono blocks at the codec's rate out, in bounded memory.

soundfile decodes (wav, flac, ogg, opus, mp3, aiff, ...) without ffmpeg. soxr (HQ) resamples as one stream over the
whole file: its output is bit for bit that of resampling the file at once, wherever the blocks are cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from codecssl.tokenize.errors import UserError

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
    """One file, or the part of it between two times, as mono float32 blocks at `sample_rate`.

    After iterating, `source_samples` is what was decoded, per channel at the file's own rate.
    """

    def __init__(
        self,
        path: Path,
        sample_rate: int,
        start_seconds: float | None = None,
        stop_seconds: float | None = None,
    ) -> None:
        self.path, self.sample_rate = path, sample_rate
        self.start_seconds, self.stop_seconds = start_seconds or 0.0, stop_seconds
        self.source_rate = 0
        self.source_samples = 0

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield 1-D blocks of any length. Raises UserError for what cannot be read whole."""
        try:
            yield from self._resampled()
        except soundfile.LibsndfileError as error:
            raise UserError(f"cannot decode: {_reason(self.path, error)}") from error
        if self.source_samples == 0:
            raise UserError("no samples: the file or segment holds no audio")

    def _resampled(self) -> Iterator[NDArray[np.float32]]:
        with soundfile.SoundFile(self.path) as file:
            self.source_rate = file.samplerate
            if file.samplerate == self.sample_rate:
                yield from self._mono(file)
                return
            stream = soxr.ResampleStream(file.samplerate, self.sample_rate, 1, dtype="float32", quality="HQ")
            for block in self._mono(file):
                yield stream.resample_chunk(block)
            yield stream.resample_chunk(np.zeros(0, np.float32), last=True)

    def _mono(self, file: soundfile.SoundFile) -> Iterator[NDArray[np.float32]]:
        begin = round(self.start_seconds * file.samplerate)
        wanted = file.frames - begin
        if self.stop_seconds is not None:
            wanted = round(self.stop_seconds * file.samplerate) - begin
            if begin + wanted > file.frames:
                raise UserError(f"segment ends at {self.stop_seconds} s, the file at {file.frames / file.samplerate} s")
        if begin:
            if begin >= file.frames:
                raise UserError(f"segment starts at {self.start_seconds} s, the file ends before")
            file.seek(begin)
        slack = MP3_SLACK if file.format == "MP3" else 0
        while self.source_samples < wanted:
            block = file.read(min(BLOCK_FRAMES, wanted - self.source_samples), dtype="float32", always_2d=True)
            if not len(block):
                if wanted - self.source_samples <= slack:
                    return
                raise UserError(f"truncated: the header promises {wanted} samples, {self.source_samples} are there")
            if not np.isfinite(block).all():
                raise UserError(f"NaN or infinite samples after {self.source_samples / file.samplerate:.3f} s")
            self.source_samples += len(block)
            yield block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]


def _reason(path: Path, error: soundfile.LibsndfileError) -> str:
    """libsndfile's word, but for two cases that it tells wrongly."""
    if path.stat().st_size == 0:
        return "the file is empty"
    text = str(error).rsplit(": ", 1)[-1].strip()
    return "no audio found in it" if text.startswith("File does not exist") else text


def read_wave(path: Path, sample_rate: int) -> NDArray[np.float32]:
    """A whole file as 1-D float32 at `sample_rate`. Raises UserError naming the file."""
    try:
        return np.concatenate(list(AudioReader(path, sample_rate).blocks()))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes. Raises UserError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror}") from error
    return digest.hexdigest()
