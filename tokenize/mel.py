"""The log-mel plane that `run --with-mel` stores next to the codes: one column of uint8 values a frame.

EnCodecMAE's stronger variant reads log-mel spectra and predicts codes (arXiv 2309.07391, section 2, `mel256-ec`). The
plane gives a model that input from the shards alone. Column t belongs to frame t of the codes: its window is centred on
that frame's samples. The plane depends on the wave at the codec's rate only, never on how the wave was cut.

    power  P[b] = sum over bins of filter b of |rfft(hann * x)|^2 / (sum(hann) / 2)^2     a full-scale sine has power 1
    value  q[b] = round((log10 P[b] - LOW) / (HIGH - LOW) * 255), clipped to 0..255       a step is 0.47 dB
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError

LOW, HIGH = -11.0, 1.0
"""log10 of the powers that are stored as 0 and as 255. 16-bit silence with dither lies at -12."""
CHUNK = 256
"""Frames of one matrix product. Its shape never varies, so neither do its bits."""
WINDOW_RATIO = 1.6
"""Window length over hop: 32 ms for a hop of 20 ms."""


@dataclass(frozen=True, kw_only=True)
class MelSpec:
    """All that determines a plane. It is part of plan.json, dataset.json and an exported model's config.json."""

    bands: int
    sample_rate: int
    """Hz, the codec's."""
    hop_length: int
    """Samples, the codec's."""
    window: int
    """Samples of the Hann window, which is also the length of the transform."""
    low_hz: float = 0.0
    high_hz: float = 8000.0
    low: float = LOW
    high: float = HIGH

    @classmethod
    def for_codec(cls, bands: int, card: CodecCard) -> MelSpec:
        """The plane of a codec. Raises UserError for codecs with segments, and for more bands than the window tells."""
        if card.segment_samples:
            raise UserError(
                f"--with-mel {bands}: the frames of {card.name} overlap between segments; use another codec"
            )
        window = 2 * round(WINDOW_RATIO * card.hop_length / 2)
        spec = cls(
            bands=bands,
            sample_rate=card.sample_rate,
            hop_length=card.hop_length,
            window=window,
            high_hz=min(8000.0, card.sample_rate / 2),
        )
        empty = int((filters(spec).sum(axis=0) == 0).sum())
        if empty:
            raise UserError(
                f"--with-mel {bands}: {empty} bands hold no bin of a window of {window} samples; give fewer"
            )
        return spec

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MelSpec:
        """Raises UserError for unknown or missing fields."""
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            odd = sorted(set(values) ^ known)[0]
            raise UserError(f"mel plane: field {odd!r} is unknown or missing; it was written by another codecssl")
        return cls(**values)

    def log_power(self, plane: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Stored values of any shape to log10 power, float32; exact to half a step, (high - low) / 510."""
        return np.float32(self.low) + plane.astype(np.float32) * np.float32((self.high - self.low) / 255)


def filters(spec: MelSpec) -> NDArray[np.float64]:
    """float64 [window // 2 + 1, bands]: triangles of height 1, evenly spaced on the HTK mel scale."""

    def mel(hz: float) -> float:
        return 2595.0 * float(np.log10(1.0 + hz / 700.0))

    edges = np.linspace(mel(spec.low_hz), mel(spec.high_hz), spec.bands + 2)
    edges = 700.0 * (10.0 ** (edges / 2595.0) - 1.0)
    bins = np.fft.rfftfreq(spec.window, 1.0 / spec.sample_rate)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling))


class MelStream:
    """Computes a plane piece by piece, in bounded memory.

    >>> stream = MelStream(spec)
    >>> plane = np.concatenate([*(stream.push(piece) for piece in pieces), stream.finish()])
    """

    def __init__(self, spec: MelSpec) -> None:
        self.spec = spec
        self._filters = filters(spec)
        self._hann = np.hanning(spec.window + 1)[:-1]
        self._scale = (self._hann.sum() / 2.0) ** 2
        self._rest = np.zeros((spec.window - spec.hop_length) // 2, np.float32)
        self._samples = self._frames = 0

    def push(self, wave: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Take samples [n] or [C, n] and return the columns [t, bands] that they complete, CHUNK at a time."""
        mono = wave if wave.ndim == 1 else wave.mean(axis=0, dtype=np.float32)
        self._samples += len(mono)
        self._rest = np.concatenate([self._rest, mono])
        ready = (len(self._rest) - self.spec.window) // self.spec.hop_length + 1
        return self._take(max(0, ready) // CHUNK * CHUNK)

    def finish(self) -> NDArray[np.uint8]:
        """Return the remaining columns [t, bands]. The wave is followed by zeros."""
        left = -(-self._samples // self.spec.hop_length) - self._frames
        padded = -(-left // CHUNK) * CHUNK
        needed = (padded - 1) * self.spec.hop_length + self.spec.window if padded else 0
        self._rest = np.pad(self._rest, (0, max(0, needed - len(self._rest))))
        return self._take(padded)[:left]

    def _take(self, count: int) -> NDArray[np.uint8]:
        """The next `count` columns, a multiple of CHUNK."""
        hop, found = self.spec.hop_length, [np.zeros((0, self.spec.bands), np.uint8)]
        for first in range(0, count, CHUNK):
            piece = self._rest[first * hop : (first + CHUNK - 1) * hop + self.spec.window].astype(np.float64)
            windows = np.lib.stride_tricks.sliding_window_view(piece, self.spec.window)[::hop]
            power = np.abs(scipy.fft.rfft(windows * self._hann, axis=1)) ** 2 @ self._filters / self._scale
            found.append(self._quantised(power))
        self._rest = self._rest[count * hop :]
        self._frames += count
        return np.concatenate(found)

    def _quantised(self, power: NDArray[np.float64]) -> NDArray[np.uint8]:
        low, high = self.spec.low, self.spec.high
        values = (np.log10(np.maximum(power, 1e-30)) - low) / (high - low) * 255.0
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def mel_plane(spec: MelSpec, wave: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The plane uint8 [T, bands] of a whole wave [n] or [C, n] at the codec's rate; T is ceil(n / hop)."""
    stream = MelStream(spec)
    return np.concatenate([stream.push(wave), stream.finish()])
