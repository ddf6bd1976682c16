"""PNMI: equal to scikit-learn's mutual information over the entropy; times select the frames; the command keeps it."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sklearn.metrics import mutual_info_score

from codecssl.superb.cli import main
from codecssl.superb.probe.pnmi import Segment, layer_pnmi, segments_of
from codecssl.tokenize.common.errors import UserError


def test_pnmi_equals_that_of_scikit_learn() -> None:
    """Frames lie in five blobs far apart, so that the units are the blobs whatever the seed."""
    random, clips, segments = np.random.default_rng(0), [], list[list[Segment]]()
    blobs, labels = [], []
    for number in range(8):
        blob = random.integers(0, 5, 60)
        clips.append(100.0 * np.eye(5, 3 + 5)[blob] + 0.01 * random.standard_normal((60, 8)))
        rows = [("a", 0.0, 1 / 6), ("b", 1 / 6, 0.5), ("c" if number < 4 else "a", 0.75, 1.0)]  # 30 to 45: no label
        segments.append(rows)
        if number % 2:  # the measured half
            for label, start, end in rows:
                part = blob[round(60 * start) : round(60 * end)]
                blobs += part.tolist()
                labels += [label] * len(part)
    counts = np.unique(labels, return_counts=True)[1] / len(labels)
    expected = mutual_info_score(labels, blobs) / -(counts * np.log(counts)).sum()
    assert layer_pnmi(clips, segments, clusters=5, seed=0) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected < 0.3


def test_labels_have_times_or_are_classes() -> None:
    row = {"phones": [["AH", 0.5, 1.0], ["T", 1.0, 2.0]], "label": "x"}
    assert segments_of(row, "x", 4.0) == [("AH", 0.125, 0.25), ("T", 0.25, 0.5)]
    assert segments_of({"phones": ["AH", "T"]}, "x", 4.0) == [("x", 0.0, 1.0)]
    assert segments_of({}, "x", 4.0) == [("x", 0.0, 1.0)]


def test_too_few_frames() -> None:
    with pytest.raises(UserError, match="--clusters 9: only 8 frames to cluster"):
        layer_pnmi([np.zeros((8, 2)), np.zeros((8, 2))], [[("a", 0, 1)]] * 2, clusters=9, seed=0)
    with pytest.raises(UserError, match="no labelled frame"):
        layer_pnmi([np.eye(8)], [[("a", 0, 1)]], clusters=2, seed=0)


@pytest.mark.parametrize("right", [True, False])
def test_the_command_measures_phones_by_their_times(
    right: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each clip is a low and a high tone; with times that cut across the tones, units say little about phones."""
    lines = []
    for i in range(6):
        low, high = (np.sin(np.arange(n) * step) * 0.3 for n, step in ((3_200, 0.1), (4_800, 0.9)))
        soundfile.write(tmp_path / f"{i}.wav", np.concatenate([low, high]), 16_000)
        cut = 0.2 if right else 0.35
        phones = [["L", 0, cut], ["H", cut, 0.5]] if right else [["L", 0.25, cut], ["H", cut, 0.45]]
        lines.append(json.dumps({"path": f"{i}.wav", "task": "digits", "label": "0", "phones": phones}) + "\n")
    (tmp_path / "manifest.jsonl").write_text("".join(lines))
    (tmp_path / "probes.yaml").write_text("digits: {task: digits, label: label}\n")
    output = tmp_path / "out"
    command = ["pnmi", "--data", str(tmp_path / "manifest.jsonl"), "--probes", str(tmp_path / "probes.yaml")]
    command += ["--upstream", "logmel", "--output", str(output), "--clusters", "4"]
    assert main(command) == 0
    [result] = output.glob("pnmi/digits/*/result.json")
    [value] = json.loads(result.read_text())["layers"]
    assert (value > 0.8) if right else (value < 0.2)
    assert f"logmel  PNMI %: {100 * value:.1f}" in capsys.readouterr().out
    kept = json.loads(result.read_text()) | {"layers": [0.25]}
    result.write_text(json.dumps(kept))
    assert main(command) == 0
    assert "logmel  PNMI %: 25.0" in capsys.readouterr().out  # read, not computed
    page = (output / "layers.html").read_text()
    assert "PNMI %, digits" in page
    assert "logmel: layer 0, 25" in page
