"""Synthesised notes and sounds: pitches against librosa's YIN, classes that statistics of log-mels tell apart."""

import librosa
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from codecssl.superb.sounds.clips import notes, sounds
from codecssl.superb.sounds.notes import PITCHES, TIMBRES
from codecssl.superb.sounds.scenes import SOUNDS
from codecssl.superb.tasks import TASKS, choose

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def all_notes():
    return list(notes())


@pytest.fixture(scope="module")
def all_sounds():
    return list(sounds())


def test_the_pitch_of_a_note_is_its_label(all_notes):
    """YIN finds the pitch within a quarter tone. A bell has no harmonic spectrum and is left out."""
    for clip in all_notes[::13]:
        if clip.labels["instrument"] == "bell":
            continue
        f0 = np.median(librosa.yin(clip.wave[3200:9600], fmin=90, fmax=700, sr=16_000))
        assert librosa.hz_to_midi(f0) == pytest.approx(int(clip.labels["pitch"]), abs=0.5), clip.name


def test_clips_are_reproducible_distinct_and_not_clipped(all_notes, all_sounds):
    for clips, again in ((all_notes, notes()), (all_sounds, sounds())):
        for clip, same in zip(clips[:40], again):
            assert np.array_equal(clip.wave, same.wave)
        assert len({clip.wave.tobytes() for clip in clips}) == len(clips)
        assert all(0.02 < np.abs(clip.wave).max() < 0.99 for clip in clips)


def test_every_class_is_in_every_split_and_what_is_tested_did_not_train(all_notes, all_sounds):
    columns = ((all_notes, "inst", "instrument"), (all_notes, "pitch", "pitch"), (all_sounds, "env", "sound"))
    for clips, task, label in columns:
        by_split = {split: {c.labels[label] for c in clips if c.splits[task] == split} for split in SPLITS}
        assert by_split["train"] == by_split["valid"] == by_split["test"]
    assert set(SOUNDS) == by_split["test"]

    def met(task, label, split):
        return {clip.labels[label] for clip in all_notes if clip.splits[task] == split}

    for task, label, values in (("inst", "pitch", {str(p) for p in PITCHES}), ("pitch", "instrument", set(TIMBRES))):
        parts = [met(task, label, split) for split in SPLITS]
        assert set.union(*parts) == values
        assert sum(map(len, parts)) == len(values), "a pitch (an instrument) must be in one split only"


def test_statistics_of_log_mels_tell_the_sounds_apart(all_sounds):
    """The sounds are a task that can be learnt: eight classes, chance 12.5 %."""

    def features(split):
        chosen = [clip for clip in all_sounds if clip.splits["env"] == split]
        mels = [np.log(librosa.feature.melspectrogram(y=c.wave, sr=16_000, n_mels=40) + 1e-8) for c in chosen]
        return [np.concatenate([m.mean(1), m.std(1)]) for m in mels], [c.labels["sound"] for c in chosen]

    (train, labels), (test, expected) = features("train"), features("test")
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=500).fit(scaler.transform(train), labels)
    assert model.score(scaler.transform(test), expected) > 0.8


def test_groups_of_tasks():
    assert [task.name for task in choose("sound")] == ["env", "inst", "pitch"]
    assert len(choose("all")) == 10
    assert all(task.superb for task in choose("all"))
    assert {task.name for task in choose("all,sound")} == set(TASKS)
