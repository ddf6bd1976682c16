"""The tasks env, inst and pitch of synthesised audio: which clip is in which split, and its labels."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codecssl.superb.sounds.notes import PITCHES, TIMBRES, numbered_note
from codecssl.superb.sounds.scenes import SOUNDS, numbered_sound

SPLITS_OF_TIMBRES = dict(zip(TIMBRES, ("train", "train", "valid", "train", "test", "train"), strict=True))
SPLITS_OF_PITCHES = ("train", "valid", "train", "test")
"""Split by MIDI number modulo 4, so that a pitch of the test set lies between pitches of training."""


@dataclass(frozen=True)
class SynthesisedClip:
    """Mono samples at 16 kHz, the split of each task that the clip serves, and its labels by manifest column."""

    name: str
    wave: NDArray[np.float32]
    splits: dict[str, str]
    labels: dict[str, str]


def notes(copies: int = 2, seed: int = 0) -> Iterator[SynthesisedClip]:
    """Yield the notes of tasks inst and pitch.

    Instruments are tested on pitches that did not train, pitches on an instrument that did not train.
    """
    for timbre in TIMBRES:
        for pitch in PITCHES:
            splits = {"inst": SPLITS_OF_PITCHES[pitch % 4], "pitch": SPLITS_OF_TIMBRES[timbre]}
            for copy in range(copies):
                wave = numbered_note(timbre, pitch, copy, seed)
                labels = {"instrument": timbre, "pitch": str(pitch)}
                yield SynthesisedClip(f"{timbre}-{pitch}-{copy}", wave, splits, labels)


def sounds(clips: int = 20, seed: int = 0) -> Iterator[SynthesisedClip]:
    """Yield the clips of task env, `clips` of each class: three fifths train, a fifth each valid and test."""
    for name in SOUNDS:
        for number in range(clips):
            split = ("train", "train", "train", "valid", "test")[number % 5]
            yield SynthesisedClip(
                f"{name}-{number}", numbered_sound(name, number, seed), {"env": split}, {"sound": name}
            )
