"""The log-mel plane that `run --with-mel` stores next to the codes, with one column of uint8 values per frame.

EnCodecMAE's stronger variant reads log-mel spectra and predicts codes (arXiv 2309.07391, section 2, `mel256-ec`). The
plane gives a model that input from the shards alone. Column t belongs to frame t of the codes: its window is centred on
that frame's samples, with zeros beyond the ends of the wave. Of a window's energy weight (Hann squared) 1 % lies in the
frame before and 1 % in the frame after: the columns next to a masked span hardly show it.

    power  P[b] = sum over bins of filter b of |rfft(hann * x)|^2 / (sum(hann) / 2)^2     a full-scale sine has power 1
    value  q[b] = round((log10 P[b] - LOW) / (HIGH - LOW) * 255), clipped to 0..255       a step is 0.47 dB

The bands are evenly spaced on HTK's mel scale, whose lowest of 80 are narrower than a bin of 512, or on Slaney's. The
scale of the values is fixed: a value means the same in every file. The quantization error of powers in its range is at
most 0.24 dB. The transform is as long as the window, or zero-padded until every filter holds a bin. All computation is
float64 and per frame. A column does not depend on how the wave was cut, batched, or divided among threads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError

LOW, HIGH = -11.0, 1.0
"""log10 of the powers that are stored as 0 and as 255. Dithered 16-bit silence lies near -11."""
MAX_BANDS = 256
GROUP = 256
"""Maximum number of frames transformed at a time, which bounds the memory."""
WINDOW_RATIO = 1.6
"""Window length over hop: 32 ms for a hop of 20 ms."""
Scale = Literal["slaney", "htk"]


@dataclass(frozen=True, kw_only=True)
class MelSpec:
    """Parameters that determine a plane. Part of plan.json, dataset.json and an exported model's config.json."""

    bands: int
    sample_rate: int
    """Sample rate of the codec in Hz."""
    hop_length: int
    """Hop length of the codec in samples."""
    window: int
    """Length of the periodic Hann window in samples."""
    fft: int
    """Length of the transform in samples. The window is zero-padded to it."""
    low_hz: float = 0.0
    high_hz: float = 8000.0
    scale: Scale = "htk"
    """Mel scale on which the bands are evenly spaced."""
    low: float = LOW
    high: float = HIGH
    segment_samples: int = 0
    segment_stride: int = 0
    """The codec card's values. Nonzero for codecs whose frames belong to overlapping segments."""

    @classmethod
    def for_codec(cls, bands: int, card: CodecCard, scale: Scale = "htk") -> MelSpec:
        """Return the spec for a codec. Raises UserError for fewer than 1 or more than 256 bands."""
        if not 1 <= bands <= MAX_BANDS:
            raise UserError(f"--with-mel {bands}: must be from 1 to {MAX_BANDS} bands")
        window = 2 * round(WINDOW_RATIO * card.hop_length / 2)
        spec = cls(
            bands=bands,
            sample_rate=card.sample_rate,
            hop_length=card.hop_length,
            window=window,
            fft=window,
            high_hz=min(8000.0, card.sample_rate / 2),
            scale=scale,
            segment_samples=card.segment_samples,
            segment_stride=card.segment_stride,
        )
        while not filters(spec).any(axis=0).all():
            spec = replace(spec, fft=2 * spec.fft)
        return spec

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MelSpec:
        """Build a spec from a dict. Raises UserError for unknown, missing or invalid fields."""
        values = {"fft": values.get("window"), "scale": "htk", "segment_samples": 0, "segment_stride": 0} | values
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            odd = sorted(set(values) ^ known)[0]
            raise UserError(f"mel plane: field {odd!r} is unknown or missing; it was written by another codecssl")
        whole = ("bands", "sample_rate", "hop_length", "window", "fft")
        if any(type(values[name]) is not int or values[name] < 1 for name in whole) or values["bands"] > MAX_BANDS:
            raise UserError(f"mel plane: {values} is damaged; run `codecssl-tokenize verify`")
        if values["scale"] not in get_args(Scale):
            raise UserError(f"mel plane: scale {values['scale']!r}, must be one of {', '.join(get_args(Scale))}")
        return cls(**values)

    @property
    def options(self) -> str:
        """Return the options of `codecssl-tokenize run` that store this plane."""
        return f"--with-mel {self.bands} --mel-scale {self.scale}"

    def difference(self, other: MelSpec) -> str:
        """Describe the fields in which two planes differ, for error messages."""
        mine, theirs = self.to_dict(), other.to_dict()
        return ", ".join(f"{key} {mine[key]} against {theirs[key]}" for key in mine if mine[key] != theirs[key])

    def log_power(self, plane: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Convert stored values of any shape to log10 power, float32, exact to half a step, (high - low) / 510."""
        return np.float32(self.low) + plane.astype(np.float32) * np.float32((self.high - self.low) / 255)


def filters(spec: MelSpec) -> NDArray[np.float64]:
    """Return float64 [fft // 2 + 1, bands]: triangular filters of height 1, evenly spaced on the spec's mel scale."""
    edges = _band_edges(spec)
    bins = np.fft.rfftfreq(spec.fft, 1.0 / spec.sample_rate)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling))


