"""What a run listens to beside its data: a signal that asks it to stop, and a clock that says it is stuck."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""They ask for a checkpoint and an end: Slurm's and the launchers' own, and one for `sbatch --signal`. (NCCL takes
SIGUSR1 for itself.)"""

_GRACE_SECONDS = 10.0


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
    """While entered, ends the process with exit code 1 and one line when nothing was reported for `minutes`.

    A thread of its own, because what is stuck (a file system, a collective of ranks of which one is gone) does not
    come back to Python. Several ranks are stuck together; the one whose own doing it is speaks first, so that its
    launcher ends the others before they do. minutes: 0 turns it off.
    """

    def __init__(self, minutes: float, *, rank: int = 0, hint: str = "") -> None:
        self._seconds, self._rank, self._hint = 60.0 * minutes, rank, hint
        self._doing, self._waits_for_others, self._since = "starting", False, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="codecssl watchdog")

    def report(self, doing: str, *, waits_for_others: bool = False) -> None:
        """The run is alive, and will now do this; with other ranks, perhaps, that may be what is waited for."""
        self._doing, self._waits_for_others, self._since = doing, waits_for_others, time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.report("starting")
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            grace = _GRACE_SECONDS if self._waits_for_others else 0.0
            if time.monotonic() - self._since > self._seconds + grace:
                self._give_up()

    def _give_up(self) -> None:
        rank = f"rank {self._rank}: " if self._rank else ""
        line = f"error: {rank}stuck for {self._seconds / 60:g} minutes while {self._doing}; {self._hint}\n"
        os.write(2, line.encode())
        os._exit(1)
