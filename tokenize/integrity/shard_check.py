"""Full check of one shard: its completion record, its tar's sha256, each block's codes and columns.

Damage is located.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.layout import (
    MEL_CRC32,
    load_json,
    mel_offset,
    read_coder,
    read_columns,
    shard_path,
    stored_bytes,
)
from codecssl.tokenize.format.validate import LARGEST
from codecssl.tokenize.format.writer import to_json
from codecssl.tokenize.integrity.damaged_utterances import suspects

CHUNK = 1 << 20
RECORD: dict[str, type] = {
    **dict.fromkeys(("format_version", "shard", "bytes", "inputs", "utterances", "frames", "samples"), int),
    **dict.fromkeys(("sha256", "inputs_sha256"), str),
    **dict.fromkeys(("blocks", "failed"), list),
}
"""Fields of a completion record."""
PLACE = ("offset", "codes_offset", "codes_bytes", "count", "crc32")
"""Fields of a record for each block."""
NAMED = 3
"""Maximum number of reported utterances in a damaged block."""

BlockColumns = tuple[dict[str, Any], dict[str, NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One deviation from the written data."""

    file: str
    """Path relative to the dataset's folder."""
    what: str
    shard: int | None = None
    """Shard to encode again; None if the damaged file is not part of a shard."""
    block: int | None = None
    start: int | None = None
    stop: int | None = None
    """The damage lies in bytes start..stop - 1 of `file`, if known."""

    def __str__(self) -> str:
        if self.shard is None:
            return f"{self.file}: {self.what}"
        return f"shard {self.shard:05d}{'' if self.block is None else f', block {self.block}'}: {self.what}"


@dataclass(kw_only=True)
class Checked:
    """The content of a shard's metadata, and its damages."""

    shard: int
    record: dict[str, Any] | None = None
    """Completion record of the shard; None if it is missing or damaged."""
    sha256: str = ""
    """sha256 of the actual tar."""
    frames: list[NDArray[np.integer] | None] = field(default_factory=list)
    """Frames of the utterances, per block; None if they cannot be read."""
    damages: list[Damage] = field(default_factory=list)
    doubtful: bool = False
    """True if only the tar's sha256 differs: an unused byte of the tar is damaged, or the record's sha256."""


def check_shard(root: Path, shard: int, card: CodecCard, version: int) -> Checked:
    """Read a whole shard in bounded memory. Damage is returned in the result and never raises an exception.

    version: format version that the record must contain.
    """
    return _Check(root, shard, card, version).run()


def read_document(path: Path, indent: int | None = 1) -> dict[str, Any]:
    """Read a JSON file of the format. Raises UserError if any byte differs from the writer's output."""
    value = load_json(path)
    content = path.read_bytes()
    if to_json(json.loads(content), indent) != content:
        raise UserError(f"{path}: damaged: the content differs from what was written")
    return value


