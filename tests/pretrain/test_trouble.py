"""Damaged files, full disks and signals during a run.

The run waits or saves, names the cause, and exits with the right code.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from codecssl.configs.load import to_yaml
from codecssl.pretrain.cli import main
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.engine import checkpoint
from codecssl.pretrain.export.export import export, load_pretrained
from codecssl.pretrain.labels.label import LabelConfig, label
from codecssl.pretrain.monitor.telemetry import read_rows
from codecssl.pretrain.run import run
from codecssl.pretrain.run_folder import read_changes
from codecssl.pretrain.training import Training
from codecssl.tokenize.common.errors import TransientError, UserError

Config = Callable[..., RunConfig]
Make = Callable[..., Path]


@pytest.fixture
def shards(make_shards: Make) -> Path:
    """Write many shards, most of which are opened late in a run."""
    return make_shards(count=120, per_shard=1)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(folder / "metrics.jsonl") if row["split"] == "train"]


def away_at(step: int, monkeypatch: pytest.MonkeyPatch, shards: Path, seconds: float | None) -> None:
    """Rename the shards before an update, and back after some seconds or never."""
    update = Training.update

    def renamed(self: Training, number: int, *arguments: Any, **options: Any) -> Any:
        if number == step and (shards / "shards").exists():
            (shards / "shards").rename(shards / "away")
            if seconds is not None:
                threading.Timer(seconds, lambda: (shards / "away").rename(shards / "shards")).start()
        return update(self, number, *arguments, **options)

    monkeypatch.setattr(Training, "update", renamed)


def test_a_disk_that_is_away_for_a_second_changes_nothing(
    shards: Path, small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(shards, data={"prefetch": 1, "workers": 1}, optim={"steps": 12})
    run(config, tmp_path / "undisturbed")
    away_at(2, monkeypatch, shards, 1.0)
    run(config, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


def test_a_disk_that_stays_away_ends_the_run_saved_with_70_and_the_cause(
    shards: Path, small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    log = {"retry_seconds": 0.3, "checkpoint_every": 100}
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(small_config(shards, data={"prefetch": 1, "workers": 1}, log=log)))
    command = ["run", str(file), "--data", str(shards), "--optim.steps=12", "--output"]
    assert main([*command, str(tmp_path / "undisturbed")]) == 0
    with monkeypatch.context() as patch:
        away_at(2, patch, shards, None)
        capsys.readouterr()
        assert main([*command, str(tmp_path / "run")]) == 70
    [line] = capsys.readouterr().err.splitlines()
    assert "No such file or directory, tried for 0.3 s; bring the disk back" in line
    [saved] = checkpoint.whole(tmp_path / "run" / "checkpoints")
    step = checkpoint.read_state(saved)["step"]
    assert step >= 2, "the work of all previous steps must be kept"
    assert line.endswith(f"step {step} is saved")
    shutil.move(shards, tmp_path / "unmounted")  # the whole folder: a start waits too, and is worth another try
    assert main([*command, str(tmp_path / "run")]) == 70
    assert f"error: {shards}: No such file or directory, tried for 0.3 s" in capsys.readouterr().err
    shutil.move(tmp_path / "unmounted", shards)
    (shards / "away").rename(shards / "shards")
    assert main([*command, str(tmp_path / "run")]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


def test_a_folder_that_never_was_there_is_not_waited_for(small_config: Config, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="not a folder of token shards") as told:
        run(small_config(tmp_path / "typo"), tmp_path / "run")
    assert not isinstance(told.value, TransientError)
    assert time.monotonic() - began < 60


def test_a_validation_that_cannot_be_read_saves_first(
    shards: Path, make_shards: Make, small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards("valid", count=9, seed=3, per_shard=1)
    away_at(3, monkeypatch, tmp_path / "valid", None)
    config = small_config(
        shards, data={"valid_dirs": [str(tmp_path / "valid")]}, optim={"steps": 8},
        log={"valid_every": 5, "checkpoint_every": 100, "retry_seconds": 0.2},
    )  # fmt: skip
    with pytest.raises(TransientError, match="valid/shards/.*step 5 is saved"):
        run(config, tmp_path / "run")
    assert [path.name for path in checkpoint.whole(tmp_path / "run" / "checkpoints")] == ["step-00000005"]


def test_a_damaged_shard_stops_a_run_instead_of_training_on_garbage(
    shards: Path, small_config: Config, tmp_path: Path
) -> None:
    """A block XORed throughout: every code is a valid one, and another one."""
    for path in sorted((shards / "shards").glob("*.tar"))[::10]:
        place = json.loads(path.with_suffix(".json").read_text())["blocks"][0]
        content = np.frombuffer(path.read_bytes(), np.uint8).copy()
        content[place["codes_offset"] : place["codes_offset"] + place["codes_bytes"]] ^= 0x11
        path.write_bytes(content.tobytes())
    with pytest.raises(UserError, match=r"\.tar: the codes of utterances \d+ to \d+ are damaged.*verify") as told:
        run(small_config(shards), tmp_path / "run")
    assert not isinstance(told.value, TransientError)


def test_the_output_disk_may_be_away_for_a_moment(
    shards: Path, small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of the metrics and a checkpoint are due during that time."""
    config = small_config(shards, optim={"steps": 6}, log={"log_every": 1, "checkpoint_every": 3, "valid_every": 100})
    run(config, tmp_path / "undisturbed")
    update, moved = Training.update, []

    def renamed(self: Training, number: int, *arguments: Any, **options: Any) -> Any:
        if number == 2 and not moved:
            moved.append((tmp_path / "run").rename(tmp_path / "unmounted"))
            threading.Timer(1.0, lambda: (tmp_path / "unmounted").rename(tmp_path / "run")).start()
        return update(self, number, *arguments, **options)

    monkeypatch.setattr(Training, "update", renamed)
    run(config, tmp_path / "run")
    assert moved
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")
    assert len(checkpoint.whole(tmp_path / "run" / "checkpoints")) == 2


