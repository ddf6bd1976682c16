"""Status from the files alone: rows and notes of ranks are written by hand, so that every answer is known."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from codecssl.configs.load import to_yaml
from codecssl.pretrain.cli import main
from codecssl.pretrain.config import OptimConfig, RunConfig
from codecssl.pretrain.monitor.status import status


def beat(
    run: Path, rank: int, *, age: float = 5.0, doing: str = "in step 41", since: float = 6.0, **other: Any
) -> None:
    """Write the status file of a rank, `age` seconds old, with an activity that has lasted `since` seconds."""
    now = time.time()
    row = {"state": "running", "doing": doing, "since": now - since, "time": now - age, "started": now - 500.0,
           "host": f"node{rank // 2}", "job": "17", "restarts": 1, **other}  # fmt: skip
    (run / "ranks").mkdir(exist_ok=True)
    (run / f"ranks/{rank:05d}.json").write_text(json.dumps(row))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 100 steps at its 40th, at 2 s a step."""
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig(optim=OptimConfig(steps=100))))
    rows = [
        {"split": "train", "step": step, "loss": 3.0, "accuracy": [0.5], "lr": 1e-3, "grad_norm": 1.0,
         "frames_per_second": 1000.0 if step > 10 else 1.0, "audio_hours_per_hour": 20.0, "data_wait_percent": 3.0,
         "step_seconds": 2.0, "seconds_left": 0.0}
        for step in range(5, 45, 5)
    ]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"split": "tra')  # being written
    os.utime(path, (time.time() - 50, time.time() - 50))
    return tmp_path


def test_rate_time_left_and_who_runs_where(run: Path) -> None:
    for rank in range(4):
        beat(run, rank)
    found = status(run)
    assert (found["state"], found["step"], found["steps"], found["step_saved"]) == ("running", 40, 100, 0)
    assert (found["frames_per_second"], found["seconds_left"]) == (1000.0, 120.0)
    assert (found["ranks"], found["hosts"], found["job"], found["restarts"]) == (4, ["node0", "node1"], "17", 1)
    assert (found["late"], found["gone"], found["doing"]) == ([], [], "in step 41")
    assert 5.0 <= found["age_seconds"] < 50.0, "the status files must be newer than the metrics"


def test_the_rank_that_others_wait_for_is_named(run: Path) -> None:
    for rank in range(4):
        beat(run, rank, doing="waiting for the other ranks before step 41", since=40.0)
    beat(run, 2, doing="waiting for the data of step 41", since=45.0)
    [late] = status(run)["late"]
    assert (late["rank"], late["host"], late["doing"]) == (2, "node1", "waiting for the data of step 41")
    assert late["seconds"] == pytest.approx(45.0, abs=30.0)


def test_waiting_for_a_moment_is_no_lateness(run: Path) -> None:
    for rank in range(4):
        beat(run, rank, doing="waiting for the other ranks before step 41", since=9.0)
    beat(run, 2, doing="waiting for the data of step 41", since=9.0)
    assert status(run)["late"] == []


def test_a_rank_that_ended_without_a_word_is_gone(run: Path) -> None:
    for rank in range(4):
        beat(run, rank, age=300.0 if rank == 3 else 5.0)
    found = status(run)
    assert (found["state"], [each["rank"] for each in found["gone"]]) == ("gone", [3])


@pytest.mark.parametrize("state", ["stopped", "failed", "stuck", "ended"])
def test_status_shows_how_a_run_ended_long_ago(run: Path, state: str) -> None:
    for rank in range(2):
        beat(run, rank, age=9_000.0, state=state, started=time.time() - 9_500)
    assert status(run)["state"] == state
    beat(run, 2, age=9_000.0)
    assert status(run)["state"] == state, "a rank that was killed without a report must not count"


def test_ranks_of_an_earlier_start_with_more_of_them_do_not_count(run: Path) -> None:
    beat(run, 0)
    beat(run, 1, age=4_000.0)
    found = status(run)
    assert (found["state"], found["ranks"]) == ("running", 1)


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig()))
    found = status(tmp_path)
    assert (found["state"], found["step"], found["frames_per_second"]) == ("not started", 0, None)


def test_the_command_prints_lines_or_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beat(run, 0)
    assert main(["status", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "running at step 40; step 0 of 100 saved, 0 checkpoint(s)" in printed
    assert "1000 frames/s" in printed
    assert "0:02:00 left" in printed
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 40
