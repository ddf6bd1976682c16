"""Retries for unavailable disks and file servers: classification of transient errors, and repeated attempts."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from codecssl.tokenize.common.errors import TransientError, UserError

TRANSIENT = frozenset({
    errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOTCONN,
    errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH, errno.EREMOTEIO, errno.ECOMM, errno.ENOENT,
})  # fmt: skip
"""Errors of an unavailable disk or file server. ENOENT applies to files that existed before."""
PAUSES = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Seconds between attempts. The last value repeats."""

T = TypeVar("T")


def patiently(work: Callable[[], T], what: object, *, seconds: float) -> T:
    """Call `work` and return its result. After an OSError of TRANSIENT, retry for `seconds`.

    what: the file, for the message. With 0 seconds there is one attempt, and its OSError is raised. Raises
    TransientError with the last cause when the time is over.
    """
    began, tries = time.monotonic(), 0
    while True:
        try:
            return work()
        except OSError as error:
            if not seconds or error.errno not in TRANSIENT:
                raise
            left = began + seconds - time.monotonic()
            if left <= 0:
                raise TransientError(
                    f"{what}: {error.strerror or error}, tried for {seconds:g} s; bring the disk back, then run the"
                    " same command again"
                ) from error
            time.sleep(min(left, PAUSES[min(tries, len(PAUSES) - 1)]))
            tries += 1


def disk_error(text: str, error: OSError) -> UserError:
    """Build the exception for a failed file operation: a TransientError if a retry may help."""
    return (TransientError if error.errno in TRANSIENT else UserError)(text)
