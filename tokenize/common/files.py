"""Atomic files and locks, safe with concurrent writers and kills at any time."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from codecssl.tokenize.common.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of a file system without locks."""
PATIENCE = {"here": 10.0, "elsewhere": 120.0}
"""Seconds for which a killed process's lock may persist: its children or a file server still hold it."""


def temporary_for(path: Path) -> Path:
    """Return a temporary name for writing `path`, unique across processes.

    Process numbers do not suffice: they repeat on other nodes of a cluster and in other containers.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file atomically and durably, also in case of a power failure."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` atomically and durably when the context ends, and is removed if it fails."""
    temporary = temporary_for(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _put(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _put(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
    except FileNotFoundError:
        if not path.exists():  # else a sibling task finished the dataset with the same bytes and tidied up
            raise


def refuse_links_out(folder: Path, root: Path | None = None) -> None:
    """Raise UserError if a link leads out of `root` (default: `folder`), in `folder` or on the way from `root` to it.

    Call it before files are written in a folder that may come from elsewhere: a link in it would be followed, and a
    file outside of it overwritten. A folder that does not exist has no links. `root` itself may be a link.
    """
    top = (root or folder).resolve()
    entries = (Path(parent) / name for parent, folders, files in os.walk(folder) for name in (*folders, *files))
    for path in (folder, *(entry for entry in entries if entry.is_symlink())):
        if not (target := path.resolve()).is_relative_to(top):
            raise UserError(f"{path}: a link to {target}, outside of {top}; remove it, or give another folder")


def names_in(folder: Path) -> set[str]:
    """Names in a folder, without temporary files and locks, including those of killed processes."""
    return {
        path.name
        for path in folder.iterdir()
        if not (path.name.startswith(".") and path.name.endswith((".tmp", ".lock")))
    }


def temporaries(folder: Path) -> list[Path]:
    """Temporary files left by a killed process."""
    return list(folder.glob(".*.tmp"))


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Yield True if the lock was free or became free. The lock ends with the process. Raises OSError without locks."""
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def alone_in(folder: Path, name: str = ".lock", *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on the folder while the context is open, so that no second process writes there.

    Raises UserError if another process holds it, or waits for that process. A file system without locks gives no
    protection; with `wait` it raises an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, host, began = folder / name, socket.gethostname(), time.monotonic()
    while True:
        with path.open("ab", buffering=0) as file:
            if _taken(file, needed=wait) and _is_still(path, file):
                with suppress(OSError):  # a full disk raises a more important error
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {host}".encode())
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        holder = _holder(path)
        patience = PATIENCE["here" if holder.endswith(f" on {host}") else "elsewhere"]
        if not wait and time.monotonic() - began > patience:
            raise UserError(f"{folder}: {holder} is at work there; wait for it, or give another --output")
        time.sleep(0.2)


def _is_still(path: Path, file: IO[bytes]) -> bool:
    """Return True if the file still has that name. The holder of a lock removes its file at the end."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False


def _holder(path: Path) -> str:
    with suppress(FileNotFoundError):
        return path.read_text() or "another process"
    return "another process"


def _taken(file: IO[bytes], *, needed: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if needed:
            where = f"{Path(file.name).parent}: on a file system without locks ({error.strerror})"
            raise UserError(f"{where}; work there with one task, or on another one") from error
    return True


def _opened(path: Path) -> IO[str]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process finished and tidied up meanwhile
            return path.open("w")
