"""Decode compressed or containered audio with FFmpeg, through PyAV. The wheels of PyAV include FFmpeg's libraries.

The length of a file is the number of decoded samples. Encoder delay and padding are removed as FFmpeg removes them. A
segment is read by seeking to an earlier position and discarding the frames before the segment. In a container whose
time stamps are not exact, decoding begins at the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources import containers

FORMATS = (
    "aac,ac3,eac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,flac,flv,loas,matroska,mov,mp3,mpc,mpc8,mpeg,mpegts,"
    "nistsphere,ogg,tta,voc,w64,wav,wv"
)
"""The only demuxers allowed: a playlist (HLS, DASH, concat) could make FFmpeg open other files and URLs."""

EXACT = ("mp3", "ogg")
"""Demuxers with sample-exact time stamps, whose codecs decode to the same samples after a seek."""

PREROLL_SECONDS = 1.0
"""Seconds decoded before a segment and discarded. MP3's bit reservoir and a transform codec's overlap are shorter."""

SCALES = {"u8": 128.0, "s16": float(1 << 15), "s32": float(1 << 31), "s64": float(1 << 63), "flt": 1.0, "dbl": 1.0}
"""Full scale of FFmpeg's sample formats; libsndfile divides by the same numbers."""
DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}


class FfmpegFile:
    """An audio stream, decoded from its start or from a later frame.

    `source` is a seekable binary file. Raises UserError for a file that FFmpeg cannot open or that has no audio.
    """

    length: int | None = None
    """Number of frames from the header. Not used here."""
    slack = 0

    def __init__(self, source: BinaryIO) -> None:
        self.source = source
        self.size = source.seek(0, 2)
        if not self.size:
            raise UserError("cannot decode: the file is empty")
        self.links = 1
        if containers.is_ogg(source):
            containers.check_ogg(source, self.size)
            self.links = containers.ogg_links(source)
        containers.check_matroska(source, self.size)
        containers.check_riff(source, self.size)
        self.xing = containers.xing_frames(source)
        self._open()  # from now on only FFmpeg moves the file's position
        self.format: str = self.container.format.name
        self._restart()

    def close(self) -> None:
        self.container.close()

    def _open(self) -> None:
        import av

        self.source.seek(0)
        try:
            self.container: Any = av.open(self.source, options={"format_whitelist": FORMATS}, metadata_errors="replace")
        except (av.error.FFmpegError, ValueError, EOFError) as error:
            raise UserError(f"cannot decode: no audio that FFmpeg knows in it ({_words(error)})") from error
        self.stream: Any = self.container.streams.best("audio")
        if self.stream is None or self.stream.codec_context is None:
            self.container.close()
            raise UserError("cannot decode: no audio stream in it that FFmpeg can decode")
        self.stream.codec_context.thread_count = 1
        if self.stream.codec_context.name == "flac":
            self.stream.codec_context.options = {"err_detect": "crccheck+explode"}

    def _restart(self) -> None:
        """Restart at the first frame. The first call also determines rate and channels, which requires decoding."""
        self.errors_matter = self.from_start = True
        self.frames = self._frames()
        self.kept: list[NDArray[np.float32]] = []
        first = next(self.frames, None)
        if first is None:
            raise UserError("no samples: the file or segment holds no audio")
        self.samplerate, self.channels = int(first.sample_rate), _channels(first)
        self.origin, self.time_base = first.pts, first.time_base
        self.kept.append(self._samples(first))

    # ---------------------------------------------------------------- packets and frames

    def _frames(self) -> Iterator[Any]:
        """Yield decoded frames. Raises UserError for damage, and at the end for a truncated file."""
        import av

        packets, last = 0, b""
        try:
            for packet in self.container.demux(self.stream):
                packets += packet.size > 0
                last = bytes(packet) if packet.size else last
                if packet.is_corrupt:
                    raise UserError("truncated: its last packet is incomplete")
                yield from self._decoded(packet, av.error.FFmpegError)
        except av.error.FFmpegError as error:
            raise UserError(f"damaged: {_words(error)}") from error
        if self.from_start:
            promised = self.xing if self.format == "mp3" else self.stream.frames if self.format[:3] == "mov" else 0
            containers.check_count(promised, packets)
        containers.check_last(self.format, last)

    def _decoded(self, packet: Any, wrong: type[Exception]) -> Iterator[Any]:
        try:
            for frame in packet.decode():
                if frame.samples:
                    yield frame
        except wrong as error:
            if isinstance(error, EOFError):
                return
            is_junk = self.format == "mp3" and containers.mpeg_frame_bytes(bytes(packet)) is None
            if self.errors_matter and not is_junk:  # an MP3 may have tags or zeros between and after its frames
                at = "" if packet.pts is None else f" at {float(packet.pts * packet.time_base):.2f} s"
                raise UserError(f"damaged: FFmpeg cannot decode the data{at} ({_words(error)})") from error

    def _samples(self, frame: Any) -> NDArray[np.float32]:
        """Convert a frame to samples [n, C], integers scaled to [-1, 1)."""
        if (frame.sample_rate, _channels(frame)) != (self.samplerate, self.channels):
            raise UserError(
                f"the audio changes from {self.channels} channels at {self.samplerate} Hz to {_channels(frame)} at "
                f"{frame.sample_rate} Hz; split the file there"
            )
        kind = frame.format.name.removesuffix("p")
        if kind not in SCALES:
            raise UserError(f"cannot decode: samples of the kind {frame.format.name}")
        dtype = np.dtype(DTYPES[kind])
        count = frame.samples
        if frame.format.is_planar:
            planes = [np.frombuffer(plane, dtype, count) for plane in frame.planes[: self.channels]]
            block = planes[0][:, None] if self.channels == 1 else np.stack(planes, axis=1)
        else:
            block = np.frombuffer(frame.planes[0], dtype, count * self.channels).reshape(count, self.channels)
        if kind == "u8":
            block = block.astype(np.int16) - 128
        return block if dtype == np.float32 else (block / SCALES[kind]).astype(np.float32)

    # ---------------------------------------------------------------- reading

    def decode(self, frames: int) -> NDArray[np.float32]:
        """Return the next frames [n, C], n <= frames; [0, C] at the end. Raises UserError for damage or truncation."""
        have = sum(map(len, self.kept))
        while have < frames and (frame := next(self.frames, None)) is not None:
            self.kept.append(self._samples(frame))
            have += len(self.kept[-1])
        if not have:
            return np.zeros((0, self.channels), np.float32)
        block = self.kept[0] if len(self.kept) == 1 else np.concatenate(self.kept)
        self.kept = [block[frames:]] if have > frames else []
        return block[:frames]

    def go_to(self, frame: int, block: int) -> None:
        """Move from the start to `frame`. If no seek is exact, frames are decoded and discarded, `block` at a time."""
        if frame > 2 * PREROLL_SECONDS * self.samplerate and self._seek(frame):
            return
        while frame > 0 and (passed := len(self.decode(min(block, frame)))):
            frame -= passed

    def _seek(self, frame: int) -> bool:
        """Seek to before `frame` and discard up to it. Returns False, at the start again, if that is not exact."""
        exact = self.format.split(",")[0] in EXACT and self.origin is not None
        exact = exact and (1 / self.time_base) % self.samplerate == 0 and self.links == 1
        if not exact:
            return False
        per_sample = int(1 / self.time_base / self.samplerate)
        target = frame - round(PREROLL_SECONDS * self.samplerate)
        self.container.seek(self.origin + target * per_sample, stream=self.stream)
        self.errors_matter, self.from_start, self.kept = (
            False,
            False,
            [],
        )  # the first frames after a seek may depend on earlier ones
        self.frames = self._frames()
        for found in self.frames:
            if found.pts is None or (found.pts - self.origin) // per_sample > frame:
                break
            at = (found.pts - self.origin) // per_sample
            if at + found.samples > frame:
                self.errors_matter = True
                self.kept = [self._samples(found)[frame - at :]]
                return True
        self.container.close()
        self._open()
        self._restart()
        return False


def _channels(frame: Any) -> int:
    return int(frame.layout.nb_channels)


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
