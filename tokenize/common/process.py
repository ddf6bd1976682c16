"""What a long run listens to beside its data: a signal that asks it to stop, and a clock that says it is stuck.

Exit codes of every stage under `python -m`: 0 done, 1 an error told on one line, 2 wrong usage, CRASHED, PREEMPTED and
STUCK. The batch scripts put the last three, and whatever a signal gives, back into the queue; never 1 and 2.
"""

import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

CRASHED = 70
"""Exit code after a traceback: EX_SOFTWARE of sysexits.h. A fault of ours or of the machine's, worth another try."""

PREEMPTED = 75
"""Exit code of a run that was told to stop, and saved its work first: EX_TEMPFAIL of sysexits.h, "try again"."""

STUCK = 76
"""Exit code of a run that ended itself because nothing moved for too long."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""They ask for a checkpoint and an end: Slurm's and the launchers' own, and one for `sbatch --signal`. (NCCL takes
SIGUSR1 for itself.)"""

BEAT_SECONDS = 30.0
"""How often a process writes down what it is doing."""

_GRACE_SECONDS = 10.0


def guarded(main: Callable[[], int]) -> int:
    """What `main` returns; CRASHED, after the traceback, where it raises what it should not."""
    try:
        return main()
    except Exception:
        traceback.print_exc()
        return CRASHED


def drop_stdout() -> None:
    """Send what is still printed to nowhere, once the reader of a pipe is gone: Python flushes once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


class StopSignal:
    """While entered, SIGNALS only set `asked`; the run looks at it between steps."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # the only one that Python lets install any
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name


class Watchdog:
    """While entered, ends the process with exit code STUCK and one line when nothing was reported for `minutes`.

    A thread of its own, because what is stuck (a file system, a collective of ranks of which one is gone) does not
    come back to Python. Several ranks are stuck together; the one whose own doing it is speaks first, so that its
    launcher ends the others before they do. minutes: 0 turns that off. beat: a file in which to note, every
    BEAT_SECONDS, what the process is doing, for `status`.
    """

    def __init__(self, minutes: float, *, rank: int = 0, hint: str = "", beat: Path | None = None) -> None:
        self._seconds, self._rank, self._hint, self._beat = 60.0 * minutes, rank, hint, beat
        self._doing, self._waits_for_others, self._since = "starting", False, time.monotonic()
        self._over, self._started = threading.Event(), time.time()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="codecssl watchdog")

    def report(self, doing: str, *, waits_for_others: bool = False) -> None:
        """The run is alive, and will now do this; with other ranks, perhaps, that may be what is waited for."""
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
        """Into the file, by rename. A disk that refuses is for the run to tell."""
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
            self._beat.parent.mkdir(exist_ok=True)  # not the run's folder, whose disk may be away
            part.write_text(json.dumps(row))
            part.replace(self._beat)
