"""Task sd of mini-SUPERB: two real speakers take turns, with pauses and overlaps at known times."""

import numpy as np

from codecssl.superb.mini.audio import FRAME, RATE, Wave, active, at_level, spans, trimmed
from codecssl.superb.mini.builder import TRIPLE, LackingError, MiniBuilder
from codecssl.superb.mini.manifest import grouped
from codecssl.superb.rows import ManifestRow

TURNS = (4, 5)
CLIP_SECONDS = (1.5, 6.0)
LEVELS = (-29.0, -23.0)  # dBFS of a speaker
OVERLAPS, PAUSES = (0.5, 2.5), (0.1, 0.6)  # seconds at a change of speaker
NOISE_LEVEL = -65.0  # dBFS of white noise under all, so that no pause is digital silence

Placed = tuple[int, str, Wave]
"""First sample, speaker and wave of a turn."""


def sd(builder: MiniBuilder) -> list[ManifestRow]:
    """Build mixtures of two speakers of one source. Each speaker is in one split only.

    `segments` follow the energy of each clip before mixing. Pauses of at least 0.3 s end a segment.
    """
    rows = [row for row in builder.data.speech() if CLIP_SECONDS[0] <= row["seconds"] <= CLIP_SECONDS[1]]
    made = []
    for split, count in zip(TRIPLE, builder.recipe.sd_mixtures, strict=True):
        rng = builder.rng(f"sd {split}")
        sources = _by_source([row for row in rows if builder.voices[row["speaker"]] == split])
        for number in range(count if sources else 0):
            clips = sources[number % len(sources)]
            names = [str(name) for name in rng.permutation(sorted(clips))[:2]]
            placed = _turns(builder, names, clips, rng)
            made.append(_mixture(builder, split, number, placed, clips[names[0]][0], rng))
    if {row["splits"]["sd"] for row in made} != set(TRIPLE):
        raise LackingError("in each split two speakers of one source with two clips of 1.5 to 6 s or more")
    speech = sum(s["end"] - s["start"] for row in made for s in row["segments"])
    overlap = sum(overlapped(row["segments"]) for row in made)
    builder.note("sd", f"{100 * overlap / (speech - overlap):.0f} % of the time in which anyone speaks, both do.")
    return made


def _by_source(rows: list[ManifestRow]) -> list[dict[str, list[ManifestRow]]]:
    """Group clips by source and speaker, for speakers with at least two clips and sources with two such speakers."""
    sources = grouped([{**row, "source": row.get("origin", "")} for row in rows], "source")
    found = []
    for name in sorted(sources):
        speakers = {s: clips for s, clips in grouped(sources[name], "speaker").items() if len(clips) >= 2}
        if len(speakers) >= 2:
            found.append(speakers)
    return found


def _turns(
    builder: MiniBuilder, names: list[str], clips: dict[str, list[ManifestRow]], rng: np.random.Generator
) -> list[Placed]:
    order = {name: list(rng.permutation(len(clips[name]))) for name in names}
    loudness = {name: float(rng.uniform(*LEVELS)) for name in names}
    placed: list[Placed] = []
    ends, free, last = round(float(rng.uniform(*PAUSES)) * RATE), dict.fromkeys(names, 0), 0
    for turn in range(int(rng.integers(TURNS[0], TURNS[1] + 1))):
        name = names[turn % 2]
        row = clips[name][int(order[name][(turn // 2) % len(order[name])])]
        wave = at_level(trimmed(builder.audio.read(row)), loudness[name])
        start = ends if not placed else ends + _gap(builder.recipe.sd_overlap, min(last, len(wave)), rng)
        start = max(start, free[name])
        placed.append((start, name, wave))
        last, free[name] = len(wave), start + len(wave) + round(PAUSES[0] * RATE)
        ends = max(ends, start + len(wave))
    return placed


def _gap(chance: float, shorter: int, rng: np.random.Generator) -> int:
    """Draw the samples between the end of a turn and the start of the next; negative for an overlap."""
    if rng.random() < chance:
        return -min(round(float(rng.uniform(*OVERLAPS)) * RATE), shorter // 2)
    return round(float(rng.uniform(*PAUSES)) * RATE)


def _mixture(
    builder: MiniBuilder, split: str, number: int, placed: list[Placed], source: ManifestRow, rng: np.random.Generator
) -> ManifestRow:
    tail = round(float(rng.uniform(*PAUSES)) * RATE)
    length = max(start + len(wave) for start, _, wave in placed) + tail
    mix = 10 ** (NOISE_LEVEL / 20) * rng.standard_normal(length)
    segments = []
    for start, name, wave in placed:
        mix[start : start + len(wave)] += wave
        for first, end in spans(active(wave)):
            times = [round((start + frame * FRAME) / RATE, 3) for frame in (first, end)]
            segments.append({"speaker": name, "start": times[0], "end": times[1]})
    segments.sort(key=lambda segment: (segment["start"], segment["speaker"]))
    columns = {"speakers": sorted({name for _, name, _ in placed}), "segments": segments}
    made = builder.written("sd", split, f"{split}-{number:03d}", mix.astype(np.float32), source, **columns)
    return {key: value for key, value in made.items() if key not in ("speaker", "gender")}


def overlapped(segments: list[ManifestRow]) -> float:
    """Return the seconds in which segments of both speakers overlap."""
    total = 0.0
    for i, one in enumerate(segments):
        for other in segments[i + 1 :]:
            if one["speaker"] != other["speaker"]:
                total += max(0.0, min(one["end"], other["end"]) - max(one["start"], other["start"]))
    return total
