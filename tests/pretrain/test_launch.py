"""`codecssl-pretrain run --nproc N`: several processes that start, stop and fail as one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codecssl.configs.load import to_yaml
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.launch import launch, rank_environment
from codecssl.pretrain.monitor.telemetry import read_rows
from codecssl.pretrain.run import run
from codecssl.tokenize.common.errors import UserError

NO_DROPOUT = {"dropout": 0.0, "input_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
LAUNCH = "import sys; from codecssl.pretrain.launch import launch; sys.exit(launch(sys.argv[3:], int(sys.argv[1]), grace=float(sys.argv[2])))"  # noqa: E501
LISTENS = """
import os, pathlib, signal, sys, time
heard = []
for name in ("SIGTERM", "SIGUSR2", "SIGINT"):
    signal.signal(getattr(signal, name), lambda number, frame: heard.append(signal.Signals(number).name))
here = pathlib.Path(sys.argv[1], os.environ["RANK"])
here.write_text(str(os.getpid()))
while not heard:
    time.sleep(0.02)
here.write_text(heard[0])
time.sleep(float(sys.argv[2]))
sys.exit(75)
"""


@pytest.fixture(autouse=True)
def _not_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def started(tmp_path: Path, script: str, *arguments: str, grace: float = 30.0) -> "subprocess.Popen[bytes]":
    """A launcher of two ranks, after both of them listen to signals."""
    command = [sys.executable, "-c", LAUNCH, "2", str(grace), sys.executable, "-c", script, str(tmp_path), *arguments]
    process = subprocess.Popen(command)
    until(lambda: all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"), process)
    return process


def until(happens: Callable[[], bool], process: "subprocess.Popen[Any]", seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert process.poll() is None, "must still be running"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_rank_has_torchruns_variables(tmp_path: Path) -> None:
    where = f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK'])"
    script = f"import os, pathlib; {where}.write_text(repr(dict(os.environ)))"
    assert launch([sys.executable, "-c", script], 3) == 0
    found = [eval((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [(each["RANK"], each["LOCAL_RANK"], each["WORLD_SIZE"]) for each in found] == [
        (str(rank), str(rank), "3") for rank in range(3)
    ]
    assert len({(each["MASTER_ADDR"], each["MASTER_PORT"]) for each in found}) == 1


def test_the_cores_are_shared_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codecssl.pretrain.launch.available_cores", lambda: 16)
    assert rank_environment({}, 0, 4, 1)["OMP_NUM_THREADS"] == "4"
    assert rank_environment({}, 0, 40, 1)["OMP_NUM_THREADS"] == "1"
    assert rank_environment({"OMP_NUM_THREADS": "9"}, 0, 4, 1)["OMP_NUM_THREADS"] == "9"


@pytest.mark.parametrize(("number", "heard", "code"), [("SIGUSR2", "SIGUSR2", 75), ("SIGTERM", "SIGTERM", 75),
                                                      ("SIGINT", "SIGTERM", 130)])  # fmt: skip
def test_a_signal_reaches_every_rank(tmp_path: Path, number: str, heard: str, code: int) -> None:
    """Ctrl-C asks the ranks to save, as SIGTERM does, but the run ends with 130 as one of a single process."""
    process = started(tmp_path, LISTENS, "0")
    process.send_signal(getattr(signal, number))
    assert process.wait(30) == code
    assert [(tmp_path / rank).read_text() for rank in "01"] == [heard, heard]


def test_a_second_ctrl_c_kills_ranks_that_do_not_end(tmp_path: Path) -> None:
    process = started(tmp_path, LISTENS, "1000")
    process.send_signal(signal.SIGINT)
    until(lambda: all((tmp_path / rank).read_text() == "SIGTERM" for rank in "01"), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


@pytest.mark.parametrize(("end", "code"), [("sys.exit(70)", 70), ("os.kill(os.getpid(), 9)", 137)])
def test_the_code_is_that_of_the_rank_that_failed_first_and_the_others_end(end: str, code: int) -> None:
    script = f"import os, sys, time; {end} if os.environ['RANK'] == '1' else time.sleep(1000)"
    began = time.monotonic()
    assert launch([sys.executable, "-c", script], 2, grace=0.2) == code
    assert time.monotonic() - began < 30


def test_ranks_save_when_the_launcher_is_killed(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux reports the death of a parent")
    process = started(tmp_path, LISTENS, "0")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while [(tmp_path / rank).read_text() for rank in "01"] != ["SIGTERM", "SIGTERM"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_another_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--nproc: WORLD_SIZE is 4, so another launcher started this process"):
        launch(["true"], 2)


def test_two_processes_stop_resume_and_compute_what_one_does(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """--nproc 2 trains the first half, until the launcher gets a SIGUSR2; torchrun trains the second half."""
    log = {"log_every": 1, "checkpoint_every": 1000, "valid_every": 1000}
    config = small_config(make_shards(), model=NO_DROPOUT, optim={"steps": 40}, log=log)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    arguments = ["run", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    base = [sys.executable, "-m"]
    process = subprocess.Popen([*base, "codecssl.pretrain", *arguments, "--nproc", "2"], env=environment, cwd=tmp_path)
    until(lambda: (tmp_path / "two" / "metrics.jsonl").is_file() and bool(losses(tmp_path / "two")), process, 400)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(400) == 75
    saved = losses(tmp_path / "two")
    assert 1 <= len(saved) < 40, "must be stopped before the last step"
    torchrun = [*base, "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "-m", "codecssl.pretrain", *arguments], env=environment, cwd=tmp_path, check=True)
    run(config, tmp_path / "one")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 40
    assert two == pytest.approx(one, rel=2e-5)
    assert {row["ranks"] for row in read_rows(tmp_path / "two" / "metrics.jsonl") if row["split"] == "train"} == {2}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if row["split"] == "train"]
