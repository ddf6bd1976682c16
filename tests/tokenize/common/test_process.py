"""The stop signal, the watchdog and its notes, and exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codecssl.tokenize.common import process
from codecssl.tokenize.common.process import CRASHED, PREEMPTED, STUCK, StopSignal, Watchdog, guarded


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_only_sets_a_flag_and_the_old_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.asked is None
        os.kill(os.getpid(), number)
        time.sleep(0)
        assert stop.asked == number.name
    assert signal.getsignal(number) == before


def test_exit_codes_differ_from_errors_usage_and_each_other():
    assert len({0, 1, 2, CRASHED, PREEMPTED, STUCK}) == 6


def test_a_crash_has_its_own_exit_code_and_its_traceback(capsys):
    assert guarded(lambda: 1) == 1
    assert guarded(lambda: [].pop()) == CRASHED
    assert "IndexError: pop from empty list" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        guarded(lambda: sys.exit(2))


def test_the_state_of_a_process_is_recorded_until_its_end(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(process, "BEAT_SECONDS", 0.05)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    path = tmp_path / "ranks" / "00003.json"
    with Watchdog(0, beat=path) as dog:
        dog.report("in step 5")
        began = time.time()
        while json.loads(path.read_text())["doing"] != "in step 5":
            assert time.time() < began + 10
            time.sleep(0.01)
        row = json.loads(path.read_text())
    assert (row["state"], row["job"], row["restarts"]) == ("running", "17", 2)
    assert row["since"] == pytest.approx(began, abs=1.0)
    assert json.loads(path.read_text())["state"] == "ended"
    for error, state in ((SystemExit(PREEMPTED), "stopped"), (SystemExit(1), "failed"), (ValueError(), "failed")):
        with pytest.raises(type(error)), Watchdog(0, beat=path):
            raise error
        assert json.loads(path.read_text())["state"] == state


def test_a_process_that_is_stuck_ends_with_76_and_notes_it(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from codecssl.tokenize.common.process import Watchdog\n"
        "with Watchdog(0.3 / 60, rank=int(sys.argv[1]), hint='go on', beat=Path(sys.argv[2])) as dog:\n"
        "    dog.report('reading'); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code, "3", str(tmp_path / "beat")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (76, "error: rank 3: stuck for 0.005 minutes while reading; go on\n")
    assert json.loads((tmp_path / "beat").read_text())["state"] == "stuck"


GROUP = """
import multiprocessing, os, sys, time
from codecssl.tokenize.common.command_line import CommandLine
from codecssl.tokenize.common.process import StopSignal, interrupts_deferred

def wait(lock):
    os.write(1, b"working\\n")  # at once: print's newline may be a write of its own
    time.sleep(60)

def act(arguments):
    context = multiprocessing.get_context("spawn")
    with interrupts_deferred():
        locks = [context.Lock() for _ in range(5)]
        started = [context.Process(target=wait, args=(lock,), daemon=True) for lock in locks[:2]]
        for each in started:
            each.start()
    try:
        time.sleep(60)
    finally:
        for each in started:
            each.terminate()
            each.join()

if __name__ == "__main__":
    line = CommandLine("toy", "A toy.")
    line.command("do", act, group="all", help="do it", example="do", resume="resumes")
    sys.exit(line.main(["do"]))
"""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 75, "stopped by SIGTERM"),
        (signal.SIGUSR2, 75, "stopped by SIGUSR2"),
    ],
)
def test_a_signal_to_a_group_of_processes_prints_one_line(number, code, said, tmp_path: Path):
    """A batch system signals all processes of a job, multiprocessing's resource tracker too."""
    (tmp_path / "group.py").write_text(GROUP)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, str(tmp_path / "group.py")], **pipes) as parent:
        assert [parent.stdout.readline() for _ in range(2)] == ["working\n"] * 2
        os.killpg(parent.pid, number)
        _, errors = parent.communicate(timeout=60)
    assert errors == f"error: {said}; the same command resumes\n"
    assert parent.returncode == code


def test_ctrl_c_is_noted_and_a_second_one_interrupts(capfd):
    with StopSignal(interrupt=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.asked, stop.exit_code) == ("SIGINT", 130)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == "interrupted: saves after this step and stops; Ctrl-C again stops at once\n"