class _Check:
    def __init__(self, root: Path, shard: int, card: CodecCard, version: int) -> None:
        self.root, self.card, self.version, self.tar = root, card, version, shard_path(root, shard)
        self.record = self.tar.with_suffix(".json")
        self.found = Checked(shard=shard)
        self.samples = 0

    def run(self) -> Checked:
        record = self._read_record()
        if not self.tar.is_file():
            self._damaged(self.tar, f"{self.tar.name} is missing")
        elif record is not None:
            self._check_tar(record)
        if record is not None and record["inputs"] != record["utterances"] + len(record["failed"]):
            counts = f"{record['utterances']} utterances and {len(record['failed'])} failures"
            self._damaged(self.record, f"{record['inputs']} inputs, but {counts}")
        return self.found

    def _damaged(self, path: Path, what: str, **place: int) -> None:
        file = path.relative_to(self.root).as_posix()
        self.found.damages.append(Damage(file=file, what=what, shard=self.found.shard, **place))

    def _read_record(self) -> dict[str, Any] | None:
        name = self.record.name
        try:
            record = read_document(self.record, indent=None)
        except FileNotFoundError:
            self._damaged(self.record, f"{name} is missing: the shard was never finished")
            return None
        except UserError as error:
            self._damaged(self.record, str(error))
            return None
        wrong = _misfit(record)
        for key, expected in (("shard", self.found.shard), ("format_version", self.version)):
            if not wrong and record[key] != expected:
                wrong = f"{key} {record[key]}, expected {expected}"
        if wrong:
            self._damaged(self.record, f"{name} is damaged: {wrong}")
            return None
        self.found.record = record
        return record

    # ------------------------------------------------------------ the tar

    def _check_tar(self, record: dict[str, Any]) -> None:
        size = self.tar.stat().st_size
        blocks = [place for place in record["blocks"] if place["codes_offset"] + place["codes_bytes"] <= size]
        self.found.sha256, sums = sums_of(self.tar, blocks)
        whole = self.found.sha256 == record["sha256"]
        if size != record["bytes"] and whole:
            self._damaged(self.record, f"{self.record.name} is damaged: {record['bytes']} bytes, the tar has {size}")
        elif size != record["bytes"]:
            lost = len(record["blocks"]) - len(blocks)
            cut = f"; {lost} of {len(record['blocks'])} blocks are cut off" if lost else ""
            bounds = {"start": min(size, record["bytes"]), "stop": max(size, record["bytes"])}
            self._damaged(self.tar, f"{size} bytes, expected {record['bytes']}{cut}", **bounds)
        with self.tar.open("rb") as file:
            for number, (place, crc32) in enumerate(zip(blocks, sums)):
                self._check_block(file, number, place, crc32 == place["crc32"], whole)
            if not whole and not self.found.damages:
                self._check_members(file, record["bytes"])
        if not whole and not self.found.damages:
            self._check_tables(record)
        if not whole and not self.found.damages:
            self.found.doubtful = True
            self._damaged(self.tar, "sha256 differs, though all of it can be read")
        if whole and not self.found.damages:
            self._check_counts(record)

    def _check_block(self, file: BinaryIO, number: int, place: dict[str, int], intact: bool, whole: bool) -> None:
        start, stop = place["codes_offset"], place["codes_offset"] + place["codes_bytes"]
        columns = self._check_columns(file, number, place, whole)
        if columns and not whole and MEL_CRC32 in columns[1]:
            self._check_mel(file, number, place, columns)
        if intact:
            return
        if whole:
            self._damaged(
                self.record, f"{self.record.name} is damaged: crc32 of block {number}; {self.tar.name} is whole"
            )
            return
        named = self._named(place, columns) if columns else ""
        what = f"codes damaged between offsets {start} and {stop}{named}"
        self._damaged(self.tar, what, block=number, start=start, stop=stop)

    def _check_mel(self, file: BinaryIO, number: int, place: dict[str, int], columns: BlockColumns) -> None:
        """Check the log-mel planes of a damaged tar, utterance by utterance."""
        ids, numbers = columns[0]["id"], columns[1]
        frames = self.card.frames_of(numbers["samples"].astype(np.int64)).tolist()
        at = mel_offset(place["codes_offset"], place["codes_bytes"])
        file.seek(at - tarfile.BLOCKSIZE)
        try:
            size = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape").size
        except tarfile.HeaderError:
            what, start = f"tar header damaged at offset {at - tarfile.BLOCKSIZE}", at - tarfile.BLOCKSIZE
            self._damaged(self.tar, what, block=number, start=start, stop=at)
            return
        bands = size // max(1, sum(frames))
        for name, count, crc32 in zip(ids, frames, numbers[MEL_CRC32].tolist()):
            if zlib.crc32(file.read(count * bands)) != crc32:
                what = f"log-mel plane of utterance {name} damaged between offsets {at} and {at + count * bands}"
                self._damaged(self.tar, what, block=number, start=at, stop=at + count * bands)
                return
            at += count * bands

    def _check_columns(self, file: BinaryIO, number: int, place: dict[str, int], whole: bool) -> BlockColumns | None:
        """Return the columns of a block, unless they are damaged or do not fit its codes."""
        start, stop = place["offset"], place["codes_offset"]
        try:
            columns = read_columns(file, start)
            frames = self.card.frames_of(columns[1]["samples"].astype(np.int64))
            stored = stored_bytes(columns[1], frames, self.card)
            fits = len(columns[0]["id"]) == len(frames) == place["count"] and stored.sum() == place["codes_bytes"]
            problem = "" if fits else f"it does not fit {place['count']} utterances of {place['codes_bytes']} bytes"
        except Exception as error:  # a flipped bit can break any layer: tar, zip, gzip, JSON
            problem = type(error).__name__
        if not problem:
            self.found.frames.append(frames)
            self.samples += int(columns[1]["samples"].sum())
            return columns
        self.found.frames.append(None)
        if whole:
            what = f"{self.record.name} is damaged: place of block {number} ({problem}); {self.tar.name} is whole"
            self._damaged(self.record, what)
        else:
            what = f"index damaged between offsets {start} and {stop} ({problem})"
            self._damaged(self.tar, what, block=number, start=start, stop=stop)
        return None

    def _named(self, place: dict[str, int], columns: BlockColumns) -> str:
        """List the utterances of a damaged block whose own bytes show the damage."""
        text, numbers = columns
        codes = np.memmap(self.tar, np.uint8, "r", place["codes_offset"], (place["codes_bytes"],))
        try:
            coder = read_coder(self.tar, self.card) if "stream_words" in numbers else None
        except UserError as error:
            return f"; {error}"
        found = islice(suspects(codes, numbers, self.card, coder), NAMED)
        first = place["codes_offset"]
        named = (f"{text['id'][i]} (offsets {first + a} to {first + b}): {what}" for i, a, b, what in found)
        return "".join(f"; utterance {each}" for each in named)

    def _check_tables(self, record: dict[str, Any]) -> None:
        """Check the tables at the beginning of an entropy-coded shard."""
        stop = record["blocks"][0]["offset"] if record["blocks"] else 0
        if not stop:
            return
        try:
            read_coder(self.tar, self.card)
        except UserError:
            self._damaged(self.tar, f"tables damaged between offsets 0 and {stop}", start=0, stop=stop)

    def _check_members(self, file: BinaryIO, end: int) -> None:
        """Find damage outside the blocks' content: in a tar header, in padding, or in the zeros at the end."""
        offset = 0
        while offset < end - 2 * tarfile.BLOCKSIZE:
            file.seek(offset)
            content = offset + tarfile.BLOCKSIZE
            try:
                member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "strict")
                if not 0 <= member.size <= end - content:
                    raise tarfile.HeaderError("a member longer than the tar")
            except (tarfile.HeaderError, UnicodeDecodeError):
                self._damaged(self.tar, f"tar header damaged at offset {offset}", start=offset, stop=content)
                return
            offset = content + member.size + -member.size % tarfile.BLOCKSIZE
            self._check_zeros(file, content + member.size, offset)
        self._check_zeros(file, offset, end)

    def _check_zeros(self, file: BinaryIO, start: int, stop: int) -> None:
        file.seek(start)
        if place := next((at for at, byte in enumerate(file.read(stop - start), start) if byte), None):
            self._damaged(self.tar, f"filling damaged at offset {place}", start=place, stop=place + 1)

    def _check_counts(self, record: dict[str, Any]) -> None:
        """Compare the counts of a record with those of its intact tar."""
        frames = [f for f in self.found.frames if f is not None]
        counts = {"utterances": sum(map(len, frames)), "frames": int(sum(f.sum() for f in frames))}
        for key, count in (counts | {"samples": self.samples}).items():
            if record[key] != count:
                self._damaged(self.record, f"{self.record.name} is damaged: {record[key]} {key}, the tar has {count}")


