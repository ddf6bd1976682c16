"""Files below a URL (s3://, gs://, https://, ...), read by fsspec through a bounded cache of blocks on the local disk.

    CACHE/shards/FOLDER/NAME/00000012      bytes 12 x BLOCK_BYTES .. 13 x BLOCK_BYTES of a file of the folder

CACHE is $CODECSSL_CACHE, or $XDG_CACHE_HOME/codecssl. It holds up to $CODECSSL_CACHE_GIB (20) GiB of blocks of all
folders and processes together; the least recently used ones are removed first. FOLDER is a hash of the URL and of the
content's fingerprint: new content at the same URL never meets old blocks.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, TypeVar

from codecssl.tokenize.common.errors import UserError, one_line
from codecssl.tokenize.common.files import temporary_for, write_atomic
from codecssl.tokenize.common.retry import patiently
from codecssl.tokenize.common.trusted_weights import cache_folder

BLOCK_BYTES = 4 << 20
"""Bytes of a request and of a file of the cache."""
_OPEN_BLOCKS = 256

T = TypeVar("T")


def is_remote(path: object) -> bool:
    """Return True for a URL, False for a local path."""
    return "://" in str(path)


class Url(str):
    """A URL that joins like a path: Url("s3://bucket/shards") / "dataset.json"."""

    __slots__ = ()

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.rstrip('/')}/{name}")


def cache_bytes() -> int:
    """Return the bound of the cache in bytes. Raises UserError for a value that is not a number above 0."""
    text = os.environ.get("CODECSSL_CACHE_GIB", "20")
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0.0 < gib < float("inf"):
        raise UserError(f"CODECSSL_CACHE_GIB {text}: must be a number of GiB above 0")
    return int(gib * (1 << 30))


class RemoteFolder:
    """The files below a URL. Safe for several threads and processes; a fork opens its own connections.

    Every method raises UserError for a missing file, missing rights, a missing library of the protocol or a server
    without byte ranges, and OSError (EREMOTEIO) for other failures, which may be transient.
    """

    def __init__(self, url: str) -> None:
        self.url, self._limit = Url(url), cache_bytes()
        self._folder: Path | None = None
        self._opened = lru_cache(maxsize=_OPEN_BLOCKS)(self._open_block)
        self._systems: dict[int, tuple[Any, str]] = {}
        self._sizes: dict[str, int] = {}
        self._lock, self._written = Lock(), self._limit  # the first write looks at what earlier processes left

    def use_cache(self, fingerprint: str) -> Path:
        """Set the fingerprint of the folder's content. Returns the local folder of its blocks."""
        root = Path(os.environ.get("CODECSSL_CACHE") or cache_folder()) / "shards"
        self._folder = root / hashlib.sha256(f"{self.url} {fingerprint}".encode()).hexdigest()[:32]
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def whole(self, name: str) -> bytes:
        """Return a small file, without the cache."""
        content: bytes = self._asked(name, lambda system, path: system.cat_file(path))
        return content

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        if name not in self._sizes:
            size = self._asked(name, lambda system, path: system.info(path)["size"])
            if size is None:
                raise UserError(f"{self.url / name}: the server does not state its size; copy the folder to a disk")
            self._sizes[name] = int(size)
        return self._sizes[name]

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return bytes offset .. offset + size of a file, from the cache where possible.

        Raises ValueError if the file is shorter.
        """
        if offset + size > self.size(name):
            raise ValueError(f"it ends before byte {offset + size}: cut short")
        parts = []
        for number in range(offset // BLOCK_BYTES, -(-(offset + size) // BLOCK_BYTES)):
            start = number * BLOCK_BYTES
            begin, end = max(offset, start), min(offset + size, start + BLOCK_BYTES)
            parts.append(self._part(name, number, begin - start, end - begin))
        return b"".join(parts)

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading and seeking."""
        return io.BufferedReader(_RemoteFile(self, name), buffer_size=1 << 16)

    def forget(self, name: str, offset: int, size: int) -> None:
        """Remove the cached blocks of bytes offset .. offset + size, which turned out to be damaged."""
        for number in range(offset // BLOCK_BYTES, -(-(offset + size) // BLOCK_BYTES)):
            self._block_path(name, number).unlink(missing_ok=True)
        self._opened.cache_clear()

    # ------------------------------------------------------------ blocks

    def _part(self, name: str, number: int, offset: int, size: int) -> bytes:
        """Return bytes of one block. A block that another process removed or left incomplete is fetched again."""
        with suppress(OSError):
            file = self._opened(name, number)  # the variable keeps it open, also if the cache does not hold it
            content = os.pread(file.fileno(), size, offset)
            if len(content) == size:
                return content
        return self._fetch(name, number)[offset : offset + size]

    def _open_block(self, name: str, number: int) -> io.FileIO:
        path = self._block_path(name, number)
        file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed with its last reference)
        if os.fstat(file.fileno()).st_size != self._block_size(name, number):
            file.close()
            raise OSError(errno.EIO, "incomplete", str(path))
        os.utime(path)  # the time of use, by which blocks are removed
        return file

    def _fetch(self, name: str, number: int) -> bytes:
        start, size = number * BLOCK_BYTES, self._block_size(name, number)
        content: bytes = self._asked(name, lambda system, path: system.cat_file(path, start=start, end=start + size))
        if len(content) != size:
            if len(content) == self.size(name):
                raise UserError(f"{self.url / name}: the server has no byte ranges; copy the folder to a disk")
            raise OSError(errno.EREMOTEIO, f"{len(content)} of {size} bytes came", str(self.url / name))
        self._keep(self._block_path(name, number), content)
        return content

    def _keep(self, path: Path, content: bytes) -> None:
        """Write a block to the cache. A full disk only costs the block."""
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_for(path)
            try:
                temporary.write_bytes(content)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        with self._lock:
            self._written += len(content)
            due = self._written > self._limit // 16
            if due:
                self._written = 0
        if due:
            assert self._folder is not None
            shrink(self._folder.parent, self._limit)

    def _block_size(self, name: str, number: int) -> int:
        return min(BLOCK_BYTES, self.size(name) - number * BLOCK_BYTES)

    def _block_path(self, name: str, number: int) -> Path:
        assert self._folder is not None, "use_cache comes first"
        return self._folder / name.replace("/", "-") / f"{number:08d}"

    # ------------------------------------------------------------ fsspec

    def _asked(self, name: str, work: Callable[[Any, str], T]) -> T:
        """Return the result of a request for the file `name`. See the class for the errors."""
        url = self.url / name
        try:
            system, root = self._system()
            return work(system, f"{root.rstrip('/')}/{name}")
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(f"{url}: there is no such file, or no right to see it") from error
        except PermissionError as error:
            raise UserError(f"{url}: no right to read it ({one_line(error)}); set the credentials") from error
        except Exception as error:  # each protocol has errors of its own
            raise OSError(errno.EREMOTEIO, one_line(error), str(url)) from error

    def _system(self) -> tuple[Any, str]:
        """Return fsspec's file system of this process, and the folder in it."""
        found = self._systems.get(os.getpid())
        if found is None:
            import fsspec

            try:
                found = fsspec.core.url_to_fs(str(self.url))
            except (ImportError, ValueError) as error:
                raise UserError(f"{self.url}: cannot be opened ({one_line(error)})") from error
            self._systems = {os.getpid(): found}
        return found


