"""Retry file operations while a disk or a file server is away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from codecssl.tokenize.common.errors import TransientError

PAUSES = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Seconds between tries; the last one repeats."""

T = TypeVar("T")


def patiently(work: Callable[[], T], what: object, *, seconds: float) -> T:
    """Return what `work` returns; call it again after an OSError, for `seconds`.

    what: the file, for the message. With 0 seconds the first OSError is raised. Raises TransientError with the last
    cause when the time is over.
    """
    began, tries = time.monotonic(), 0
    while True:
        try:
            return work()
        except OSError as error:
            left = began + seconds - time.monotonic()
            if not seconds:
                raise
            if left <= 0:
                raise TransientError(
                    f"{what}: cannot be read ({error.strerror or error}), tried for {seconds:g} s; bring the disk back,"
                    " then run the same command again"
                ) from error
            time.sleep(min(left, PAUSES[min(tries, len(PAUSES) - 1)]))
            tries += 1
