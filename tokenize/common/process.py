"""Process control for long runs: stop signals and a watchdog for stuck runs.

Exit codes of every stage under `python -m`: 0 done, 1 an error on one line, 2 wrong usage, CRASHED, PREEMPTED and
STUCK. The batch scripts requeue jobs with the last three codes and with the code of any signal, never with 1 and 2.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from codecssl.tokenize.common.terminal import printable

CRASHED = 70
"""Exit code after a traceback: EX_SOFTWARE of sysexits.h. A software or machine fault that can be retried."""

PREEMPTED = 75
"""Exit code of a run that saved its work after a stop signal: EX_TEMPFAIL of sysexits.h, "try again"."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, the shell convention."""

STUCK = 76
"""Exit code of a run that stopped itself after no progress for too long."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""Signals that request a checkpoint and exit: those of Slurm and the launchers, and one for `sbatch --signal`.
NCCL uses SIGUSR1 itself.
"""

BEAT_SECONDS = 30.0
"""Seconds between two records of the process's activity."""

_GRACE_SECONDS = 10.0


def guarded(main: Callable[[], int]) -> int:
    """Return the result of `main`. If it raises an unexpected error, print the traceback and return CRASHED."""
    try:
        return main()
    except Exception:
        sys.stderr.write(printable(traceback.format_exc()))
        return CRASHED


def drop_stdout() -> None:
    """Discard further output after the reader of a pipe is gone. Python flushes once more when it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


class StopSignal:
    """Within this context, SIGNALS only set `asked`. The run checks it between steps.

    interrupt: so does the first Ctrl-C; the second one raises KeyboardInterrupt.
    """

    def __init__(self, *, interrupt: bool = False) -> None:
        self.asked: str | None = None
        self._numbers = (*SIGNALS, signal.SIGINT) if interrupt else SIGNALS
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # only the main thread may install signal handlers
            self._before = {number: signal.signal(number, self._note) for number in self._numbers}
        return self

    @property
    def exit_code(self) -> int:
        """Exit code of a run that has saved its work because of the signal."""
        return INTERRUPTED if self.asked == "SIGINT" else PREEMPTED

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.asked == "SIGINT":
                raise KeyboardInterrupt
            if os.environ.get("RANK", "0") == "0":
                os.write(2, b"interrupted: saves after this step and stops; Ctrl-C again stops at once\n")
        self.asked = signal.Signals(number).name


QUIET_TRACKER = "ignore:resource_tracker:UserWarning"
"""A warning filter for multiprocessing's resource tracker. The tracker removes the semaphores of killed processes. Its
warning about them would follow the line that Ctrl-C prints."""


class StoppedBySignal(BaseException):
    """A signal of SIGNALS arrived. The text is its name."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Within this context, SIGNALS raise `StoppedBySignal` in the main thread, as Ctrl-C raises KeyboardInterrupt."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Raise the KeyboardInterrupt of a Ctrl-C at the end of the block.

    Processes started in the block receive neither SIGINT nor SIGUSR2, which a terminal or a batch system sends to the
    whole group: this process ends them. That includes multiprocessing's resource tracker, without which each of its
    semaphores would end in a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # inherited by new processes
    if QUIET_TRACKER not in sys.warnoptions:
        sys.warnoptions.append(QUIET_TRACKER)  # the tracker gets these as -W
    try:
        resource_tracker.ensure_running()  # unblocks SIGINT
        if handler != signal.SIG_IGN:  # ignored where a shell script started the command with &
            signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # delivers pending signals
        finally:
            signal.signal(signal.SIGINT, handler)
        if caught:
            raise KeyboardInterrupt


class Watchdog:
    """Within this context, ends the process with exit code STUCK and one line after `minutes` without a report.

    It runs in its own thread, because a stuck call (a file system, a collective with a missing rank) does not return to
    Python. Several ranks are stuck together. The rank that caused the stall reports first, so its launcher ends the
    others. minutes: 0 disables the watchdog. beat: a file in which to record, every BEAT_SECONDS, what the process is
    doing, for `status`.
    """

    def __init__(self, minutes: float, *, rank: int = 0, hint: str = "", beat: Path | None = None) -> None:
        self._seconds, self._rank, self._hint, self._beat = 60.0 * minutes, rank, hint, beat
        self._doing, self._waits_for_others, self._since = "starting", False, time.monotonic()
        self._over, self._started = threading.Event(), time.time()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="codecssl watchdog")

    def report(self, doing: str, *, waits_for_others: bool = False) -> None:
        """Report that the run is alive and what it does next. `waits_for_others`: it may wait for other ranks."""
        self._doing, self._waits_for_others, self._since = doing, waits_for_others, time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.report("starting")
        self._note("running")
        if self._seconds or self._beat:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        if self._seconds or self._beat:
            self._thread.join()
        stopped = isinstance(error, SystemExit) and error.code == PREEMPTED
        self._note("stopped" if stopped else "failed" if error else "ended")

    def _watch(self) -> None:
        noted = time.monotonic()
        while not self._over.wait(min(1.0, self._seconds / 4 or 1.0)):
            if time.monotonic() - noted > BEAT_SECONDS:
                self._note("running")
                noted = time.monotonic()
            grace = _GRACE_SECONDS if self._waits_for_others else 0.0
            if self._seconds and time.monotonic() - self._since > self._seconds + grace:
                self._give_up()

    def _give_up(self) -> None:
        rank = f"rank {self._rank}: " if self._rank else ""
        line = f"error: {rank}stuck for {self._seconds / 60:g} minutes while {self._doing}; {self._hint}\n"
        os.write(2, line.encode())
        self._note("stuck")
        os._exit(STUCK)

    def _note(self, state: str) -> None:
        """Write the state to the file by rename. Disk errors are left for the run to report."""
        if self._beat is None:
            return
        now, environment = time.time(), os.environ
        row = {
            "state": state,
            "doing": self._doing,
            "since": now - (time.monotonic() - self._since),
            "time": now,
            "started": self._started,
            "host": environment.get("SLURMD_NODENAME") or socket.gethostname(),
            "job": environment.get("SLURM_JOB_ID"),
            "restarts": int(environment.get("SLURM_RESTART_COUNT", "0")),
        }
        part = self._beat.with_name(f".{self._beat.name}")
        with suppress(OSError):
            self._beat.parent.mkdir(exist_ok=True)  # not the run's folder, whose disk may be unavailable
            part.write_text(json.dumps(row))
            part.replace(self._beat)
