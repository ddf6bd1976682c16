"""Positioned reads of a dataset's tars.

No file is memory-mapped: a tar that is truncated while it is read gives an error instead of SIGBUS.
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
from codecssl.tokenize.common.remote import RemoteFolder
from codecssl.tokenize.common.retry import patiently
from codecssl.tokenize.format.layout import shard_name, shard_path

OPEN_FILES = 256
"""Maximum number of tars with open descriptors."""
_CHUNK = 1 << 20
_ATTEMPTS = 10

T = TypeVar("T")


class ShardFiles:
    """The tars of one dataset. Safe for several reader threads.

    retry_seconds: how long to retry a read after an OSError (an unmounted disk, a stale NFS handle, a lost connection).
    remote: the folder, if `root` is its URL.
    """

    def __init__(self, root: Path, *, retry_seconds: float = 0.0, remote: RemoteFolder | None = None) -> None:
        self.root, self.retry_seconds, self._remote = root, retry_seconds, remote
        # a file is closed with its last reference: another thread may still read one that left the cache
        self._opened = lru_cache(maxsize=OPEN_FILES)(self._open)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Read bytes offset .. offset + size of a tar.

        Raises UserError if the tar is shorter. Raises TransientError if it could not be read for `retry_seconds`
        (UserError without retries).
        """
        if (remote := self._remote) is not None:
            return self._tried(shard, lambda: remote.read(shard_name(shard), offset, size))
        try:
            # The variable keeps the file open: the cache has no reference to the file of a thread that lost a race.
            # Another file may get the descriptor of a closed one.
            file = self._opened(shard)
            content = os.pread(file.fileno(), size, offset)
            if len(content) == size:
                return content
        except OSError:
            pass  # the slow path reports the error, or retries until it is over
        self._opened.cache_clear()
        return self._tried(shard, lambda: self._read_again(shard, offset, size))

    def crc32(self, shard: int, offset: int, size: int) -> int:
        """CRC-32 of bytes offset .. offset + size of a tar. Raises the same errors as `read`."""
        checksum = 0
        for start in range(offset, offset + size, _CHUNK):
            checksum = zlib.crc32(self.read(shard, start, min(_CHUNK, offset + size - start)), checksum)
        return checksum

    def forget(self, shard: int, offset: int, size: int) -> bool:
        """Remove cached copies of bytes that turned out to be damaged. Returns False if there is no cache."""
        if self._remote is None:
            return False
        self._remote.forget(shard_name(shard), offset, size)
        return True

    def parse(self, shard: int, parse: Callable[[BinaryIO], T]) -> T:
        """Apply `parse` to the open tar. Any error becomes one line: a flipped bit can break tar, gzip, zip or JSON."""

        def attempt() -> T:
            if (remote := self._remote) is not None:
                return _parse_remote(remote, shard_name(shard), parse)
            with open(shard_path(self.root, shard), "rb", opener=_at_once) as file:
                return _parsed(file, parse)

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
        """Reopen the tar by name and read. A replaced tar is complete there, and a stale handle never recovers."""
        with self._open(shard) as file:
            content = os.pread(file.fileno(), size, offset)
        if len(content) < size:
            raise ValueError(f"it ends before byte {offset + size}: cut short")
        return content

    def _open(self, shard: int) -> FileIO:
        return open(shard_path(self.root, shard), "rb", buffering=0, opener=_at_once)


def _parse_remote(remote: RemoteFolder, name: str, parse: Callable[[BinaryIO], T]) -> T:
    """Apply `parse` to a remote file. If it fails, the cached copy may be damaged: read the file again, once."""
    try:
        with remote.open(name) as file:
            return _parsed(file, parse)
    except (OSError, UserError):
        raise
    except Exception:
        remote.forget(name, 0, remote.size(name))
        with remote.open(name) as file:
            return _parsed(file, parse)


def _parsed(file: BinaryIO, parse: Callable[[BinaryIO], T]) -> T:
    """Apply `parse`, again after a SystemError.

    numpy reads the header of an array by ast.literal_eval. In Python 3.11 that fails now and then while another thread
    parses too: "AST constructor recursion depth mismatch" (python/cpython issue 106905).
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return parse(file)
        except SystemError:
            file.seek(0)
    return parse(file)


def _at_once(path: str, flags: int) -> int:
    """Open a file without blocking: a named pipe does not wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)
