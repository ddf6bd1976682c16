"""Where audio comes from: folders, globs, single files and manifests, as one ordered stream of inputs.

The order is fixed by the names alone, and nothing is listed in memory beyond one folder: a task of an array walks the
same stream as its siblings and picks its shards.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from codecssl.tokenize.audio import EXTENSIONS
from codecssl.tokenize.errors import UserError

MANIFESTS = (".tsv", ".csv", ".jsonl")
RESERVED = ("path", "id", "start", "end")


@dataclass(frozen=True, kw_only=True)
class Input:
    """One utterance to encode: a file or a segment of one."""

    id: str
    """Unique within the dataset."""
    path: str
    """As the user wrote it: relative to the source's root."""
    file: str
    """Where it lies on this machine."""
    start: float | None = None
    """Seconds; None is the file's start."""
    end: float | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    """The manifest's other columns."""

    def open(self) -> BinaryIO:
        """The encoded audio as a seekable binary file; the caller closes it. Raises UserError when it cannot be read."""
        try:
            return open(self.file, "rb")
        except OSError as error:
            raise UserError(f"cannot read: {error.strerror}") from error

    def digest(self) -> bytes:
        """Changes when the input's name, segment or labels do."""
        parts = [self.id, self.path, self.start, self.end, self.labels]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).digest()


def read_sources(sources: list[str]) -> Iterator[Input]:
    """All inputs of all sources, in order; where there are several, ids begin with the source's name.

    Raises UserError for a source that does not exist, holds no audio, or repeats an id.
    """
    prefixes = _prefixes(sources)
    for source, prefix in zip(sources, prefixes):
        for item in read_source(source):
            yield item if not prefix else Input(**vars(item) | {"id": f"{prefix}/{item.id}"})


def read_source(source: str) -> Iterator[Input]:
    """Inputs of one source. See `read_sources`."""
    path = Path(source)
    if path.is_dir():
        return _some(_from_paths(walk(path), path), source)
    if path.is_file() and path.suffix.lower() in MANIFESTS:
        return _some(_from_manifest(path), source)
    if path.is_file():
        return _from_paths([path], path.parent)
    if any(c in source for c in "*?["):
        matches = sorted(Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file())  # noqa: PTH207
        root = Path(os.path.commonpath([p.parent for p in matches])) if matches else Path()
        return _some(_from_paths(matches, root), source)
    raise UserError(f"source {source!r}: no such file or folder")


def walk(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Audio files below `folder`, depth first, ordered by their names' bytes; links are followed, not in circles."""
    status = folder.stat()
    if (here := (status.st_dev, status.st_ino)) in above:
        return
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in ordered:
        if entry.is_dir():
            yield from walk(Path(entry.path), above | {here})
        elif entry.name.lower().endswith(EXTENSIONS):
            yield Path(entry.path)


def _some(inputs: Iterator[Input], source: str) -> Iterator[Input]:
    first = next(inputs, None)
    if first is None:
        raise UserError(f"source {source!r}: no audio found; files must end in {' '.join(EXTENSIONS)}")
    yield first
    yield from inputs


def _from_paths(paths: Iterable[Path], root: Path) -> Iterator[Input]:
    for path in paths:
        name = path.relative_to(root).as_posix()
        name = name.encode("utf-8", "replace").decode()  # names that are not UTF-8 must not stop a run
        yield Input(id=name, path=name, file=str(path))


def _from_manifest(manifest: Path) -> Iterator[Input]:
    seen: set[int] = set()
    for number, row in _rows(manifest):
        if not row.get("path"):
            raise UserError(f"{manifest}, line {number}: no 'path' column; the columns are {', '.join(row)}")
        path = str(row["path"])
        start, end = _seconds(manifest, number, row, "start"), _seconds(manifest, number, row, "end")
        if start is not None and end is not None and end <= start:
            raise UserError(f"{manifest}, line {number}: end {end} is not after start {start}")
        segment = "" if start is None and end is None else f"#{start or 0:g}-{'' if end is None else f'{end:g}'}"
        name = str(row.get("id") or path + segment)
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        if key in seen:
            raise UserError(f"{manifest}, line {number}: id {name!r} is there twice; ids must be unique")
        seen.add(key)
        labels = {k: v for k, v in row.items() if k not in RESERVED}
        file = str(manifest.parent / path)
        yield Input(id=name, path=path, file=file, start=start, end=end, labels=labels)


def _rows(manifest: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with manifest.open(encoding="utf-8", newline="") as file:
        if manifest.suffix.lower() == ".jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_row(manifest, number, line)
            return
        delimiter = "\t" if manifest.suffix.lower() == ".tsv" else ","
        for number, row in enumerate(csv.DictReader(file, delimiter=delimiter), 2):
            if None in row or None in row.values():
                raise UserError(f"{manifest}, line {number}: another number of fields than the header has")
            yield number, dict(row)


def _json_row(manifest: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{manifest}, line {number}: not JSON ({error.msg})") from error
    if not isinstance(row, dict):
        raise UserError(f"{manifest}, line {number}: a row must be a JSON object, this is {type(row).__name__}")
    return row


def _seconds(manifest: Path, number: int, row: dict[str, Any], column: str) -> float | None:
    value = row.get(column)
    if value in (None, ""):
        return None
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"{manifest}, line {number}: {column} {value!r} is not a number of seconds") from None
    if seconds < 0:
        raise UserError(f"{manifest}, line {number}: {column} {seconds} is negative")
    return seconds


def _prefixes(sources: list[str]) -> list[str]:
    if not sources:
        raise UserError("no source given; name a folder, a file, a glob or a manifest")
    if len(sources) == 1:
        return [""]
    names = [Path(source).name or "source" for source in sources]
    if len(set(names)) == len(names):
        return names
    return [f"{i}-{name}" for i, name in enumerate(names)]
