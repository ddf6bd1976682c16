"""Paths of weights that the user has named on this machine.

A codec card in a dataset or a model names the weights that wrote it. The card may come from a stranger, so a path in it
is used only if the user has given the same path to a command before, and if the files are still the same. The record
is one small file per path in $XDG_CACHE_HOME/codecssl/weights.

A command's `--codec-weights` is passed to every codec that it loads by a card, also in its worker processes, by the
environment variable CODECSSL_CODEC_WEIGHTS.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from codecssl.tokenize.common.files import write_atomic
from codecssl.tokenize.common.hashing import file_sha256

MOST_FILES = 1000
"""Maximum number of files of a recorded folder."""

VARIABLE = "CODECSSL_CODEC_WEIGHTS"
"""Environment variable with the paths or URLs of `--codec-weights`, one per line."""


@contextmanager
def giving(sources: Sequence[str]) -> Iterator[None]:
    """Use `sources` for codecs that are loaded by a card while the context is open. No sources change nothing."""
    before = os.environ.get(VARIABLE)
    if sources:
        os.environ[VARIABLE] = "\n".join(sources)
    try:
        yield
    finally:
        if sources:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


def given() -> list[str]:
    """Return the paths and URLs that the user gave for codecs that a card names."""
    return os.environ.get(VARIABLE, "").split("\n") if os.environ.get(VARIABLE) else []


def cache_folder() -> Path:
    """Return the folder in which codecssl keeps downloads and records: $XDG_CACHE_HOME/codecssl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codecssl"


def remember(source: str) -> None:
    """Record that the user gave `source`, a file or folder of weights, and the sha256 of its content."""
    path = Path(source).resolve()
    files = _files(path)
    if not files:
        return
    sizes = _sizes(files)
    known = _read(_record(path))
    if known.get("sizes") != sizes:
        with suppress(OSError):  # without a writable home, the user names the weights each time
            record = _record(path)
            record.parent.mkdir(parents=True, exist_ok=True)
            content = {"path": str(path), "sizes": sizes, "sha256": file_sha256(*files)}
            write_atomic(record, json.dumps(content).encode())


def is_known(source: str) -> bool:
    """Return whether the user gave `source` before and its files have the same sha256 as then."""
    path = Path(source).resolve()
    known = _read(_record(path))
    files = _files(path) if known else []
    return bool(files) and known.get("sha256") == file_sha256(*files)


def _record(path: Path) -> Path:
    key = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    return cache_folder() / "weights" / f"{key}.json"


def _read(record: Path) -> dict[str, object]:
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _files(path: Path) -> list[Path]:
    """Return the file itself, or the regular files of a folder at any depth; [] for anything else and for too many."""
    if path.is_file():
        return [path]
    found = list(islice((p for p in path.rglob("*") if p.is_file()), MOST_FILES + 1)) if path.is_dir() else []
    return sorted(found) if len(found) <= MOST_FILES else []


def _sizes(files: list[Path]) -> list[list[object]]:
    """Name, size and modification time of each file. Files with equal values need not be hashed again."""
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
