import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codecssl.pretrain.monitor.telemetry import Telemetry, read_rows


def row(step: int, loss: float, split: str = "train") -> dict[str, object]:
    speed = {"lr": 1.0, "grad_norm": 1.0, "frames_per_second": 1.0, "audio_hours_per_hour": 1.0}
    return {
        "split": split,
        "step": step,
        "loss": loss,
        "accuracy": [0.5, 0.25],
        "predicted_perplexity": [3.0, 4.0],
        **speed,
        "data_wait_percent": 0.0,
        "seconds_left": 3661.0,
    }


def test_a_resumed_run_logs_no_step_twice(tmp_path: Path) -> None:
    first = Telemetry(tmp_path, step=0)
    for step in range(1, 6):
        first.log(row(step, loss=1.0))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')  # cut short by a crash
    second = Telemetry(tmp_path, step=3)
    for step in range(4, 7):
        second.log(row(step, loss=2.0))
    second.draw()
    second.close()
    reported = [(r["step"], r["loss"]) for r in read_rows(tmp_path / "metrics.jsonl")]
    assert reported == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == reported
    assert [e.value for e in board.Scalars("train/accuracy/1")] == [0.25] * 6


def test_curves_are_a_picture_also_of_an_empty_run(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, step=0)
    telemetry.draw()
    empty = (tmp_path / "curves.png").read_bytes()
    telemetry.log(row(1, 3.0))
    telemetry.log(row(1, 3.0, split="valid"))
    telemetry.draw()
    telemetry.close()
    drawn = (tmp_path / "curves.png").read_bytes()
    assert empty.startswith(b"\x89PNG")
    assert drawn.startswith(b"\x89PNG")
    assert drawn != empty


def test_the_console_line_has_the_main_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Telemetry(tmp_path, step=0).log(row(7, 3.25))
    printed = capsys.readouterr().out
    for part in ("step      7", "loss 3.2500", "accuracy 37.50 % (codebook 0: 50.00 %)", "left 1:01:01"):
        assert part in printed
