"""The figures of the sample corpus's card: the measures themselves are right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from torchaudio.functional import edit_distance as reference_distance

from codecssl.superb.sample import measure


def test_edit_distance_equals_that_of_torchaudio() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        one, other = (list("".join(rng.choice(list("abc"), rng.integers(0, 9)))) for _ in range(2))
        assert measure.edit_distance(one, other) == reference_distance(one, other)


@pytest.fixture
def tones(tmp_path: Path) -> measure.SampleCorpus:
    """Sines: a spectrum determines `pitch`, but not `coin`."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(60):
        high = index % 2
        wave = np.sin(2 * np.pi * (300 + 1500 * high) * np.arange(3200) / 16_000) * rng.uniform(0.1, 0.5)
        soundfile.write(tmp_path / f"{index}.wav", wave, 16_000)
        split = "train" if index < 40 else "test"
        coin = str(rng.integers(2))
        labels = {"pitch": str(high), "coin": coin, "both": {"pitch": str(high), "coin": coin}}
        lines.append(json.dumps({"path": f"{index}.wav", "splits": {"t": split}, **labels}) + "\n")
    (tmp_path / "manifest.jsonl").write_text("".join(lines))
    return measure.SampleCorpus(tmp_path)


def test_accuracy_is_high_only_where_labels_are_audible(tones: measure.SampleCorpus) -> None:
    assert measure.accuracy(tones, "t", "pitch") == (0.5, 1.0)
    assert 0.2 < measure.accuracy(tones, "t", "coin")[1] < 0.8
    # All of a dict label must be right: one slot is audible, the other is a coin.
    assert measure.accuracy(tones, "t", "both")[1] < 0.85


def test_a_missing_folder_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure.main([str(tmp_path / "absent")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
