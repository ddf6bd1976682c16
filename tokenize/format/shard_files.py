"""Positioned reads of a dataset's tars.

Nothing is mapped into memory: a tar that is cut short under a reader gives an error instead of SIGBUS.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import BinaryIO, TypeVar

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.retry import patiently
from codecssl.tokenize.format.layout import shard_path

OPEN_FILES = 256
"""Tars whose descriptors stay open."""
_CHUNK = 1 << 20

T = TypeVar("T")


class ShardFiles:
    """The tars of one dataset; safe for several reader threads.

    retry_seconds: how long a read is tried again after an OSError (a disk that was unmounted, a stale NFS handle).
    """

    def __init__(self, root: Path, *, retry_seconds: float = 0.0) -> None:
        self.root, self.retry_seconds = root, retry_seconds
        # a file is closed when nobody holds it: one that leaves the cache may still be read by another thread
        self._opened = lru_cache(maxsize=OPEN_FILES)(self._open)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes offset .. offset + size of a tar.

        Raises UserError where the tar is shorter, TransientError where it could not be read for `retry_seconds`
        (UserError without retries).
        """
        try:
            content = os.pread(self._opened(shard).fileno(), size, offset)
            if len(content) == size:
                return content
        except OSError:
            pass  # the slow way says what is wrong, or waits until it is over
        self._opened.cache_clear()
        return self._tried(shard, lambda: self._read_again(shard, offset, size))

    def crc32(self, shard: int, offset: int, size: int) -> int:
        """CRC-32 of bytes offset .. offset + size of a tar; errors as those of `read`."""
        checksum = 0
        for start in range(offset, offset + size, _CHUNK):
            checksum = zlib.crc32(self.read(shard, start, min(_CHUNK, offset + size - start)), checksum)
        return checksum

    def parse(self, shard: int, parse: Callable[[BinaryIO], T]) -> T:
        """What `parse` makes of the open tar. A flipped bit can break tar, gzip, zip or JSON: any error is one line."""

        def attempt() -> T:
            with open(shard_path(self.root, shard), "rb", opener=_at_once) as file:
                return parse(file)

        return self._tried(shard, attempt)

    def _tried(self, shard: int, work: Callable[[], T]) -> T:
        path = shard_path(self.root, shard)
        try:
            return patiently(work, path, seconds=self.retry_seconds)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path}: cannot be read ({error}); run `codecssl-tokenize verify {self.root}`") from error

    def _read_again(self, shard: int, offset: int, size: int) -> bytes:
        """By its name: a tar that was replaced meanwhile is whole there, and a stale handle never works again."""
        with self._open(shard) as file:
            content = os.pread(file.fileno(), size, offset)
        if len(content) < size:
            raise ValueError(f"it ends before byte {offset + size}: cut short")
        return content

    def _open(self, shard: int) -> FileIO:
        return open(shard_path(self.root, shard), "rb", buffering=0, opener=_at_once)


def _at_once(path: str, flags: int) -> int:
    """Open a file; one that is a named pipe does not wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)
