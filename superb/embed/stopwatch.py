"""Seconds that one part of a program takes, added up over its calls."""

import time
from types import TracebackType


class Stopwatch:
    """Context manager that adds up wall-clock and processor seconds (of all threads)."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._began = (0.0, 0.0)

    def __enter__(self) -> "Stopwatch":
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._began[0]
        self.cpu_seconds += time.process_time() - self._began[1]
