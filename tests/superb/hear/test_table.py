"""The table of all suites, and the run that fills it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codecssl.superb.cli import main
from codecssl.superb.hear.table import write_table
from codecssl.superb.hear.task_folder import Clip, write_task


def put(output: Path, upstream: str, value: float, **more: Any) -> None:
    row = {
        "upstream": {"name": upstream, "kind": more.pop("kind", "model")},
        "layer": None,
        "task": "two",
        "metrics": ["top1_acc"],
        "folds": [{}] * 4,
    }
    row |= {"scores": {"top1_acc": value}, "deviations": {"top1_acc": 0.021}, "clips": 100, **more}
    path = output / row.get("suite", "hear") / "two" / upstream / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(row))


def test_only_clear_winners_are_bold(tmp_path: Path) -> None:
    """80 against 70 of 100 clips: the error of the difference is sqrt(.16 / 100 + .21 / 100) = 6.1 points."""
    for name, second in (("near", 0.69), ("clear", 0.67)):
        put(tmp_path / name, "a", 0.80)
        put(tmp_path / name, "b", second)
        put(tmp_path / name, "c", 0.10)
    assert "| hear | two | top1_acc | 80.0 ± 2.1 | 69.0 ± 2.1 |" in write_table(tmp_path / "near").read_text()
    assert "| hear | two | top1_acc | **80.0 ± 2.1** | 67.0 ± 2.1 |" in write_table(tmp_path / "clear").read_text()
    put(tmp_path / "clear", "d", 0.3, suite="x-ares", deviations={})
    assert "| x-ares | two | top1_acc |  |  |  | 30.0 |" in write_table(tmp_path / "clear").read_text()


def test_models_come_before_baselines(tmp_path: Path) -> None:
    for name, kind in (("logmel", "logmel"), ("codes:c", "codes"), ("random:z", "random"), ("z", "model")):
        put(tmp_path, name, 0.5, kind=kind)
    header = write_table(tmp_path).read_text().splitlines()[2]
    assert header == "| suite | task | metric | z | logmel | codes:c | random:z |"


def test_bad_names_of_suites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["hear", str(tmp_path), "--upstream", "logmel", "--output", str(tmp_path / "out"), "--suites"]
    assert main([*line, "hear,xares"]) == 1
    assert "--suites xares: give hear, x-ares, maeb" in capsys.readouterr().err


def test_a_missing_suite_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = ["hear", str(tmp_path), "--upstream", "logmel", "--output", str(tmp_path / "out"), "--suites", "maeb"]
    assert main(line) == 1
    assert "--suites maeb: not installed; pip install codecssl[mteb]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_suites_take_the_same_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ("xares", "mteb"):
        pytest.importorskip(extra, reason=f"pip install codecssl[{extra}]")
    random = np.random.default_rng(0)
    clips = [
        Clip(
            file=f"{i}.wav",
            split=f"fold{i % 3:02d}",
            wave=(np.sin(np.arange(2_000) * (0.05 + 0.3 * (i % 2)) + random.random()) / 2).astype(np.float32),
            labels=["low" if i % 2 == 0 else "high"],
        )
        for i in range(24)
    ]
    kind = {"embedding_type": "scene", "prediction_type": "multiclass", "split_mode": "presplit_kfold", "nfolds": 3}
    folder = write_task(tmp_path, {"task_name": "two", "version": "1", "evaluation": ["top1_acc"], **kind}, clips)
    line = ["hear", str(folder), "--upstream", "logmel", "--output", str(tmp_path / "out"), "--grid-points", "1"]
    assert main([*line, "--suites", "hear,x-ares,maeb"]) == 0
    table = (tmp_path / "out" / "hear.md").read_text().splitlines()
    rows = {
        tuple(cell.strip() for cell in row.split("|")[1:4]): row.split("|")[4].strip()
        for row in table[4:]
        if row.startswith("|")
    }
    assert set(rows) >= {("x-ares", "two", "mlp"), ("x-ares", "two", "knn"), ("maeb", "two", "accuracy")}
    assert rows["x-ares", "two", "knn"] == "100.0"
    assert rows["maeb", "two", "accuracy"] == "100.0 ± 0.0"
    assert rows["hear", "two", "top1_acc"].startswith("100.0")
    results = sorted((tmp_path / "out").glob("*/two/*/result.json"))
    times = [path.stat().st_mtime_ns for path in results]
    assert len(times) == 3
    assert main([*line, "--suites", "hear,x-ares,maeb"]) == 0
    assert [path.stat().st_mtime_ns for path in results] == times, "finished results are not computed again"
