"""HEAR tasks of synthesised notes: pitch, instruments and note events."""

import numpy as np

from codecssl.superb.hear.metrics import Event
from codecssl.superb.hear.task_folder import Clip
from codecssl.superb.sounds.notes import PITCHES, SAMPLE_RATE, TIMBRES, note, numbered_note, with_noise


def pitch_clips(copies: int, seed: int) -> list[Clip]:
    """Notes labelled by pitch. Each fold tests a timbre that did not train."""
    return [
        Clip(file=f"{timbre}-{pitch}-{copy}.wav", split=f"fold{fold:02d}", labels=[str(pitch)],
             wave=numbered_note(timbre, pitch, copy, seed))
        for fold, timbre in enumerate(TIMBRES) for pitch in PITCHES for copy in range(copies)
    ]  # fmt: skip


def instrument_clips(copies: int, seed: int) -> list[Clip]:
    """Notes labelled by timbre. Each of four folds tests six pitches that did not train."""
    return [
        Clip(file=f"{timbre}-{pitch}-{copy}.wav", split=f"fold{pitch % 4:02d}", labels=[timbre],
             wave=numbered_note(timbre, pitch, copy, seed))
        for timbre in TIMBRES for pitch in PITCHES for copy in range(copies)
    ]  # fmt: skip


def event_clips(counts: tuple[int, int, int], seed: int, seconds: float = 8.0) -> list[Clip]:
    """Scenes of notes of four timbres, labelled by timbre with onset and end; train, valid and test scenes."""
    clips: list[Clip] = []
    for split, count in zip(("train", "valid", "test"), counts, strict=True):
        for number in range(count):
            rng = np.random.default_rng([seed, 1, len(clips)])
            scene = np.zeros(round(seconds * SAMPLE_RATE))
            events = []
            for timbre in ("bell", "clarinet", "flute", "string"):
                for half in range(2):
                    length = rng.uniform(0.5, 1.2)
                    start = half * seconds / 2 + rng.uniform(0.1, seconds / 2 - length - 0.1)
                    wave = note(timbre, int(rng.choice(PITCHES)), length, rng)
                    first = round(start * SAMPLE_RATE)
                    scene[first : first + len(wave)] += wave / 2
                    events.append(Event(timbre, round(1000 * start, 1), round(1000 * (start + length), 1)))
            clips.append(
                Clip(file=f"{split}-{number:02d}.wav", split=split, wave=with_noise(scene, rng), labels=events)
            )  # fmt: skip
    return clips
