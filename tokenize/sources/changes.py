"""Detect audio that changed after it was encoded; `run` checks before it resumes.

Changing or replacing a file sets its st_ctime to the current time, and no program can set it back. Files that changed
after the start of the run are read again, and their sha256 is compared with the one stored with the codes. Other files
cost one stat. No time is stored: shards do not depend on clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.layout import read_columns
from codecssl.tokenize.sources.audio import sha256_of
from codecssl.tokenize.sources.inputs import Input

SKEW_SECONDS = 60.0
"""Maximum difference between the clocks of two file systems."""
THREADS, PER_THREAD = 16, 256
"""Number of threads and of files per thread for stat calls, which are slow over a network."""


def first_changed(items: Sequence[Input], since: float, hashes: Callable[[], Mapping[str, bytes]]) -> str | None:
    """Return the path of the first of `items` whose audio changed after it was encoded; None if there is none.

    `since` is the start of the run in seconds since the epoch. `hashes` returns the sha256 of the encoded audio by id,
    and is called only if a file changed after `since`. Inputs that are not local files, are missing or unreadable are
    not compared, since they are not needed again.
    """
    touched = _touched({item.file for item in items if item.data is None and item.problem is None}, since)
    if not touched:
        return None
    expected, found = hashes(), dict[object, bytes | None]()
    for item in items:
        if item.file in touched and item.id in expected:
            place = (item.file, item.offset, item.row, item.column)
            if place not in found:  # several inputs may be segments of one file
                found[place] = _sha256(item)
            if found[place] not in (None, expected[item.id]):
                return item.path
    return None


def _touched(files: set[str], since: float) -> set[str]:
    """Return the files that changed after `since`."""
    names = sorted(files)
    parts = [names[i : i + PER_THREAD] for i in range(0, len(names), PER_THREAD)]
    with ThreadPoolExecutor(THREADS) as pool:
        times = pool.map(lambda part: [_changed_at(name) for name in part], parts)
        return {name for name, at in zip(names, chain.from_iterable(times)) if at > since - SKEW_SECONDS}


def _changed_at(file: str) -> float:
    try:
        return Path(file).stat().st_ctime
    except (OSError, ValueError):  # missing, a URL, or an invalid name
        return 0.0


def _sha256(item: Input) -> bytes | None:
    try:
        with item.open() as file:
            return bytes.fromhex(sha256_of(file))
    except UserError:
        return None


HASHES = 64
"""Number of files whose sha256 is cached per process."""
_remembered: dict[tuple[object, ...], Future[str]] = {}
_lock = Lock()


def sha256_of_input(item: Input, file: BinaryIO) -> str:
    """Return the sha256 of an input's open file, which is the whole file if the input is a segment or a channel.

    It is cached, since parts of one file follow each other. Threads that need the same file wait for the first of them.
    Raises UserError if the file cannot be read.
    """
    whole = item.start is None and item.end is None and item.duration is None and item.channel is None
    if whole or item.data is not None or item.row is not None:
        return sha256_of(file)
    try:
        status = Path(item.file).stat()
    except (OSError, ValueError):
        return sha256_of(file)
    place = (item.file, item.offset, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    with _lock:
        first = place not in _remembered
        if first:
            while len(_remembered) >= HASHES:
                del _remembered[next(iter(_remembered))]
            _remembered[place] = Future()
        digest = _remembered[place]
    if first:
        try:
            digest.set_result(sha256_of(file))
        except BaseException as error:
            digest.set_exception(error)
            with _lock:
                _remembered.pop(place, None)  # the next input tries again
    return digest.result()


def source_hashes(blocks: Iterable[tuple[Path, int]]) -> dict[str, bytes]:
    """Return the sha256 of the encoded audio by id. `blocks` are (file, offset); unreadable blocks are skipped."""
    found: dict[str, bytes] = {}
    for path, offset in blocks:
        try:
            with path.open("rb") as file:
                text, numbers = read_columns(file, offset)
                found |= dict(zip(text["id"], map(bytes, numbers["sha256"])))
        except Exception:  # any layer may be damaged; `verify` reports it
            continue
    return found