class _RemoteFile(io.RawIOBase):
    """A file of a RemoteFolder as a stream."""

    def __init__(self, folder: RemoteFolder, name: str) -> None:
        self._folder, self._name, self._at, self._size = folder, name, 0, folder.size(name)
        self.name = str(folder.url / name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._at))
        buffer[:size] = self._folder.read(self._name, self._at, size) if size else b""
        self._at += size
        return size


def shrink(root: Path, limit: int) -> None:
    """Remove the least recently used files below `root` until at most nine tenths of `limit` bytes are left.

    Nothing is removed while they take no more than `limit`.
    """
    found = []
    for path in root.glob("*/*/*"):
        with suppress(OSError):  # another process removes files too
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in found)
    if total <= limit:
        return
    for _, size, path in sorted(found):
        if total <= limit * 9 // 10:
            return
        path.unlink(missing_ok=True)
        total -= size


def mirrored(folder: RemoteFolder, names: Sequence[str], retry_seconds: float) -> Path:
    """Copy small files of a folder to its cache, unless they are there, and return their local folder.

    The first one is always fetched; its hash is the fingerprint of the folder's content.
    """
    first = patiently(lambda: folder.whole(names[0]), folder.url, seconds=retry_seconds)
    local = folder.use_cache(hashlib.sha256(first).hexdigest())
    write_atomic(local / names[0], first)
    for name in names[1:]:
        if not (local / name).exists():
            content = patiently(partial(folder.whole, name), folder.url / name, seconds=retry_seconds)
            write_atomic(local / name, content)
    return local
