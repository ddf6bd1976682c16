"""One input of a run: what it is called and how any process opens its audio."""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources.open_audio import Held, open_file

QUERY = re.compile(r"\?(?=[a-z]+=)")


@dataclass(frozen=True, kw_only=True)
class Input:
    """One utterance to encode: a file, a segment of one, a member of a tar, or a row of a dataset."""

    id: str
    """Unique within the dataset."""
    path: str
    """As the user wrote it: relative to the source's root."""
    file: str
    """Where it lies on this machine: the audio file, or the tar or Arrow file that holds it."""
    start: float | None = None
    """Seconds; None is the file's start."""
    end: float | None = None
    duration: float | None = None
    """Seconds from the start, where the source gives no end: what a manifest says of a file's length."""
    channel: int | None = None
    """The one channel to take, counted from 0; None is their mean."""
    labels: dict[str, Any] = field(default_factory=dict)
    """The source's other columns: what JSON can hold."""
    offset: int | None = None
    """Byte of `file` at which the audio begins, where it is one part of it."""
    size: int | None = None
    """Bytes of the encoded audio (of a decoded array: samples), where the source tells without reading it."""
    row: int | None = None
    """Row of `file` where that is an Arrow file."""
    column: str | None = None
    """Column of that row."""
    data: bytes | None = field(default=None, repr=False)
    """The encoded audio itself, where it can be read once only."""
    problem: str | None = None
    """Why there is no audio to open."""

    def open(self) -> BinaryIO:
        """The encoded audio as a seekable binary file that the caller closes; `name` is the input's path.

        Raises UserError when it cannot be read.
        """
        if self.problem is not None:
            raise UserError(self.problem)
        if self.data is not None:
            return Held(self.data, self.path)
        if self.row is not None:
            from codecssl.tokenize.sources.arrow_audio import open_row  # imports pyarrow

            return open_row(self.file, str(self.column), self.row, self.path)
        if "://" in self.file:
            from codecssl.tokenize.sources.arrow_audio import open_url

            return open_url(self.file, self.path)
        return open_file(self.file, self.path, self.offset, self.size, held=self.start is None and self.end is None)

    def digest(self) -> bytes:
        """Changes when the input's name, segment or labels do, or its place or size in a tar or dataset."""
        parts: list[Any] = [self.id, self.path, self.start, self.end, self.labels]
        place = [self.offset, self.size, self.row, self.column, self.problem]
        if self.channel is not None:
            parts.append({"channel": self.channel})
        if any(part is not None for part in place):  # plain files have the digest that they always had
            parts.append(place)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).digest()


# ---------------------------------------------------------------- names, labels, options


class Seen:
    """Names met so far, as 8-byte hashes in an open-addressing table: 11 to 22 bytes a name, where a set takes 70."""

    def __init__(self) -> None:
        self._slots, self._count = array("Q", bytes(8 << 10)), 0

    def add(self, name: str) -> bool:
        """Whether `name` is new. Two different names of 100 million are taken for one with a chance of 0.03 %."""
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        if not self._put(int.from_bytes(digest, "little") or 1):  # 0 marks an empty slot
            return False
        self._count += 1
        if 4 * self._count > 3 * len(self._slots):
            keys, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
            for key in keys:
                if key:
                    self._put(key)
        return True

    def _put(self, key: int) -> bool:
        slots, mask = self._slots, len(self._slots) - 1
        place = key & mask
        while (there := slots[place]) != key:
            if not there:
                slots[place] = key
                return True
            place = (place + 1) & mask
        return False


def in_utf8(name: str) -> str:
    """`name` as text that can be written: what is not UTF-8 in it, as its escape."""
    return name.encode("utf-8", "backslashreplace").decode()


def as_label(value: Any) -> Any:
    """`value` as JSON holds it: numbers that are none become None, what JSON has no word for its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return in_utf8(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [as_label(v) for v in value]
    if isinstance(value, dict):
        return {str(k): as_label(v) for k, v in value.items()}
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def split_options(source: str, known: Iterable[str]) -> tuple[str, dict[str, str]]:
    """`NAME?key=value&key=value` as (NAME, options). A "?" that no `key=` follows belongs to the name.

    Raises UserError for a key that is not among `known`.
    """
    name, *rest = QUERY.split(source, maxsplit=1)
    options = dict(pair.partition("=")[::2] for pair in rest[0].split("&")) if rest else {}
    for key in options:
        if key not in known:
            raise UserError(f"source {source!r}: unknown option {key!r}; there are {', '.join(known)}")
    return name, options
