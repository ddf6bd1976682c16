"""ABX: distances and errors equal those of plain loops; layers are ranked by them."""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import soundfile

from codecssl.superb.cli import main
from codecssl.superb.probe.abx import abx_error, distance_matrix
from codecssl.tokenize.common.errors import UserError


def warped(a: np.ndarray, b: np.ndarray) -> float:
    """Fill the table cell by cell and follow the path back from the end."""
    angle = np.array([[np.arccos(np.clip(x @ y / np.linalg.norm(x) / np.linalg.norm(y), -1, 1)) / np.pi for y in b]
                      for x in a])  # fmt: skip
    cost = np.full((len(a) + 1, len(b) + 1), np.inf)
    cost[0, 0] = 0
    for i in range(len(a)):
        for j in range(len(b)):
            cost[i + 1, j + 1] = angle[i, j] + min(cost[i, j], cost[i, j + 1], cost[i + 1, j])
    i, j, steps = len(a), len(b), 0
    while i and j:
        steps += 1
        moves = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = min(moves, key=lambda move: cost[move])
    return float(cost[-1, -1] / steps)


def test_distances_are_those_of_a_loop() -> None:
    random = np.random.default_rng(0)
    clips = [random.standard_normal((n, 5)) for n in (4, 9, 1, 6)]
    found = distance_matrix(clips)
    for i, j in permutations(range(4), 2):
        assert found[i, j] == pytest.approx(warped(clips[min(i, j)], clips[max(i, j)]), abs=1e-9)
    assert not found.diagonal().any()


@pytest.mark.parametrize("with_speakers", [False, True])
def test_errors_equal_those_of_a_loop_over_triples(with_speakers: bool) -> None:
    random = np.random.default_rng(1)
    labels, speakers = list("aabbccab"), list("stststts")
    distances = random.integers(0, 4, (8, 8)).astype(float)  # with ties
    cells: dict[tuple[str, ...], list[float]] = {}
    for x, a, b in permutations(range(8), 3):
        if labels[x] != labels[a] or labels[x] == labels[b]:
            continue
        if with_speakers and (speakers[a] != speakers[b] or speakers[x] == speakers[a]):
            continue
        key = (labels[a], labels[b], *([speakers[a], speakers[x]] if with_speakers else []))
        d = distances[x, a] - distances[x, b]
        cells.setdefault(key, []).append(1.0 if d > 0 else 0.5 if d == 0 else 0.0)
    pairs: dict[tuple[str, ...], list[float]] = {}
    for key, values in cells.items():
        pairs.setdefault(key[:2], []).append(float(np.mean(values)))
    expected = np.mean([np.mean(values) for values in pairs.values()])
    assert abx_error(distances, labels, speakers if with_speakers else None) == pytest.approx(expected)


def test_one_class_is_an_error() -> None:
    with pytest.raises(UserError, match="ABX: no triple"):
        abx_error(np.zeros((3, 3)), ["a", "a", "a"])


def test_the_command_keeps_results_and_draws_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random, lines = np.random.default_rng(0), []
    for i in range(12):
        tone = np.sin(np.arange(2_400) * (0.1 if i % 2 else 0.9)) * 0.3
        soundfile.write(tmp_path / f"{i}.wav", tone + 0.01 * random.standard_normal(2_400), 16_000)
        row = {"path": f"{i}.wav", "task": "digits", "label": str(i % 2), "speaker": f"s{i // 4}"}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "manifest.jsonl").write_text("".join(lines))
    output = tmp_path / "out"
    command = ["abx", "--data", str(tmp_path / "manifest.jsonl"), "--upstream", "logmel", "--output", str(output)]
    assert main(command) == 0
    assert "logmel  ABX error %: 0.0" in capsys.readouterr().out
    [result] = output.glob("abx/digits/*/result.json")
    result.write_text(result.read_text().replace('"layers": [\n  0.0\n ]', '"layers": [\n  0.25\n ]'))
    assert main(command) == 0
    assert "logmel  ABX error %: 25.0" in capsys.readouterr().out  # read, not computed
    page = (output / "layers.html").read_text()
    assert "ABX error %, digits" in page
    assert "logmel: layer 0, 25" in page
    assert main([*command, "--probe", "none"]) == 1
    assert "--probe none: not in probes" in capsys.readouterr().err