def _misfit(record: dict[str, Any]) -> str:
    """Describe an error in the form of a record, or return ""."""
    notes = record.get("notes", {})
    ids = notes.values() if isinstance(notes, dict) else [None]
    if not all(isinstance(each, list) and all(isinstance(id, str) for id in each) for each in ids):
        return f"notes {str(notes)[:60]!r}"
    if odd := sorted(RECORD.keys() ^ (record.keys() - {"notes"})):
        return f"{'no' if odd[0] in RECORD else 'unknown'} {odd[0]!r}"
    for key, kind in RECORD.items():
        if type(record[key]) is not kind or (kind is int and not 0 <= record[key] < LARGEST):
            return f"{key} {str(record[key])[:60]!r}"
    end = 0
    for number, place in enumerate(record["blocks"]):
        if type(place) is not dict or any(type(place.get(key)) is not int for key in PLACE):
            return f"block {number} lacks its place"
        if max(place["count"], place["crc32"]) >= 1 << 32 or max(place[key] for key in PLACE) >= LARGEST:
            return f"block {number} has a place beyond all files"
        if not end <= place["offset"] < place["codes_offset"] or min(place[key] for key in PLACE) < 0:
            return f"block {number} overlaps the one before"
        end = place["codes_offset"] + place["codes_bytes"]
    return "" if end <= record["bytes"] else "its blocks are longer than the tar"


def sums_of(path: Path, blocks: Sequence[dict[str, int]]) -> tuple[str, list[int]]:
    """Compute the sha256 of a file and the crc32 of each block's codes in one pass."""
    digest, sums, at = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        for place in blocks:
            for chunk in _chunks(file, place["codes_offset"] - at):
                digest.update(chunk)
            crc32 = 0
            for chunk in _chunks(file, place["codes_bytes"]):
                digest.update(chunk)
                crc32 = zlib.crc32(chunk, crc32)
            sums.append(crc32)
            at = place["codes_offset"] + place["codes_bytes"]
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest(), sums


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size and (chunk := file.read(min(size, CHUNK))):
        size -= len(chunk)
        yield chunk
