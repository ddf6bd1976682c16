"""Several processes of one run on this machine, started and stopped as one (`codecssl-pretrain run --nproc N`).

Unlike torchrun, which exits with 1 after any failure and does not forward SIGUSR2, the launcher forwards the signals of
`tokenize.common.process` to every rank and returns the exit code of the rank that ended first.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import FrameType

from codecssl.tokenize.common.cores import available_cores
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.process import INTERRUPTED, PREEMPTED, SIGNALS

GRACE_SECONDS = 60.0
"""Time that the other ranks have to end by themselves after one of them has failed."""
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


def launch(command: Sequence[str], processes: int, *, grace: float = GRACE_SECONDS) -> int:
    """Run `command` once per rank with torchrun's variables, and return the exit code of the run.

    The code is 0 if every rank ended with 0, else that of the first rank that did not (128 + n after signal n). The
    ranks run in sessions of their own: a Ctrl-C of the terminal reaches only this process. The first Ctrl-C lets the
    ranks save after their step and the second kills them; both return INTERRUPTED. If this process is killed, the
    ranks receive SIGTERM and save (Linux only). Raises UserError inside another launcher.
    """
    _refuse_nesting(os.environ)
    asked: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in (*SIGNALS, signal.SIGINT)}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        port, parent = _free_port(), os.getpid()
        for rank in range(processes):
            environment = rank_environment(os.environ, rank, processes, port)
            setup = partial(_end_with, parent, _libc()) if sys.platform == "linux" else None
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=setup))
        code = _watched(ranks, asked, grace)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in asked:
        return INTERRUPTED
    # A signal that came before the ranks listened has killed them: nothing was lost.
    return PREEMPTED if asked and code in {128 + number for number in SIGNALS} else code


def rank_environment(environment: Mapping[str, str], rank: int, processes: int, port: int) -> dict[str, str]:
    """Return the variables of one rank, as torchrun sets them. The cores are divided among the ranks."""
    threads = environment.get("OMP_NUM_THREADS") or max(1, available_cores() // processes)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}  # fmt: skip
    return {**environment, **{name: str(value) for name, value in names.items()}}


def _watched(ranks: Sequence["subprocess.Popen[bytes]"], asked: Sequence[signal.Signals], grace: float) -> int:
    """Wait for all ranks and forward signals. Remaining ranks are killed `grace` seconds after a failure."""
    first, failed_at, passed_on = 0, 0.0, 0
    while True:
        codes = [process.poll() for process in ranks]
        if not first and (bad := [code for code in codes if code]):
            first, failed_at = _exit_code(bad[0]), time.monotonic()
        if None not in codes:
            return first
        for number in asked[passed_on:]:
            again = number is signal.SIGINT and signal.SIGINT in asked[:passed_on]
            _send(ranks, signal.SIGKILL if again else signal.SIGTERM if number is signal.SIGINT else number)
            passed_on += 1
        if first and time.monotonic() - failed_at > grace:
            _send(ranks, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _send(ranks: Sequence["subprocess.Popen[bytes]"], number: signal.Signals) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(number)


def _exit_code(code: int) -> int:
    """Return the shell's exit code of a process: 128 + n after signal n."""
    return 128 - code if code < 0 else code


def _refuse_nesting(environment: Mapping[str, str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if environment.get(name, "1") not in ("", "1") or (name != "SLURM_STEP_NUM_TASKS" and name in environment):
            raise UserError(
                f"--nproc: {name} is {environment[name]}, so another launcher started this process; leave --nproc out"
                f" or unset {name}"
            )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)  # loaded before the fork: the child must not import


def _end_with(parent: int, libc: ctypes.CDLL) -> None:
    """Ask the kernel for SIGTERM when the parent dies, which may have happened already. Runs in a new child."""
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(PREEMPTED)
