"""Synthesised environmental sounds of eight classes, for a task of sound events without recordings.

Each clip draws its own rates, pitches, spectra and level (RMS of -34 to -20 dB), and has white noise 30 to 50 dB below
it.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, lfilter

from codecssl.superb.sounds.notes import SAMPLE_RATE, Wave, with_noise

SECONDS = 2.0


def _filtered(wave: Wave, kind: str, *hz: float) -> Wave:
    """Filter by a second-order Butterworth filter; kind: lowpass, highpass or bandpass, with one or two corners."""
    filtered: Wave = lfilter(*butter(2, hz if len(hz) > 1 else hz[0], kind, fs=SAMPLE_RATE), wave)
    return filtered


def _events(times: Wave, place: Callable[[Wave], Wave], t: Wave) -> Wave:
    """Sum `place(seconds since the event)` over events at `times`; it is zero before each event."""
    total = np.zeros(len(t))
    for time in times:
        first = int(np.searchsorted(t, time))
        total[first:] += place(t[first:] - time)
    return total


def _regular(rng: np.random.Generator, slowest: float, fastest: float, jitter: float) -> Wave:
    """Return times of events at a rate between the two, in events per second, with a random phase and jitter."""
    rate = rng.uniform(slowest, fastest)
    times = (np.arange(np.ceil(SECONDS * rate)) + rng.uniform(0, 1)) / rate
    jittered: Wave = np.abs(times + rng.normal(0, jitter / rate, len(times)))
    return jittered


def _alarm(t: Wave, rng: np.random.Generator) -> Wave:
    """Beeps of one pitch from 1 to 3 kHz with a third harmonic, two to five per second."""
    hz, rate = rng.uniform(1000, 3000), rng.uniform(2, 5)
    on = ((t * rate + rng.uniform(0, 1)) % 1) < rng.uniform(0.4, 0.6)
    return on * (np.sin(2 * np.pi * hz * t) + 0.3 * np.sin(6 * np.pi * hz * t))


def _birds(t: Wave, rng: np.random.Generator) -> Wave:
    """Chirps from 2 to 6 kHz that rise or fall within 30 to 120 ms."""
    start, sweep, length = rng.uniform(2500, 5000), rng.uniform(-12_000, 12_000), rng.uniform(0.03, 0.12)

    def chirp(s: Wave) -> Wave:
        shape = np.sin(np.pi * np.clip(s / length, 0, 1))
        wave: Wave = shape * np.sin(2 * np.pi * (start * s + sweep * s**2 / 2))
        return wave

    return _events(_regular(rng, 3, 9, 0.2), chirp, t)


def _clock(t: Wave, rng: np.random.Generator) -> Wave:
    """Ticks at an even rate: damped resonances at 1.5 to 4 kHz."""
    hz, decay = rng.uniform(1500, 4000), rng.uniform(80, 250)
    return _events(_regular(rng, 2, 5, 0.0), lambda s: np.exp(-decay * s) * np.sin(2 * np.pi * hz * s), t)


def _engine(t: Wave, rng: np.random.Generator) -> Wave:
    """Harmonics of 25 to 70 Hz that fall by 6 dB per octave, and low noise in the same rhythm."""
    f0 = rng.uniform(25, 70) * (1 + 0.03 * np.sin(2 * np.pi * rng.uniform(0.3, 1.5) * t))
    phase = 2 * np.pi * np.cumsum(f0) / SAMPLE_RATE
    tones = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 25))
    noise = _filtered(rng.standard_normal(len(t)), "lowpass", 1200) * (1 + np.sin(phase))
    return np.asarray(tones + rng.uniform(0.5, 2) * noise)


def _footsteps(t: Wave, rng: np.random.Generator) -> Wave:
    """Thuds of low noise that decay within 50 to 150 ms, 1.4 to 2.6 per second."""
    decay = rng.uniform(20, 60)
    noise = _filtered(rng.standard_normal(len(t)), "bandpass", rng.uniform(60, 150), rng.uniform(500, 1500))
    return noise * _events(_regular(rng, 1.4, 2.6, 0.05), lambda s: np.exp(-decay * s), t)


def _rain(t: Wave, rng: np.random.Generator) -> Wave:
    """Steady noise above 1 kHz with hundreds of drops per second."""
    drops = np.where(rng.uniform(size=len(t)) < rng.uniform(100, 600) / SAMPLE_RATE, rng.normal(0, 20, len(t)), 0)
    return _filtered(rng.standard_normal(len(t)) + drops, "highpass", rng.uniform(800, 2000))


def _siren(t: Wave, rng: np.random.Generator) -> Wave:
    """A tone that glides between 500 and 1,600 Hz, up and down or in a sawtooth."""
    low, high, rate = rng.uniform(450, 700), rng.uniform(1100, 1600), rng.uniform(0.4, 3)
    place = (t * rate + rng.uniform(0, 1)) % 1
    glide = place if rng.uniform() < 0.5 else 1 - np.abs(2 * place - 1)
    phase = 2 * np.pi * np.cumsum(low + (high - low) * glide) / SAMPLE_RATE
    return np.sin(phase) + 0.4 * np.sin(2 * phase) + 0.2 * np.sin(3 * phase)


def _wind(t: Wave, rng: np.random.Generator) -> Wave:
    """Noise below 300 to 900 Hz whose level swells slowly."""
    swell = 1 + 0.8 * np.sin(2 * np.pi * rng.uniform(0.2, 0.8) * t + rng.uniform(0, 6))
    return _filtered(rng.standard_normal(len(t)), "lowpass", rng.uniform(300, 900)) * swell


SOUNDS: dict[str, Callable[[Wave, np.random.Generator], Wave]] = {
    "alarm": _alarm,
    "birds": _birds,
    "clock": _clock,
    "engine": _engine,
    "footsteps": _footsteps,
    "rain": _rain,
    "siren": _siren,
    "wind": _wind,
}


def numbered_sound(name: str, number: int, seed: int) -> NDArray[np.float32]:
    """Return clip `number` of a class of SOUNDS: 2 s at 16 kHz. Equal arguments give equal samples."""
    rng = np.random.default_rng([seed, list(SOUNDS).index(name), number])
    wave = SOUNDS[name](np.arange(round(SECONDS * SAMPLE_RATE)) / SAMPLE_RATE, rng)
    wave = wave / np.sqrt(np.mean(wave**2)) * 10 ** (rng.uniform(-34, -20) / 20)
    return with_noise(wave * min(1.0, 0.9 / np.abs(wave).max()), rng)
