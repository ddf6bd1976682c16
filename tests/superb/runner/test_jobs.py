"""Several runs at a time: what a kill leaves behind."""

import signal
import subprocess
import sys
from pathlib import Path

PARENT = """
import multiprocessing, time
from codecssl.superb.runner.jobs import end_with_parent

def work():
    end_with_parent()
    print("working", flush=True)
    time.sleep(30)
    print("outlived", flush=True)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=work)
    process.start()
    process.join()
"""


def test_a_killed_command_takes_its_processes_along(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"working\n"
        parent.send_signal(signal.SIGKILL)
        assert parent.stdout.read() == b""  # ends when the last process that could write has
