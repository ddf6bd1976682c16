"""Read audio WebDatasets: tars with consecutive members per key, of which one is audio and the others are labels."""

from __future__ import annotations

import bz2
import glob
import gzip
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources.audio import EXTENSIONS
from codecssl.tokenize.sources.inputs import Input, as_label, in_utf8, split_options

OPTIONS = ("audio",)
TEXTS = ("txt", "text", "transcript")
NUMBERS = ("cls", "cls2", "index", "inx", "id")
JSONS = ("json", "jsn")
"""Extensions (last part) of JSON members that become labels, as in webdataset's own decoders."""

OPENERS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
"""Magic bytes of compressed tars and the functions that open them."""


def read_wds(source: str) -> Iterator[Input]:
    """Yield inputs of `wds:PATTERN[?audio=EXTENSION]`: local tars in the order of the braces or of the names of a glob.

    An id is the tar's name and the key. A member `.json` gives a label for each of its keys. Other `.json`, `.txt` and
    `.cls` members give a label named after their extension. A key without audio, or with several audio members of which
    `audio` selects none, is an unreadable input. Audio in an uncompressed tar is read by the process that encodes it.
    Tars joined by `cat` are read to their end. A hard link is read as the file that it names; other links are
    unreadable inputs. Raises UserError for a missing or truncated tar, and for a duplicate key.
    """
    pattern, options = split_options(source, OPTIONS)
    tars = _expand(source, pattern.removeprefix("wds:"))
    root = Path(os.path.commonpath([tar.parent for tar in tars]))
    empty = True
    for tar in tars:
        for item in _from_tar(tar, in_utf8(tar.relative_to(root).as_posix()), options.get("audio", "").lstrip(".")):
            empty = False
            yield item
    if empty:
        raise UserError(f"source {source!r}: no files named KEY.EXTENSION in {len(tars)} tars")


def _expand(source: str, pattern: str) -> list[Path]:
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    if "://" in pattern or pattern.startswith("pipe:"):
        raise UserError(f"source {source!r}: only local tars are read; mount or download them")
    try:
        names = list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise UserError(f"source {source!r}: {error}") from error
    tars: dict[Path, None] = {}
    for name in names:
        found = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))  # noqa: PTH207
        if not found:
            raise UserError(f"source {source!r}: no such tar: {name}")
        tars |= dict.fromkeys(Path(f) for f in found if not Path(f).is_dir())
    if not tars:
        raise UserError(f"source {source!r}: a folder; give its tars, as in 'wds:{pattern}/*.tar'")
    return list(tars)


def _from_tar(tar: Path, name: str, audio: str) -> Iterator[Input]:
    keys: set[str] = set()
    try:
        for sample in _samples(tar):
            if sample.key in keys:
                raise UserError(
                    f"{tar}: key {sample.key!r} comes back after other keys; the members of one key must follow each "
                    "other, as `tar --sort=name` writes them"
                )
            keys.add(sample.key)
            yield sample.input(tar, name, audio)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{tar}: not a whole tar ({error}); make or copy it again") from error
    except OSError as error:  # gzip and bz2 raise it too
        raise UserError(f"{tar}: cannot be read ({error.strerror or error}); make or copy it again") from error


# ---------------------------------------------------------------- samples


