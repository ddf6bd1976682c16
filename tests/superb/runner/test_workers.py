"""Worker processes: outcomes arrive, and no process outlives Ctrl-C or a kill of its parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from codecssl.superb.runner.workers import GRACE_SECONDS, WorkerDiedError, in_workers

PARENT = """
import multiprocessing, os, signal, subprocess, sys, time
from contextlib import closing
from codecssl.superb.runner.workers import in_workers

def stubborn(item):
    '''Ignores SIGTERM and Ctrl-C, and so does the process that it starts. The lock leaves a semaphore behind.'''
    lock = multiprocessing.Lock()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("working", os.getpid(), helper.pid, flush=True)
    time.sleep(60)
    yield "outlived"

if __name__ == "__main__":
    print("started", flush=True)
    try:
        with closing(in_workers(stubborn, [1, 2, 3], 2)) as outcomes:
            for outcome in outcomes:
                print(outcome, flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def squares(item: int) -> Iterator[int]:
    """Yield the square and the cube of an item. Item 3 kills its process after the square."""
    yield item**2
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    yield item**3


def test_outcomes_of_all_items_arrive_and_a_death_costs_one_item() -> None:
    with closing(in_workers(squares, [1, 2, 3, 4, 5], 2)) as outcomes:
        found = list(outcomes)
    dead = [item for item, outcome in found if isinstance(outcome, WorkerDiedError)]
    assert dead == [3]
    assert sorted(outcome for _, outcome in found if isinstance(outcome, int)) == sorted(
        [1, 1, 4, 8, 9, 16, 64, 25, 125]
    )


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Any]:
    """A command with two workers. It leads a process group, as a command started from a terminal does."""
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            yield process
        finally:
            process.kill()


def ended(parent: Any) -> float:
    """Return the seconds until no process holds the command's stdout, neither workers nor their helpers."""
    began = time.monotonic()
    output, errors = parent.communicate(timeout=60)
    assert "outlived" not in output
    assert "Traceback" not in errors
    assert "resource_tracker" not in errors, "the semaphores of killed workers must be removed silently"
    return time.monotonic() - began


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.4, 1.0, None])
def test_ctrl_c_ends_all_processes(parent: Any, delay: float | None) -> None:
    """Ctrl-C signals the whole foreground group: before, while and after the workers start."""
    if delay is None:
        pids = [int(pid) for _ in range(2) for pid in parent.stdout.readline().split()[1:]]
        assert len(pids) == 4
    else:
        time.sleep(delay)
    os.killpg(parent.pid, signal.SIGINT)
    assert ended(parent) < GRACE_SECONDS + 5, "must not wait for a worker that sleeps for 60 s"
    assert parent.returncode == 130


LAST = """
import multiprocessing
from contextlib import closing
from multiprocessing import resource_tracker
from codecssl.superb.runner.workers import in_workers

def locked(item):
    globals()["lock"] = multiprocessing.Lock()
    yield item

if __name__ == "__main__":
    resource_tracker.ensure_running()  # its warnings are shown
    with closing(in_workers(locked, [1, 2, 3], 2)) as outcomes:
        print(sorted(outcome for _, outcome in outcomes))
"""


def test_workers_that_are_done_leave_no_semaphores(tmp_path: Path) -> None:
    """A killed worker would, and multiprocessing's resource tracker would warn about them."""
    (tmp_path / "last.py").write_text(LAST)
    done = subprocess.run([sys.executable, str(tmp_path / "last.py")], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("[1, 2, 3]\n", "", 0)


def test_a_killed_command_takes_its_processes_along(parent: Any) -> None:
    assert parent.stdout.readline().startswith("working")
    assert parent.stdout.readline().startswith("working")
    parent.send_signal(signal.SIGKILL)
    assert ended(parent) < 5
