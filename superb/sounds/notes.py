"""Synthesised notes: six timbres, 24 pitches. They serve tasks of pitch and instruments without recordings.

Every note has its own detuning (up to 20 cents), level (-20 to -3 dB) and background noise (30 to 50 dB below).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Wave = NDArray[np.float64]
SAMPLE_RATE = 16_000
PITCHES = range(48, 72)
"""MIDI numbers, 131 to 494 Hz."""


def _partials(f0: float, t: Wave, ratios: NDArray[np.float64], levels: NDArray[np.float64], vibrato: float) -> Wave:
    """Sum of sines at multiples of f0 below 7.5 kHz; vibrato: depth in semitones, at 5.5 Hz."""
    kept = f0 * ratios < 7500
    phase = 2 * np.pi * f0 * np.cumsum(2 ** (vibrato / 12 * np.sin(2 * np.pi * 5.5 * t))) / SAMPLE_RATE
    waves: Wave = (levels[kept, None] * np.sin(ratios[kept, None] * phase)).sum(0)
    return waves


def _flute(f0: float, t: Wave, rng: np.random.Generator) -> Wave:
    tone = _partials(f0, t, np.arange(1.0, 4.0), np.array([1.0, 0.25, 0.06]), 0.3)
    return (tone + 0.03 * rng.standard_normal(len(t))) * np.minimum(1, t / 0.06)


def _organ(f0: float, t: Wave, rng: np.random.Generator) -> Wave:
    return _partials(f0, t, np.array([1.0, 2, 3, 4, 8]), np.array([1.0, 0.8, 0.5, 0.5, 0.4]), 0.0)


def _clarinet(f0: float, t: Wave, rng: np.random.Generator) -> Wave:
    odd = np.arange(1.0, 40.0, 2.0)
    return _partials(f0, t, odd, 1 / odd, 0.0) * np.minimum(1, t / 0.03)


def _string(f0: float, t: Wave, rng: np.random.Generator) -> Wave:
    ratios = np.arange(1.0, 40.0)
    return _partials(f0, t, ratios, 1 / ratios, 0.25) * np.minimum(1, t / 0.12)


def _plucked(f0: float, t: Wave, rng: np.random.Generator) -> Wave:
    """Partials of a plucked string; the decay is proportional to frequency (Karplus and Strong 1983, section 2)."""
    ratios, found = np.arange(1.0, 30.0), np.zeros(len(t))
    for ratio in ratios[f0 * ratios < 7500]:
        found += rng.uniform(0.5, 1) / ratio * np.exp(-t * (2 + 0.8 * ratio)) * np.sin(2 * np.pi * f0 * ratio * t)
    return found


def _bell(f0: float, t: Wave, rng: np.random.Generator) -> Wave:
    found = np.zeros(len(t))
    for ratio, level in zip((1.0, 2.0, 2.4, 3.0, 4.5, 5.33, 6.6), (1.0, 0.7, 0.6, 0.4, 0.3, 0.25, 0.2)):
        found += level * np.exp(-t * 1.5 * ratio) * np.sin(2 * np.pi * f0 * ratio * t)
    return found


TIMBRES: dict[str, Callable[[float, Wave, np.random.Generator], Wave]] = {
    "bell": _bell,
    "clarinet": _clarinet,
    "flute": _flute,
    "organ": _organ,
    "plucked": _plucked,
    "string": _string,
}


def note(timbre: str, pitch: int, seconds: float, rng: np.random.Generator) -> Wave:
    """Synthesise a note at 16 kHz, with a peak from 0.1 to 0.7 and a fade of 10 ms at its end."""
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    wave = TIMBRES[timbre](440 * 2 ** ((pitch - 69 + rng.uniform(-0.2, 0.2)) / 12), t, rng)
    wave = wave / np.abs(wave).max() * 10 ** (rng.uniform(-20, -3) / 20)
    faded: Wave = wave * np.minimum(1, (t[-1] - t) / 0.01)
    return faded


def numbered_note(timbre: str, pitch: int, copy: int, seed: int) -> NDArray[np.float32]:
    """Return copy number `copy` of a note of 1 s with background noise. Equal arguments give equal samples."""
    rng = np.random.default_rng([seed, list(TIMBRES).index(timbre), pitch, copy])
    return with_noise(note(timbre, pitch, 1.0, rng), rng)


def with_noise(wave: Wave, rng: np.random.Generator) -> NDArray[np.float32]:
    """Add white noise 30 to 50 dB below the wave."""
    level = np.sqrt(np.mean(wave**2)) * 10 ** (-rng.uniform(30, 50) / 20)
    return (wave + level * rng.standard_normal(len(wave))).astype(np.float32)