# ---------------------------------------------------------------- paths and settings


def test_a_moved_disk_and_other_spellings_resume(
    shards: Path, small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders are identified by fingerprints and weights by sha256, not by the spelling of paths."""
    monkeypatch.chdir(tmp_path)
    small = small_config(shards, optim={"steps": 1})
    run(small, tmp_path / "first")
    export(tmp_path / "first", tmp_path / "m1")
    made = small_config(Path("shards"), optim={"steps": 4, "start_from": "m1"}, log={"checkpoint_every": 2})
    run(made, tmp_path / "run")
    (tmp_path / "disk2").mkdir()
    shutil.move(shards, tmp_path / "disk2" / "shards")
    shutil.move(tmp_path / "m1", tmp_path / "disk2" / "m1")
    start = str(tmp_path / "disk2/m1/")
    run(small_config(tmp_path / "disk2/shards", optim={"steps": 4, "start_from": start}), tmp_path / "run")
    shutil.rmtree(tmp_path / "disk2/m1")
    run(small_config(Path("disk2/./shards"), optim={"steps": 4, "start_from": "./m1"}), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "m2")
    with pytest.raises(UserError, match="was made with another optim.start_from"):
        run(small_config(Path("disk2/shards"), optim={"steps": 4, "start_from": "m2"}), tmp_path / "run")
    with pytest.raises(UserError, match="was made with another optim.start_from"):
        run(small_config(Path("disk2/shards"), optim={"steps": 4}), tmp_path / "run")


def test_lr_clip_norm_and_steps_may_change_and_are_recorded(
    shards: Path, small_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    often = {"log_every": 1, "checkpoint_every": 2, "valid_every": 100}
    constant = {"schedule": "constant", "warmup_fraction": 0.0}
    run(small_config(shards, optim={"steps": 4, "lr": 1e-3, **constant}, log=often), tmp_path / "run")
    capsys.readouterr()
    more = {"steps": 7, "lr": 2e-4, "clip_norm": 0.5, **constant}
    run(small_config(shards, optim=more, log=often), tmp_path / "run")
    said = capsys.readouterr().out
    assert "config: from step 4 on optim.lr is 0.0002, it was 0.001" in said
    lr = {row["step"]: row["lr"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"}
    assert [lr[step] for step in (4, 5, 7)] == pytest.approx([1e-3, 2e-4, 2e-4])
    expected = {"optim.lr": [1e-3, 2e-4], "optim.clip_norm": [1.0, 0.5], "optim.steps": [4, 7]}
    assert {row["key"]: [row["old"], row["new"]] for row in read_changes(tmp_path / "run")} == expected
    assert {row["step"] for row in read_changes(tmp_path / "run")} == {4}
    run(small_config(shards, optim=more, log=often), tmp_path / "run")
    assert len(read_changes(tmp_path / "run")) == 3, "equal settings must not count as a change"
    export(tmp_path / "run", tmp_path / "model")
    assert len(json.loads((tmp_path / "model" / "config.json").read_text())["training"]["changes"]) == 3
    assert "from step 4: `optim.lr` 0.0002, before 0.001" in (tmp_path / "model" / "README.md").read_text()
    run(small_config(shards, optim={**more, "steps": 5}, log=often), tmp_path / "run")  # fewer than are done
    assert "all 5 steps are done" in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with optim.weight_decay 0.01, this run has 0.1"):
        run(small_config(shards, optim={**more, "weight_decay": 0.1}, log=often), tmp_path / "run")


def test_the_advice_after_a_loss_that_is_not_finite_can_be_followed(
    shards: Path, small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = {"log_every": 1, "checkpoint_every": 2, "valid_every": 100}
    update = Training.update

    def broken(self: Training, number: int, *arguments: Any, **options: Any) -> Any:
        loss, *rest = update(self, number, *arguments, **options)
        return (loss * float("nan") if number == 3 and self.config.optim.lr > 1e-3 else loss, *rest)

    monkeypatch.setattr(Training, "update", broken)
    with pytest.raises(UserError, match="step 4: the loss is nan; lower optim.lr"):
        run(small_config(shards, optim={"steps": 6}, log=often), tmp_path / "run")
    run(small_config(shards, optim={"steps": 6, "lr": 1e-3}, log=often), tmp_path / "run")
    assert [(row["step"], row["key"]) for row in read_changes(tmp_path / "run")] == [(2, "optim.lr")]


# ---------------------------------------------------------------- checkpoints, metrics, exports


def test_a_truncated_newest_checkpoint_is_named_and_the_only_one_is_an_error(
    shards: Path, small_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(shards, optim={"steps": 4}, log={"checkpoint_every": 2, "valid_every": 100})
    run(config, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    weights = folder / "step-00000004" / "model.safetensors"
    before = load_file(weights)
    before = {name: value.clone() for name, value in before.items()}
    os.truncate(weights, 1000)
    capsys.readouterr()
    run(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "warning: step-00000004: model.safetensors is corrupt; the run resumes from step-00000002" in said
    assert all((before[name] == value).all() for name, value in load_file(weights).items())
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for path in checkpoint.whole(folder):
        os.truncate(path / "model.safetensors", 1000)
    with pytest.raises(UserError, match="step-00000004: model.safetensors is corrupt, and no older one is complete"):
        run(config, tmp_path / "run")
    shutil.rmtree(folder / "step-00000002")
    (folder / "step-00000004" / "whole.json").unlink()
    with pytest.raises(UserError, match="step-00000004: whole.json is corrupt, and there is no older checkpoint"):
        run(config, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_a_bad_line_of_the_metrics_deletes_no_later_row(
    shards: Path, small_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    often = {"log_every": 1, "checkpoint_every": 2, "valid_every": 100}
    run(small_config(shards, optim={"steps": 6}, log=often), tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole = losses(tmp_path / "run")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:9] + b"\xff\x00" + lines[1][11:]
    lines[3] = b"[1, 2]\n"
    path.write_bytes(b"".join(lines) + b'{"cut sho')
    assert losses(tmp_path / "run") == [whole[0], whole[2], whole[4], whole[5]]
    capsys.readouterr()
    run(small_config(shards, optim={"steps": 7}, log=often), tmp_path / "run")
    assert "metrics.jsonl: line(s) 2, 4 damaged and left out; the rest is kept" in capsys.readouterr().out
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 3, 5, 6, 7]


def test_flipped_bytes_of_an_exported_model_are_found(shards: Path, small_config: Config, tmp_path: Path) -> None:
    run(small_config(shards, optim={"steps": 1}), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    path, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    first = 8 + int.from_bytes(whole[:8], "little")
    for at in rng.integers(first, len(whole), 20).tolist():
        content = bytearray(whole)
        content[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors is missing or damaged \(its sha256 .*export it again"):
            load_pretrained(tmp_path / "model")
    old = json.loads(config.read_text())
    assert len(old.pop("weights_sha256")) == 64
    config.write_text(json.dumps(old))
    load_pretrained(tmp_path / "model")  # an export from before has none
    path.write_bytes(whole)
    load_pretrained(tmp_path / "model")


# ---------------------------------------------------------------- signals and pipes


def _start(tmp_path: Path, config: RunConfig, **options: Any) -> "subprocess.Popen[str]":
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "codecssl.pretrain", "run", str(file), "--output", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **options)


def _listens(process: int, number: signal.Signals) -> bool:
    caught = next(row for row in Path(f"/proc/{process}/status").read_text().splitlines() if row.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def _imports_torch(process: int) -> bool:
    return "libtorch" in Path(f"/proc/{process}/maps").read_text()


def test_a_warning_while_the_run_starts_is_heard(tmp_path: Path, shards: Path, small_config: Config) -> None:
    """Importing torch and DeepSpeed takes seconds; a USR2 in that time ended the process without a word."""
    process = _start(tmp_path, small_config(shards), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (_listens(process.pid, signal.SIGUSR2) and _imports_torch(process.pid)):
        assert time.monotonic() < deadline
        assert process.poll() is None
    assert not (tmp_path / "run").exists()
    process.send_signal(signal.SIGUSR2)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (75, "")
    assert "stopped by SIGUSR2 after step 0" in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR2, 75)])
def test_a_signal_to_the_whole_group_saves_without_a_traceback(
    number: signal.Signals, code: int, tmp_path: Path, shards: Path, small_config: Config
) -> None:
    config = small_config(shards, optim={"steps": 100_000}, log={"log_every": 1, "checkpoint_every": 100_000})
    process = _start(tmp_path, config, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code
    assert err == ("interrupted: saves after this step and stops; Ctrl-C again stops at once\n" if code == 130 else "")
    [saved] = checkpoint.whole(tmp_path / "run" / "checkpoints")
    assert f"stopped by {number.name} after step {checkpoint.read_state(saved)['step']};" in out


def test_a_reader_that_leaves_ends_the_run_saved_with_one_line(
    tmp_path: Path, shards: Path, small_config: Config
) -> None:
    """`codecssl-pretrain run ... | head -3`."""
    config = small_config(shards, optim={"steps": 100_000}, log={"log_every": 1})
    process = _start(tmp_path, config, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=240) == 1
    [line] = err.splitlines()
    assert "error: standard output was closed" in line
    [saved] = checkpoint.whole(tmp_path / "run" / "checkpoints")[-1:]
    assert f"step {checkpoint.read_state(saved)['step']} is saved" in line


def test_utterances_that_are_too_short_are_counted(
    shards: Path, small_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(shards, optim={"steps": 1}, data={"min_frames": 50})
    short = int((np.load(shards / "index.npy") < 50).sum())
    assert short > 10
    run(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"data.min_seconds 1.00 (50 frames at 50 a second) leaves out {short} of 120 utterances" in said


def test_commands_on_a_run_into_a_closed_pipe_are_silent(tmp_path: Path, shards: Path, small_config: Config) -> None:
    run(small_config(shards, optim={"steps": 2}), tmp_path / "run")
    sizes = "--clusters 4 --sample-frames 200"
    commands = {
        f"status {tmp_path / 'run'}": 0,
        f"export {tmp_path / 'run'} --output {tmp_path / 'model'}": 0,
        f"label {tmp_path / 'run'} {sizes} --data {shards} --output {tmp_path / 'labels'}": 141,
    }
    for words, code in commands.items():
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "codecssl.pretrain", *words.split()]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
        os.close(write)
        assert (done.returncode, done.stderr) == (code, b""), words
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_no_link_in_a_strangers_folder_is_followed(tmp_path: Path, shards: Path, small_config: Config) -> None:
    """Links in a run, an export and labels. The file outside must not change."""
    mine = tmp_path / "mine.txt"
    mine.write_bytes(b"mine")
    config = small_config(shards, optim={"steps": 2})
    run(config, tmp_path / "run")
    sizes: dict[str, Any] = {"source": "latents", "clusters": 4, "sample_frames": 100, "data": (shards,)}
    for name, write in (
        ("run/metrics.jsonl", lambda: run(replace(config, optim=replace(config.optim, steps=4)), tmp_path / "run")),
        ("run/ranks", lambda: run(replace(config, optim=replace(config.optim, steps=4)), tmp_path / "run")),
        ("model/README.md", lambda: export(tmp_path / "run", tmp_path / "model")),
        ("labels/report.json", lambda: label(LabelConfig(output=tmp_path / "labels", **sizes))),
    ):
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        (place.parent / "label.json").write_text("{}") if place.parent.name == "labels" else None
        kept = tmp_path / "kept"
        if place.exists():
            place.rename(kept)
        place.symlink_to(tmp_path if name == "run/ranks" else mine)
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(UserError, match=f"{place}: a link to .*, outside of"):
            write()
        place.unlink()
        if kept.exists():
            kept.rename(place)
        assert mine.read_bytes() == b"mine"
        assert sorted(path.name for path in tmp_path.iterdir() if path != kept) == [n for n in before if n != "kept"]


def test_a_folder_whose_name_is_not_utf8_is_printed_with_escapes(
    tmp_path: Path, shards: Path, small_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / os.fsdecode(b"r\xff")
    config = small_config(shards, optim={"steps": 2})
    with pytest.raises(UserError, match="the name is not UTF-8, which TensorBoard cannot write"):
        run(config, odd / "run")
    run(config, tmp_path / "run")
    odd.mkdir()
    (odd / "data").symlink_to(shards)
    assert main(["run", "encodecmae_tiny", "--data", str(odd / "data"), "--output", str(tmp_path / "other")]) == 1
    assert "r\\udcff/data'] is not UTF-8, which no config can hold; rename it" in capsys.readouterr().err
    (tmp_path / "run").rename(odd / "run")
    assert main(["status", str(odd / "run")]) == 0
    assert main(["export", str(odd / "run"), "--output", str(odd / "model")]) == 0
    assert "r\\udcff/model: model.safetensors" in capsys.readouterr().out
    assert main(["status", str(odd / "none")]) == 1
    assert "r\\udcff/none: is not a run folder" in capsys.readouterr().err
