"""Files that are there whole or not at all, whoever writes them at the same time and wherever a kill falls."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def temporary_for(path: Path) -> Path:
    """Where to write what shall become `path`: a name that no other process has. Numbers of processes are not enough:
    on other nodes of a cluster, and in other containers, they are the same.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its place, durably, when all is written, and is gone when that fails."""
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
        if not path.exists():  # else a sibling task completed the dataset, with the same bytes, and tidied up
            raise


def names_in(folder: Path) -> set[str]:
    """What a folder holds, but for what killed processes left half-written."""
    return {path.name for path in folder.iterdir()} - {path.name for path in temporaries(folder)}


def temporaries(folder: Path) -> list[Path]:
    """Half-written files that a killed process left."""
    return list(folder.glob(".*.tmp"))


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