class _Sample:
    """Members of one key by extension, and their contents read so far."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: dict[str, tarfile.TarInfo] = {}
        self.contents: dict[str, bytes] = {}
        self.unread: dict[str, str] = {}
        """Reasons why members have no content, by extension."""

    def input(self, tar: Path, name: str, audio: str) -> Input:
        """Build the input of this sample. `audio` is the extension chosen by the user, or ""."""
        labels, problem = self._labels()
        heard = [e for e in self.members if (e == audio if audio else _is_audio(e))]
        if len(heard) != 1:
            problem = "several members with audio; choose by ?audio=EXTENSION" if heard else "no audio"
            problem += f" among its members {' '.join(f'.{e}' for e in self.members)}"
        id = f"{name}/{in_utf8(self.key)}"
        if problem:
            return Input(id=id, path=id, file=str(tar), labels=labels, problem=problem)
        if heard[0] in self.unread:
            return Input(id=id, path=id, file=str(tar), labels=labels, problem=self.unread[heard[0]])
        member, data = self.members[heard[0]], self.contents.get(heard[0])
        return Input(
            id=id,
            path=f"{name}/{in_utf8(member.name.removeprefix('./'))}",
            file=str(tar),
            labels=labels,
            offset=member.offset_data if data is None else None,
            size=member.size,
            data=data,
        )

    def _labels(self) -> tuple[dict[str, Any], str | None]:
        """Return the labels and the description of a problem with them, if any."""
        labels: dict[str, Any] = {}
        for extension, content in self.contents.items():
            kind = extension.rpartition(".")[2]
            try:
                value = as_label(_decoded(kind, content))
            except (ValueError, RecursionError) as error:
                return labels, f"its member .{extension} is not {kind.upper()} ({error})"
            if extension in JSONS and isinstance(value, dict):
                labels |= value
            elif value is not None:
                labels[extension] = value
        return labels, None


def _decoded(kind: str, content: bytes) -> Any:
    if kind in JSONS:
        return json.loads(content)
    if kind not in TEXTS + NUMBERS:
        return None
    text = content.decode("utf-8", "replace").strip()
    return int(text) if kind in NUMBERS and re.fullmatch(r"-?\d+", text) else text


def _is_audio(extension: str) -> bool:
    return f".{extension.rpartition('.')[2]}" in EXTENSIONS


def _is_label(extension: str) -> bool:
    return extension.rpartition(".")[2] in TEXTS + NUMBERS + JSONS


def _samples(tar: Path) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for key, extension, member, content in _members(tar):
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key)
        if extension in sample.members:
            raise UserError(f"{tar}: member {member.name!r} is there twice")
        sample.members[extension] = member
        if isinstance(content, str):
            sample.unread[extension] = content
        elif content is not None:
            sample.contents[extension] = content
    if sample is not None:
        yield sample


# ---------------------------------------------------------------- tars


def _members(tar: Path) -> Iterator[tuple[str, str, tarfile.TarInfo, bytes | str | None]]:
    """Yield (key, extension, member, content) of each file.

    Members that are read in place have no content. Of links that cannot be followed, the content is a str: the reason.
    """
    opener, targets = _opener(tar), dict[str, tarfile.TarInfo]()
    with opener(tar) if opener else tar.open("rb") as file:
        for archive, member in _walk(tar, file):
            key, extension = _split(member.name)
            wanted = _is_label(extension) or opener
            if member.islnk() and extension and not opener:
                targets = targets or {m.name: m for _, m in _walk(tar, file) if m.isreg()}
                if (target := targets.get(member.linkname)) is not None:
                    member.type, member.size, member.offset_data = target.type, target.size, target.offset_data
                    member.sparse = target.sparse  # type: ignore[attr-defined]
            if extension and (member.islnk() or member.issym()):
                kind = "hard" if member.islnk() else "symbolic"
                yield key, extension, member, f"a {kind} link to {in_utf8(member.linkname)}; make the tar with its file"
            elif member.isreg() and extension:
                stream = archive.extractfile(member) if wanted or member.issparse() else None
                yield key, extension, member, stream.read() if stream else None


def _walk(tar: Path, file: Any) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the members of a tar and of those that `cat` joined to it. Each use of `file` keeps its own position."""
    at: int | None = 0
    while at is not None:
        file.seek(at)
        watched = _Watched(file)
        archive = tarfile.open(fileobj=watched, mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep all members
            yield archive, member
        if watched.last != bytes(tarfile.BLOCKSIZE):
            raise UserError(f"{tar}: not a whole tar (its end mark is missing); make or copy it again")
        at = _next_archive(file, archive.offset)


def _next_archive(file: Any, at: int) -> int | None:
    """Return the offset of the first block from `at` that is not zero; None if the file ends before."""
    file.seek(at)
    while block := file.read(tarfile.BLOCKSIZE):
        if block.strip(b"\0"):
            return at
        at += len(block)
    return None


def _opener(tar: Path) -> Callable[[Path], Any] | None:
    with tar.open("rb") as file:
        head = file.read(8)
    return next((opener for magic, opener in OPENERS.items() if head.startswith(magic)), None)


def _split(name: str) -> tuple[str, str]:
    """Split a member's name into key and lower-case extension at the first dot of the base name, as webdataset does.

    If the name ends in an audio or label extension, a dot before a digit belongs to the key, as in
    utt_11.708_13.970.flac.
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    last = extension.rpartition(".")[2].lower()
    if extension[:1].isdigit() and (_is_audio(last) or _is_label(last)):
        match = re.search(r"((?:\.[A-Za-z][^.]*|\.mp3)+)$", base)
        if match and match.start():
            stem, extension = base[: match.start()], match[0][1:]
    if not stem or (not folder and name.startswith("__") and name.endswith("__")):
        return "", ""
    return folder + slash + stem, extension.lower()


class _Watched:
    """File that remembers its last read. tarfile takes a damaged header for the end; the real end is zeros."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell, self.last = file, file.seek, file.tell, b""

    def read(self, size: int = -1) -> bytes:
        self.last = self.file.read(size)
        return self.last
