"""Inputs of a run: their names, and how any process opens their audio."""

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
from codecssl.tokenize.format.stored import StoredPlace
from codecssl.tokenize.sources.open_audio import Held, open_file

QUERY = re.compile(r"\?(?=[a-z]+=)")


@dataclass(frozen=True, kw_only=True)
class Input:
    """One utterance to encode: a file, a segment of one, a member of a tar, or a row of a dataset."""

    id: str
    """Unique within the dataset."""
    path: str
    """Path as given by the user, relative to the source's root."""
    file: str
    """Local path of the audio file, or of the tar or Arrow file that holds it."""
    start: float | None = None
    """Start in seconds; None is the file's start."""
    end: float | None = None
    duration: float | None = None
    """Seconds from the start if the source gives no end, e.g. the file's length in a manifest."""
    channel: int | None = None
    """Selected channel, counted from 0; None is the mean of all channels."""
    labels: dict[str, Any] = field(default_factory=dict)
    """Other columns of the source, as JSON values."""
    offset: int | None = None
    """Byte offset of the audio in `file`, if it is a part of it."""
    size: int | None = None
    """Bytes of the encoded audio, or samples of a decoded array, if known without reading it."""
    row: int | None = None
    """Row of `file` if it is an Arrow file."""
    column: str | None = None
    """Audio column of that row."""
    data: bytes | None = field(default=None, repr=False)
    """The encoded audio itself, if it can be read only once."""
    problem: str | None = None
    """Reason why there is no audio to open."""

    def open(self) -> BinaryIO:
        """Open the encoded audio as a seekable binary file. The caller closes it; its `name` is the input's path.

        Raises UserError if it cannot be read.
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
        """Hash of the input's name, segment and labels, and of its place and size in a tar or dataset."""
        parts: list[Any] = [self.id, self.path, self.start, self.end, self.labels]
        place = [self.offset, self.size, self.row, self.column, self.problem]
        if self.channel is not None:
            parts.append({"channel": self.channel})
        if any(part is not None for part in place):  # keeps the digests of plain files unchanged
            parts.append(place)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).digest()


@dataclass(frozen=True, kw_only=True)
class KeptInput(Input):
    """An input that was encoded before. Its codes are taken from their shard."""

    stored: StoredPlace


# ---------------------------------------------------------------- names, labels, options


class Seen:
    """Set of names as 8-byte hashes in an open-addressing table. It takes 11 to 22 bytes per name, a set takes 70."""

    def __init__(self) -> None:
        self._slots, self._count = array("Q", bytes(8 << 10)), 0

    def add(self, name: str) -> bool:
        """Add `name` and return True if it is new. The chance of a collision among 100 million names is 0.03 %."""
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
    """Return `name` with bytes that are not UTF-8 escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


MOST_DEPTH = 32
"""Maximum depth of nested lists and dicts in a label."""


def as_label(value: Any, depth: int = 0) -> Any:
    """Convert `value` for JSON. Non-finite numbers become None, unsupported types become text.

    Raises UserError for values nested deeper than MOST_DEPTH.
    """
    if depth > MOST_DEPTH:
        raise UserError(f"a label is nested more than {MOST_DEPTH} deep")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return in_utf8(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [as_label(v, depth + 1) for v in value]
    if isinstance(value, dict):
        return {in_utf8(str(k)): as_label(v, depth + 1) for k, v in value.items()}
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def split_options(source: str, known: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Split `NAME?key=value&key=value` into NAME and options. A "?" without a following `key=` belongs to the name.

    Raises UserError for a key that is not in `known`.
    """
    name, *rest = QUERY.split(source, maxsplit=1)
    options = dict(pair.partition("=")[::2] for pair in rest[0].split("&")) if rest else {}
    for key in options:
        if key not in known:
            raise UserError(f"source {source!r}: unknown option {key!r}; there are {', '.join(known)}")
    return name, options