def _band_edges(spec: MelSpec) -> NDArray[np.float64]:
    """Return the frequencies in Hz between which the bands lie, [bands + 2]."""
    limits = np.array([spec.low_hz, spec.high_hz])
    if spec.scale == "htk":
        low, high = 2595.0 * np.log10(1.0 + limits / 700.0)
        return 700.0 * (10.0 ** (np.linspace(low, high, spec.bands + 2) / 2595.0) - 1.0)
    # Slaney, Auditory Toolbox (1998): linear up to 1 kHz, which is 15 mel, then 27 mel for each factor of 6.4.
    octaves = 27.0 / np.log(6.4)
    low, high = np.where(limits < 1000.0, limits * 0.015, 15.0 + octaves * np.log(np.maximum(limits, 1.0) / 1000.0))
    mel = np.linspace(low, high, spec.bands + 2)
    return np.where(mel < 15.0, mel / 0.015, 1000.0 * np.exp((mel - 15.0) / octaves))


@lru_cache(maxsize=8)
def _sparse_filters(spec: MelSpec) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.intp]]:
    """Return bins and values of the filters' nonzero weights, ordered by band, and the offset of each band."""
    bank = filters(spec).T
    band, bins = np.nonzero(bank)
    return bins, bank[band, bins], np.searchsorted(band, np.arange(spec.bands))


class MelStream:
    """Compute a plane piece by piece in bounded memory.

    >>> stream = MelStream(spec)
    >>> plane = np.concatenate([*(stream.push(piece) for piece in pieces), stream.finish()])
    """

    def __init__(self, spec: MelSpec) -> None:
        self.spec = spec
        self._margin = (spec.window - spec.hop_length) // 2
        self._wave = np.zeros(self._margin, np.float32)
        self._first = -self._margin
        """Index in the wave of the first sample of `_wave`."""
        self._samples = 0
        self._segment = self._frame = 0
        """Segment of the next column (0 for a codec without segments) and frame within it."""

    def push(self, wave: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Take samples [n] or [C, n], averaged over the channels; return the columns [t, bands] that they complete."""
        self._append(wave if wave.ndim == 1 else wave.mean(axis=0, dtype=np.float32))
        self._samples += wave.shape[-1]
        columns = self._columns(self._starts(self._samples - self.spec.window + self._margin + 1, ended=False))
        self._forget()
        return columns

    def finish(self) -> NDArray[np.uint8]:
        """Return the remaining columns [t, bands]."""
        self._append(np.zeros(self.spec.window, np.float32))
        return self._columns(self._starts(self._samples, ended=True))

    def _append(self, wave: NDArray[np.float32]) -> None:
        self._wave = np.concatenate([self._wave, wave])

    def _starts(self, stop: int, *, ended: bool) -> NDArray[np.int64]:
        """Return the first samples of the next frames that begin before `stop`. With `ended`, the wave ends there."""
        spec, found = self.spec, []
        per_segment = -(-spec.segment_samples // spec.hop_length)
        while True:
            begin = self._segment * spec.segment_stride
            count = -(-(stop - begin) // spec.hop_length)
            count = min(count, per_segment) if per_segment else count
            frames = np.arange(self._frame, max(count, self._frame))
            found.append(begin + frames * spec.hop_length)
            self._frame += len(frames)
            more = begin + spec.segment_stride < stop if ended else self._frame == per_segment
            if not per_segment or not more:
                return np.concatenate(found)
            self._segment, self._frame = self._segment + 1, 0

    def _columns(self, starts: NDArray[np.int64]) -> NDArray[np.uint8]:
        groups = (starts[at : at + GROUP] for at in range(0, len(starts), GROUP))
        return np.concatenate([np.zeros((0, self.spec.bands), np.uint8), *map(self._group, groups)])

    def _group(self, starts: NDArray[np.int64]) -> NDArray[np.uint8]:
        spec = self.spec
        hann = np.hanning(spec.window + 1)[:-1]
        windows = np.lib.stride_tricks.sliding_window_view(self._wave, spec.window)[starts - self._margin - self._first]
        spectrum = np.fft.rfft(windows * hann, spec.fft, axis=1)
        bins, weights, bands = _sparse_filters(spec)
        weighted = (spectrum.real**2 + spectrum.imag**2)[:, bins] * (weights / (hann.sum() / 2.0) ** 2)
        # Summed per band: the bits of a matrix product may depend on the number of rows and threads.
        return self._quantised(np.add.reduceat(weighted, bands, axis=1))

    def _forget(self) -> None:
        """Drop the samples before the next column's window."""
        spec = self.spec
        needed = self._segment * spec.segment_stride + self._frame * spec.hop_length
        if spec.segment_samples:  # the next segment begins before this one ends
            needed = min(needed, (self._segment + 1) * spec.segment_stride)
        if (dropped := needed - self._margin - self._first) > 0:
            self._wave, self._first = self._wave[dropped:].copy(), self._first + dropped

    def _quantised(self, power: NDArray[np.float64]) -> NDArray[np.uint8]:
        low, high = self.spec.low, self.spec.high
        values = (np.log10(np.maximum(power, 1e-30)) - low) / (high - low) * 255.0
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def mel_plane(spec: MelSpec, wave: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the plane uint8 [T, bands] of a wave [n] or [C, n] at the codec's rate, T as in `CodecCard.frames_of`."""
    stream = MelStream(spec)
    return np.concatenate([stream.push(wave), stream.finish()])
