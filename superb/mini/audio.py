"""Audio of mini-SUPERB. Clips are used in place; only new ones are written, as 16 kHz FLAC."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from codecssl.superb.rows import ManifestRow
from codecssl.tokenize.sources.audio import read_wave

Wave = NDArray[np.float32]
RATE = 16_000
FRAME = RATE // 100
"""Samples per level: 10 ms."""
PEAK = 0.99
UNDER_SPEECH, OVER_NOISE, FLOOR = 30.0, 6.0, -70.0
"""Thresholds in dB. Active frames are less than 30 below the clip's loud frames and more than 6 above quiet ones."""
MARGIN = 5  # frames kept before and after activity


class AudioWriter:
    """Reads clips and writes new ones into the corpus's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, row: ManifestRow) -> str:
        """Return the path of a clip, or of its 16 kHz copy if it has another rate."""
        if row["rate"] == RATE and row["channels"] == 1:
            return str(row["path"])
        digest = hashlib.sha256(row["path"].encode()).hexdigest()[:8]
        name = f"audio/{Path(row['path']).stem}-{digest}.flac"
        if not (self.folder / name).exists():
            self.write(name, self.read(row))
        return name

    def read(self, row: ManifestRow, band: int = RATE) -> Wave:
        """Read a clip at 16 kHz with the project's resampler, band-limited to `band` / 2 Hz."""
        import soxr

        wave = read_wave(Path(row["path"]), min(RATE, band))
        return wave if band >= RATE else soxr.resample(wave, band, RATE, quality="HQ")

    def write(self, name: str, wave: Wave) -> str:
        """Write a wave to the corpus folder, attenuated if it would clip. Returns `name`."""
        import soundfile

        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        loudest = float(np.abs(wave).max(initial=0))
        soundfile.write(path, wave * min(1.0, PEAK / max(loudest, PEAK)), RATE, subtype="PCM_16")
        return name


def levels(wave: Wave) -> NDArray[np.float64]:
    """Return the level in dBFS of each complete 10 ms."""
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME).astype(np.float64)
    return np.asarray(10 * np.log10((frames**2).mean(axis=1) + 1e-12))


def active(wave: Wave) -> NDArray[np.bool_]:
    """Detect voice activity, bool per 10 ms frame, relative to the clip's own loud and quiet frames."""
    level = levels(wave)
    if not len(level):
        return np.zeros(0, bool)
    loud, quiet = np.percentile(level, 95), max(FLOOR, np.percentile(level, 10))
    return np.asarray(level > min(max(loud - UNDER_SPEECH, quiet + OVER_NOISE), loud - 3))


def spans(marks: NDArray[np.bool_], gap: int = 30, least: int = 10) -> list[tuple[int, int]]:
    """Return active spans (first, end) in frames. Pauses up to `gap` frames are bridged, short blips dropped."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marks.astype(np.int8), [0]])))
    joined: list[tuple[int, int]] = []
    for first, end in edges.reshape(-1, 2).tolist():
        if joined and first - joined[-1][1] <= gap:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return [(first, end) for first, end in joined if end - first >= least]


def trimmed(wave: Wave) -> Wave:
    """Trim a clip to its active frames with 50 ms on both sides. Without activity it is unchanged."""
    found = spans(active(wave))
    if not found:
        return wave
    return wave[max(0, found[0][0] - MARGIN) * FRAME : (found[-1][1] + MARGIN) * FRAME]


def loudest_part(wave: Wave, seconds: float) -> Wave:
    """Return the segment of `seconds` with the most energy, or the whole of a shorter clip."""
    length = round(seconds * RATE)
    if len(wave) <= length:
        return wave
    power = np.concatenate([[0.0], np.cumsum(wave.astype(np.float64) ** 2)])
    start = int(np.argmax(power[length:] - power[:-length]))
    return wave[start : start + length]


def quiet_part(wave: Wave, seconds: float) -> Wave | None:
    """Return an inactive segment of `seconds` that is not digital silence; None if there is none."""
    need, marks = round(seconds * 100), active(wave)
    for first, end in spans(~marks, gap=0, least=need + 2 * MARGIN):
        part = wave[(first + MARGIN) * FRAME :][: need * FRAME]
        if len(part) == need * FRAME <= (end - first) * FRAME and np.median(levels(part)) > FLOOR - 15:
            return part
    return None


def at_level(wave: Wave, dbfs: float) -> Wave:
    """Scale a wave to an RMS level of `dbfs` in its active part."""
    marks = np.repeat(active(wave), FRAME)
    sounding = wave[: len(marks)][marks] if marks.any() else wave
    power = float(np.mean(sounding.astype(np.float64) ** 2)) if len(sounding) else 0.0
    return np.asarray(wave * 10 ** ((dbfs - 10 * np.log10(power + 1e-12)) / 20), np.float32)
