"""Read audio sources as one ordered stream of inputs: folders, globs, files, manifests, datasets, tars.

The order depends on the names alone, and at most one folder is listed in memory. All tasks of an array walk the same
stream, and each selects its shards. For ids given by users, 8-byte hashes are kept.
"""

from __future__ import annotations

import functools
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources.audio import EXTENSIONS, OTHER_MEDIA
from codecssl.tokenize.sources.inputs import Input, in_utf8
from codecssl.tokenize.sources.manifest import MANIFESTS, TABLES, read_list, read_manifest

__all__ = ["Input", "is_stream", "read_source", "read_sources", "walk"]

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
WILDCARDS = "*?["
HINT_ENTRIES = 10_000
"""Number of entries of a folder without audio that are inspected for the error message."""


left_out: Counter[str] = Counter()
"""Number of skipped files in folders by suffix, since the counter was cleared."""


def read_sources(sources: list[str], skip: int = 0) -> Iterator[Input]:
    """Yield all inputs of all sources in order, except the first `skip`.

    With several sources, ids begin with the source's name. Raises UserError for a source that does not exist, holds no
    audio, or repeats an id (in a stream, among the inputs that are not skipped).
    """
    prefixes = _prefixes(sources)
    for number, (source, prefix) in enumerate(zip(sources, prefixes), 1):
        last = number == len(sources)  # the size of earlier sources must be known
        inputs = read_source(source, skip if last else 0)
        if not last:
            for _ in islice(inputs, skip):
                skip -= 1
        for item in inputs:
            yield item if not prefix else Input(**vars(item) | {"id": f"{prefix}/{item.id}"})


def read_source(source: str, skip: int = 0) -> Iterator[Input]:
    """Yield the inputs of one source except the first `skip`. See `read_sources`."""
    if source.startswith(("hf:", "hf-stream:")):
        from codecssl.tokenize.sources.huggingface import read_hf

        inputs = read_hf(source, skip if is_stream(source) else 0)
        return inputs if is_stream(source) else islice(inputs, skip, None)
    return islice(_read_source(source), skip, None)


def is_stream(source: str) -> bool:
    """True if listing the inputs of `source` downloads their audio, which makes counting them expensive."""
    return source.startswith("hf-stream:")


def _read_source(source: str) -> Iterator[Input]:
    path = Path(source)
    if not source:  # e.g. an unset shell variable; Path() would be the working folder
        raise UserError("source '': an empty name; give . for the working folder")
    if source == "-":
        return read_list(sys.stdin.buffer)
    if source.startswith("wds:"):
        from codecssl.tokenize.sources.webdataset_tars import read_wds

        return read_wds(source)
    if path.is_dir():
        here = "" if path == Path() else str(path)
        files = ((name, os.path.join(here, name)) for name in walk(path))  # noqa: PTH118  (Path takes much longer)
        return _some(_named(files), source)
    if path.is_file():
        return _from_file(path)
    if not _is_plain(source):
        found = {Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file()}  # noqa: PTH207
        named, real = len(list(takewhile(_is_plain, Path(source).parts))), functools.cache(os.path.realpath)
        matches = sorted(p for p in found if not _repeats(real(f) for f in p.parents if len(f.parts) >= named))
        root = Path(os.path.commonpath([p.parent for p in matches])) if matches else Path()
        return _some(_from_paths(matches, root), source)
    raise UserError(f"source {source!r}: no such file or folder")


def _from_file(path: Path) -> Iterator[Input]:
    if path.name.lower().endswith(MANIFESTS):
        return _some(read_manifest(path), str(path), "no rows in it")
    if path.name.lower().endswith(TARS):
        raise UserError(f"source {str(path)!r}: a tar; write wds:{path} for the audio in it")
    return _from_paths([path], path.parent)


def walk(root: Path, within: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Yield the names of the audio files in the folder `within` of `root`, relative to `root`.

    The order is depth first, by the bytes of names. Links are followed except in loops.
    """
    folder = root / within
    try:
        status = folder.stat()
        if (here := (status.st_dev, status.st_ino)) in above:
            return
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        if above:  # becomes an unreadable input; the others are kept
            yield within
            return
        raise UserError(f"{folder}: cannot be listed: {error.strerror}") from error
    for entry in ordered:
        name = f"{within}/{entry.name}" if within else entry.name
        if entry.is_dir():
            yield from walk(root, name, above | {here})
        elif entry.name.startswith("._"):  # macOS metadata files
            left_out["._*"] += 1
        elif entry.name.lower().endswith(EXTENSIONS):
            yield name
        elif entry.name.lower().endswith(OTHER_MEDIA):
            left_out[Path(entry.name).suffix.lower()] += 1


def _is_plain(part: str) -> bool:
    return not any(c in part for c in WILDCARDS)


def _repeats(folders: Iterable[str]) -> bool:
    """True if a path visits a folder twice. "**" follows links in loops and finds a file forty times."""
    passed = list(folders)
    return len(set(passed)) < len(passed)


def _some(inputs: Iterator[Input], source: str, otherwise: str = "") -> Iterator[Input]:
    first = next(inputs, None)
    if first is None:
        otherwise = otherwise or f"no audio found; files must end in {' '.join(EXTENSIONS)}{_hint(Path(source))}"
        raise UserError(f"source {source!r}: {otherwise}")
    yield first
    yield from inputs


def _hint(folder: Path) -> str:
    """Describe the contents of a folder without audio."""
    if not folder.is_dir():
        return ""
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return f". It is a saved dataset: give hf:{folder}:SPLIT"
    paths = sorted(islice(folder.rglob("*"), HINT_ENTRIES))
    if found := [str(p) for p in paths if p.suffix.lower() in TABLES]:
        return f". It holds manifests: give {' or '.join(found[:3])}"
    if found := [str(p) for p in paths if p.name.lower().endswith(TARS)]:
        return f". It holds tars: give 'wds:{Path(found[0]).parent}/*{''.join(Path(found[0]).suffixes)}'"
    if [p for p in paths if p.suffix.lower() in (".parquet", ".arrow")]:
        return f". It holds a dataset: give hf:{folder}:SPLIT"
    return ""


def _from_paths(paths: Iterable[Path], root: Path) -> Iterator[Input]:
    return _named((path.relative_to(root).as_posix(), str(path)) for path in paths)


def _named(files: Iterable[tuple[str, str]]) -> Iterator[Input]:
    """Yield the inputs of files, given as name and local path."""
    for raw, file in files:
        name = in_utf8(raw)  # names that are not UTF-8 must not stop a run
        yield Input(id=name, path=name, file=file)


def _prefixes(sources: list[str]) -> list[str]:
    if not sources:
        raise UserError("no source given; name a folder, a file, a glob or a manifest")
    if len(sources) == 1:
        return [""]
    names = [in_utf8(Path(source).name) or "source" for source in sources]
    if len(set(names)) == len(names):
        return names
    return [f"{i}-{name}" for i, name in enumerate(names)]
