"""DER against a loop over frames of 10 ms and every matching of speakers."""

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codecssl.superb.patches.der import error_rate, read_rttm, score_files

pytest.importorskip("pyannote.metrics", reason="pyannote.metrics is not installed")
Turns = list[tuple[str, float, float]]


def frames(turns: Turns, names: list[str], length: int) -> np.ndarray:
    active = np.zeros((len(names), length), bool)
    for name, start, end in turns:
        active[names.index(name), round(100 * start) : round(100 * end)] = True
    return active


def naive(reference: Turns, hypothesis: Turns) -> tuple[int, int]:
    """(errors, reference speaker time) in frames, by the best one-to-one matching."""
    sides = [sorted({name for name, _, _ in turns}) for turns in (reference, hypothesis)]
    size = max(len(names) for names in sides)
    for k, names in enumerate(sides):
        names += [f"none{k}{i}" for i in range(size - len(names))]
    one, other = (frames(t, n, 1000) for t, n in zip((reference, hypothesis), sides, strict=True))
    best = None
    for order in permutations(range(size)):
        correct = (one & other[list(order)]).sum(0)
        errors = np.maximum(one.sum(0), other.sum(0)) - correct
        best = int(errors.sum()) if best is None else min(best, int(errors.sum()))
    assert best is not None
    return best, int(one.sum())


def some_turns(draw: Any, speakers: int) -> Turns:
    """Draw turns on a grid of 10 ms. Turns may overlap, also those of one speaker."""
    turns = []
    for _ in range(draw.integers(1, 8)):
        start = int(draw.integers(0, 800))
        turns.append((f"s{draw.integers(speakers)}", start / 100, (start + int(draw.integers(5, 200))) / 100))
    return turns


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_frame_error_of_the_best_matching(seed: int) -> None:
    draw = np.random.default_rng(seed)
    pairs = {f"r{i}": (some_turns(draw, 2), some_turns(draw, 3)) for i in range(3)}
    errors, total = (sum(x) for x in zip(*(naive(*pair) for pair in pairs.values()), strict=True))
    ours = error_rate({k: v[0] for k, v in pairs.items()}, {k: v[1] for k, v in pairs.items()})
    assert ours == pytest.approx(errors / total, abs=1e-9)


def test_edges() -> None:
    turns = {"r": [("a", 0.0, 1.0), ("b", 0.5, 2.0)]}
    assert error_rate(turns, {"r": [("y", 0.0, 1.0), ("x", 0.5, 2.0)]}) == 0
    assert error_rate(turns, {}) == 1
    assert error_rate(turns, {"r": [("x", 0.0, 0.0)]}) == 1


def test_files(tmp_path: Path) -> None:
    line = "SPEAKER {} 1 {:7.2f} {:7.2f} <NA> <NA> {} <NA>\n"
    (tmp_path / "ref").write_text(line.format("r", 0, 2, "a") + line.format("r", 1, 1, "b"))
    (tmp_path / "hyp").write_text(line.format("r", 0, 2, "r_0"))
    assert read_rttm(tmp_path / "ref") == {"r": [("a", 0.0, 2.0), ("b", 1.0, 2.0)]}
    percent = score_files(None, str(tmp_path / "hyp"), str(tmp_path / "ref"), str(tmp_path / "result"))
    assert percent == pytest.approx(100 / 3)
    from s3prl.problem.diarization.util import get_overall_der_from_dscore_file

    assert get_overall_der_from_dscore_file(str(tmp_path / "result")) == pytest.approx(33.3333)
