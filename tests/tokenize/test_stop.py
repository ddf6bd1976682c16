"""A run stopped by a signal ends between two blocks, loses none, and resumes to the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from codecssl.tokenize.cli import main
from codecssl.tokenize.common.process import PREEMPTED, STUCK
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.format.writer import ShardWriter
from codecssl.tokenize.run import Stopped, run


def config(source: Path, output: Path, codec: Path) -> TokenizeConfig:
    return TokenizeConfig(
        sources=(str(source),), output=output, codec=str(codec), workers=0, shard_inputs=8, block_inputs=2
    )


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def blocks(root: Path) -> int:
    return len(list(root.glob("work/*/*.json")))


def test_it_stops_after_each_block_if_asked_and_ends_with_the_same_bytes(audio_folder, codec_file, tmp_path):
    """15 inputs are blocks of 2 2 2 2 in the first shard and 2 2 2 1 in the second: stopped after every one of them."""
    found = []
    for _ in range(20):
        before = contents(tmp_path / "out")
        asked = iter([False])
        try:
            run(config(audio_folder, tmp_path / "out", codec_file), stop=lambda asked=asked: next(asked, True))
            break
        except Stopped:
            found.append(blocks(tmp_path / "out"))
            kept = {name: data for name, data in before.items() if name.startswith(("work", "shards"))}
            after = contents(tmp_path / "out")
            assert all(after.get(name, data) == data for name, data in kept.items()), "finished blocks must not change"
    assert found == [1, 2, 3, 0, 1, 2, 3], "must be the block counts of the shard in work"
    run(config(audio_folder, tmp_path / "whole", codec_file))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_ends_the_command_with_75_after_its_block(
    audio_folder, codec_file, tmp_path, capsys, monkeypatch, number
):
    add = ShardWriter.add_block

    def signalled(self, *arguments):
        signal.raise_signal(number)
        return add(self, *arguments)

    monkeypatch.setattr(ShardWriter, "add_block", signalled)
    before = signal.getsignal(number)
    command = ["run", str(audio_folder), "-o", str(tmp_path / "out"), "--codec", str(codec_file), "--workers", "0",
               "--shard-inputs", "8", "--block-inputs", "2"]  # fmt: skip
    assert main(command) == PREEMPTED == 75
    printed = capsys.readouterr().err
    assert f"stopped by {number.name} after a whole block; the same command resumes from there" in printed
    assert blocks(tmp_path / "out") == 1
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    assert main(command) == 0


def test_no_input_for_long_is_stuck(audio_folder, codec_file, tmp_path):
    code = (
        "import sys, time; from codecssl.tokenize import run; from codecssl.tokenize.cli import main\n"
        "run.encode_inputs = lambda *arguments: iter([time.sleep(60)])\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = ["run", str(audio_folder), "-o", str(tmp_path / "out"), "--codec", str(codec_file), "--workers", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--stall-minutes", "0.01"], capture_output=True, text=True
    )
    assert done.returncode == STUCK == 76
    assert "error: stuck for 0.01 minutes while" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR2, PREEMPTED)])
def test_a_signal_to_the_whole_process_group_prints_one_line(codec_file, tmp_path, number, code):
    """Ctrl-C in a terminal, `scancel` and `sbatch --signal` also reach the processes that read and encode."""
    (tmp_path / "audio").mkdir()
    for i in range(1500):
        soundfile.write(tmp_path / f"audio/{i:04d}.wav", np.full(1600, 0.1), 16_000)
    command = ["-m", "codecssl.tokenize", "run", "audio", "-o", "out", "--codec", str(codec_file)]
    small = ["--workers", "1", "--block-inputs", "8", "--shard-inputs", "500"]
    started = dict(cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen([sys.executable, *command, *small], **started)
    deadline = time.monotonic() + 60
    while not blocks(tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    [line] = error.splitlines()
    assert ("interrupted" in line) if number == signal.SIGINT else ("stopped by SIGUSR2" in line)
    assert process.returncode == code
