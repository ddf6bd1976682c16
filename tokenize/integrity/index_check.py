"""Comparison of index.npy, blocks.npy, failed.jsonl and the totals of dataset.json with the shards."""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.format.layout import BLOCK
from codecssl.tokenize.format.writer import to_json
from codecssl.tokenize.integrity.shard_check import Checked, Damage

SUMS = ("inputs", "utterances", "frames", "samples", "bytes")
"""Totals that are sums over the shards."""
NPY_MAGIC = b"\x93NUMPY\x01\x00"
NARROW, WIDE = np.dtype("<u2"), np.dtype("<u4")


class SideFiles:
    """Takes the checked shards in order, then reports damage of the files derived from them."""

    def __init__(self, root: Path) -> None:
        self.index = Expected(root / "index.npy")
        self.blocks = Expected(root / "blocks.npy")
        self.failed = Expected(root / "failed.jsonl")
        self.kind = self.index.open_array((NARROW, WIDE))
        self.blocks.open_array((BLOCK,))
        self.sums: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.blocks_seen = self.utterances = self.longest = 0
        self.recorded, self.actual = hashlib.sha256(), hashlib.sha256()
        self.doubtful: list[Damage] = []
        self.lost = False
        """Set after a shard with a damaged record: the following positions are unknown."""

    def take(self, checked: Checked) -> None:
        """Compare the side files with the next shard."""
        record = checked.record
        if record is None or any(damage.file.endswith(".json") for damage in checked.damages):
            self.lost = True
        if record is None or self.lost:
            return
        unread = [None] * (len(record["blocks"]) - len(checked.frames))
        for place, frames in zip(record["blocks"], [*checked.frames, *unread]):
            self._take_block(checked.shard, place, frames)
        for failure in record["failed"]:
            self.failed.compare(to_json(failure, indent=None))
        self.sums.update({key: record[key] for key in SUMS} | {"failed": len(record["failed"]), "shards": 1})
        self.notes.update({note: len(ids) for note, ids in record.get("notes", {}).items()})
        self.recorded.update(record["sha256"].encode())
        self.actual.update(checked.sha256.encode())
        if checked.doubtful:
            self.doubtful += checked.damages

    def _take_block(self, shard: int, place: dict[str, int], frames: NDArray[np.integer] | None) -> None:
        places = (place[key] for key in ("offset", "codes_offset", "codes_bytes", "crc32"))
        self.blocks.compare(np.array([(shard, self.utterances, place["count"], *places)], BLOCK).tobytes())
        if frames is None:
            self.index.skip(place["count"] * self.kind.itemsize)
        else:
            self.index.compare(frames.astype(self.kind).tobytes())
            self.longest = max(self.longest, int(frames.max(initial=0)))
        self.blocks_seen += 1
        self.utterances += place["count"]

    def settle(self, damages: Sequence[Damage], header: dict[str, Any] | None) -> list[Damage]:
        """If a tar and its record differ only in the sha256, decide with dataset.json which one is damaged."""
        if self.lost or header is None or header["sha256"] != self.actual.hexdigest():
            return list(damages)
        return [_of_the_mark(damage) if damage in self.doubtful else damage for damage in damages]

    def finish(self, header: dict[str, Any] | None, card: CodecCard) -> Iterator[Damage]:
        """Yield damages of the files. Their ends and totals are checked only if all shards could be counted."""
        if not self.lost:
            self.index.end_array(WIDE if self.longest >= 1 << 16 else NARROW, self.utterances)
            self.blocks.end_array(BLOCK, self.blocks_seen)
            self.failed.end()
        yield from (file.damage for file in (self.index, self.blocks, self.failed) if file.damage)
        if header is not None and not self.lost:
            yield from self._check_sums(header, card)

    def _check_sums(self, header: dict[str, Any], card: CodecCard) -> Iterator[Damage]:
        expected: dict[str, float] = {key: self.sums[key] for key in (*SUMS, "failed", "shards")}
        expected["hours"] = round(self.sums["samples"] / card.sample_rate / 3600, 4)
        for key, count in expected.items():
            if header["totals"][key] != count:
                yield Damage(file="dataset.json", what=f"{header['totals'][key]} {key}, the shards have {count}")
        if header["totals"].get("notes", {}) != self.notes:
            found = header["totals"].get("notes", {})
            yield Damage(file="dataset.json", what=f"notes {found}, the shards have {dict(self.notes)}")
        if not self.doubtful and header["sha256"] != self.recorded.hexdigest():
            yield Damage(file="dataset.json", what="sha256 differs from the shards'")


def _of_the_mark(damage: Damage) -> Damage:
    tar = Path(damage.file)
    record = tar.with_suffix(".json")
    what = f"{record.name} is damaged: its sha256; {tar.name} is whole"
    return Damage(file=record.as_posix(), what=what, shard=damage.shard)


class Expected:
    """A file with known content, compared piece by piece. The first difference is kept as `damage`."""

    def __init__(self, path: Path) -> None:
        self.name, self.at = path.name, 0
        self.damage: Damage | None = None
        self.header = ""
        try:
            if path.exists() and not path.is_file():
                raise OSError(0, "not a regular file")
            self.file: BinaryIO = path.open("rb")
        except OSError as error:
            self._damaged(f"cannot be read: {error.strerror}")

    def _damaged(self, what: str, **place: int) -> None:
        self.damage = self.damage or Damage(file=self.name, what=what, **place)

    def compare(self, expected: bytes) -> None:
        """Compare the next bytes of the file with these."""
        if self.damage:
            return
        found = self.file.read(len(expected))
        if found != expected:
            pairs = zip(found, expected)
            at = self.at + next((i for i, (a, b) in enumerate(pairs) if a != b), len(found))
            self._damaged(f"differs from the shards at offset {at}", start=at, stop=at + 1)
        self.at += len(expected)

    def skip(self, size: int) -> None:
        """Skip bytes with unknown content."""
        if not self.damage:
            self.at += size
            self.file.seek(self.at)

    def end(self) -> None:
        """Check that the file ends here."""
        if not self.damage and self.file.read(1):
            self._damaged(f"continues after offset {self.at}, where the shards end", start=self.at)

    # ------------------------------------------------------------ .npy

    def open_array(self, kinds: Sequence[np.dtype[Any]]) -> np.dtype[Any]:
        """Read the header of a .npy file. Its data, of one of `kinds`, follows."""
        if self.damage:
            return kinds[0]
        magic = self.file.read(10)
        self.at = 10 + int.from_bytes(magic[8:], "little")
        self.header = self.file.read(self.at - 10).decode("latin1")
        try:
            described = np.lib.format.descr_to_dtype(ast.literal_eval(self.header.strip())["descr"])
        except Exception:  # the header is a Python literal: a flipped bit can raise any error
            described = None
        if magic[:8] == NPY_MAGIC and described is not None and described in kinds:
            return described
        self._damaged("its header is damaged", start=0, stop=self.at)
        return kinds[0]

    def end_array(self, kind: np.dtype[Any], count: int) -> None:
        """Check that the file ends here and that its header describes `count` values of this kind."""
        self.end()
        if self.damage:
            return
        found = ast.literal_eval(self.header.strip())
        expected = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (count,)}
        text = self.header.rstrip(" \n")  # a newer numpy may leave more room: the rest must be blank
        blank = self.header[len(text) :]
        if found != expected or not text.isprintable() or blank.strip(" ") != "\n":
            self._damaged(f"its header is damaged: {text[:100]!r}", start=0, stop=self.at)
