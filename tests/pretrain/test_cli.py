import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from codecssl.pretrain import run as run_module
from codecssl.pretrain.cli import main
from codecssl.pretrain.engine import checkpoint
from codecssl.pretrain.monitor import status as status_module
from codecssl.pretrain.monitor.telemetry import MetricsRow, Telemetry, read_rows

Make = Callable[..., Path]
SMALL = [
    *("--model.dim", "32", "--model.layers", "1", "--model.heads", "2", "--model.ffn_dim", "32"),
    *("--model.embedding_init", "random", "--data.batch_frames", "400", "--data.crop_frames", "60"),
    *("--log.log_every", "1", "--log.checkpoint_every", "2", "--log.valid_every", "3"),
]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1, f"not one line: {err!r}"
    assert err.startswith("error: ")
    return err


def test_train_status_export(make_shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = str(tmp_path / "run"), str(tmp_path / "model")
    dirs = [str(make_shards("it's a", seed=0)), str(make_shards("b, c", seed=1))]
    arguments = ["run", "codec2vec_tiny_codes", "--data", *dirs, "--output", run, *SMALL, "--optim.steps=3"]
    assert main(arguments) == 0
    assert main(arguments) == 0, "a finished run must not be an error"
    assert "all 3 steps are done" in capsys.readouterr().out
    assert main(["status", run]) == 0
    said = capsys.readouterr().out
    assert "step 3 of 3 saved, 2 checkpoint(s)" in said
    assert "valid" in said
    assert main(["export", run, "--output", model]) == 0
    files = {"model.safetensors", "config.json", "README.md", "curves.png", "sources.bin"}
    assert {path.name for path in Path(model).iterdir()} == files


def test_mistakes_are_one_line_and_exit_1(
    make_shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, out = ["run", "codec2vec_tiny_codes"], ["--output", str(tmp_path / "run")]
    data = ["--data", str(make_shards())]
    assert main([*tiny, *data, *out, "--optim.lrr", "1"]) == 1
    assert "unknown key 'optim.lrr'; did you mean 'optim.lr'?" in error_line(capsys)
    assert main(["run", "--optim.steps", "x", "codec2vec_tiny_codes", *data, *out]) == 1, (
        "options must be accepted in any order"
    )
    assert "key \"optim.steps\": Expected a <class 'int'>" in error_line(capsys)
    assert main([*tiny, *data, "--otput", "here"]) == 1
    assert "option --otput: unknown; did you mean --output?" in error_line(capsys)
    assert main([*tiny, *data, *out, "--data.weights", "[-1]"]) == 1
    assert "data.weights: -1.0, must be at least 0" in error_line(capsys)
    assert main([*tiny, *data, *out, "--optim.betas", "[0.9, 1.2]"]) == 1
    assert "optim.betas: 1.2, must be at least 0 and below 1" in error_line(capsys)
    rotary = ["--model.positions", "rotary", "--model.rotary_max_frames", "99", "--data.crop_seconds", "5"]
    assert main([*tiny, *data, *out, *rotary]) == 1
    assert "data.crop_frames: 250, must be at most model.rotary_max_frames (99)" in error_line(capsys)
    assert main([*tiny, *data, *out, "--data.labels", str(tmp_path)]) == 1
    assert "data.labels: given, but objective.target is codes" in error_line(capsys)
    assert main([*tiny, *data, str(make_shards("other", codec="another")), *out, *SMALL]) == 1
    assert "train on shards of one codec" in error_line(capsys)
    assert main([*tiny, *out]) == 1
    assert "add --data DIR" in error_line(capsys)
    assert main([*tiny, *data]) == 1
    assert "--output RUN" in error_line(capsys)
    assert main([*tiny, "--data", str(tmp_path / "nowhere"), *out]) == 1
    assert "nowhere" in error_line(capsys)
    assert main(["status", str(tmp_path)]) == 1
    assert "not a run folder" in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_wherever_it_strikes(
    make_shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Telemetry, row: MetricsRow) -> None:
        Path("/dev/full").write_text("row")

    monkeypatch.setattr(Telemetry, "log", full)
    run = ["run", "codec2vec_tiny_codes", "--data", str(make_shards()), "--output", str(tmp_path / "run"), *SMALL]
    run.append("--optim.steps=2")
    assert main(run) == 1
    assert "No space left on device; make it readable, or make room" in error_line(capsys)
    monkeypatch.undo()
    assert main(run) == 0
    capsys.readouterr()
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: Path("/dev/full").write_text("weights"))
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 1
    assert f"{tmp_path / 'model'}: disk full; make room" in error_line(capsys)


def test_a_file_system_that_refuses_and_an_interrupt_are_one_line(
    make_shards: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["run", "codec2vec_tiny_codes", "--data", str(make_shards()), "--output", str(tmp_path / "run"), *SMALL]
    assert main([*run, "--optim.steps=1"]) == 0
    capsys.readouterr()
    (tmp_path / "file").touch()
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "file")]) == 1
    assert f"error: {tmp_path / 'file'}: Not a directory" in error_line(capsys)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run", interrupted)
    assert main(run) == 130
    assert "interrupted; the same command resumes from the newest checkpoint" in error_line(capsys)
    monkeypatch.setattr(status_module, "status", interrupted)
    assert main(["status", str(tmp_path / "run")]) == 130
    assert error_line(capsys) == "error: interrupted\n", "only a training run may promise to resume"


def test_wrong_usage_exits_2() -> None:
    for arguments in ([], ["train"], ["status", "run", "--what"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_print_config_is_the_whole_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "codec2vec_tiny_codes", "--print_config", "--optim.steps", "7"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optim"]["steps"] == 7
    assert printed["mask"] == {
        "kind": "spans", "starts_per_second": 4.0, "start_probability": 0.0, "fraction": 0.5, "span_seconds": 0.2,
        "span_frames": 0,
    }  # fmt: skip


def test_nothing_heavy_is_imported_before_the_arguments_are_read() -> None:
    code = (
        "import sys, codecssl.pretrain.cli; "
        "print([m for m in ('torch', 'deepspeed', 'fairseq2', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_the_same_command_resumes_a_killed_run(make_shards: Make, tmp_path: Path) -> None:
    """kill -9 at an arbitrary moment. The finished run has every step once."""
    run, shards = tmp_path / "run", make_shards()
    command = [
        sys.executable,
        "-m",
        "codecssl.pretrain",
        "run",
        "codec2vec_tiny_codes",
        "--data",
        str(shards),
    ]
    command += ["--output", str(run), *SMALL, "--optim.steps=60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not checkpoint.whole(run / "checkpoints"):
        assert process.poll() is None
        assert time.monotonic() < deadline, "must write a checkpoint within four minutes"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(command[3:]) == 0
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl") if row["split"] == "train"]
    assert steps == list(range(1, 61)), "each step must occur once"
