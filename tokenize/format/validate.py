"""Validation of all metadata in a dataset's files, before it is used.

A dataset may be damaged or come from an untrusted source. Each function raises UserError in one line for an invalid
count, offset, dtype or size. The cost does not grow with the corpus, except for one pass over blocks.npy, which is
read in any case.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError, one_line

MOST_TEXT = 1 << 28
"""Maximum size in bytes of a block's decompressed text columns."""
MOST_MEMBER = 1 << 30
"""Maximum size in bytes of a block's columns in the tar, and of its decompressed number columns."""
LARGEST = 1 << 50
"""Exclusive upper bound of offsets, sizes and counts."""
TOTALS = ("inputs", "utterances", "frames", "samples", "bytes", "failed", "shards")
NUMBERS = {"samples": "u", "source_rate": "u", "source_rest": "i"}
"""Number columns of a block with one value per utterance, and their dtype kinds."""


# ---------------------------------------------------------------- JSON files


def check_header(header: Mapping[str, Any], file: Path) -> None:
    """Check the fields of dataset.json apart from its codec card."""
    totals = header.get("totals")
    if not isinstance(totals, dict):
        raise UserError(f"{file}: damaged: the totals are missing")
    for key in TOTALS:
        _whole(totals.get(key), f"totals.{key}", file)
    hours = totals.get("hours")
    if isinstance(hours, bool) or not isinstance(hours, (int, float)) or not math.isfinite(hours):
        raise UserError(f"{file}: damaged, totals.hours is {_shown(hours)}")
    notes = totals.get("notes", {})
    if not isinstance(notes, dict):
        raise UserError(f"{file}: damaged, totals.notes is {_shown(notes)}")
    for note, count in notes.items():
        _whole(count, f"totals.notes.{note}"[:60], file)
    if not isinstance(header.get("sha256"), str):
        raise UserError(f"{file}: damaged, sha256 is {_shown(header.get('sha256'))}")
    check_plan(header, file)


def check_plan(plan: Mapping[str, Any], file: Path) -> None:
    """Check the codec card and the fields that plan.json and dataset.json have in common."""
    try:
        CodecCard.from_dict(plan["codec"])
    except (KeyError, UserError) as error:
        raise UserError(f"{file}: damaged, {'no codec' if isinstance(error, KeyError) else error}") from error
    sources = plan.get("sources", [])
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise UserError(f"{file}: damaged, sources is {_shown(sources)}")
    if plan.get("inputs") is not None:
        _whole(plan["inputs"], "inputs", file)
    for key in ("shard_inputs", "block_inputs"):
        if key in plan:
            _whole(plan[key], key, file, least=1)
    seconds = plan.get("block_seconds", 1.0)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise UserError(f"{file}: damaged, block_seconds is {_shown(seconds)}")
    if not isinstance(plan.get("compression") or "", str):
        raise UserError(f"{file}: damaged, compression is {_shown(plan['compression'])}")


def _whole(value: Any, name: str, file: Path, least: int = 0) -> None:
    if type(value) is not int or not least <= value < LARGEST:
        raise UserError(f"{file}: damaged, {name} is {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < LARGEST else "too large"
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- index.npy and blocks.npy


def read_array(path: Path, kinds: Iterable[Any], *, mapped: bool = False) -> NDArray[Any]:
    """Read or map a .npy file [N]. Its dtype must be one of `kinds`, and its size must match its header."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")
        with path.open("rb") as file:
            dtype, count = _array_header(file)
            start, size = file.tell(), path.stat().st_size
            if dtype not in [np.dtype(kind) for kind in kinds] or start + count * dtype.itemsize != size:
                raise ValueError(f"{count} values of {dtype} do not fit its {size} bytes")
            if mapped and count:
                return np.memmap(path, dtype, "r", start, (count,))
            return np.fromfile(file, dtype, count)
    except Exception as error:  # the header is a Python literal: a flipped bit can raise any error
        remedy = f"`codecssl-tokenize repair {path.parent}` writes it again"
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {remedy}") from error


def _array_header(file: Any) -> tuple[np.dtype[Any], int]:
    """Read the dtype and length of the vector in a .npy stream. The stream is then at the vector's data."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject or len(shape) != 1 or not 0 <= shape[0] < LARGEST:
        raise ValueError(f"shape {shape} of {dtype}")
    return dtype, shape[0]


def check_blocks(blocks: NDArray[Any], utterances: int, shards: int, file: Path) -> None:
    """Check that the blocks are contiguous, in the dataset's utterances and in the bytes of each shard."""
    counts, shard = blocks["count"].astype(np.int64), blocks["shard"].astype(np.int64)
    ends = np.cumsum(counts)
    wide = {name: blocks[name] for name in ("first", "offset", "codes_offset", "codes_bytes")}
    sound = all((column < LARGEST).all() for column in wide.values())
    if sound:
        first, offset, codes_offset, codes_bytes = (column.astype(np.int64) for column in wide.values())
        same = shard[1:] == shard[:-1]
        sound = (
            np.array_equal(first, ends - counts)
            and (int(ends[-1]) if len(ends) else 0) == utterances
            and bool((shard < shards).all() and (shard[1:] >= shard[:-1]).all() and (codes_offset > offset).all())
            and bool((offset[1:] >= (codes_offset + codes_bytes)[:-1])[same].all())
        )
    if not sound:
        folder = file.parent
        raise UserError(f"{file}: damaged, its places do not fit; `codecssl-tokenize repair {folder}` writes it again")


# ---------------------------------------------------------------- members of a shard


def read_members(file: BinaryIO, offset: int, count: int) -> list[bytes]:
    """Read the contents of the next `count` members of a shard's tar. The first member's header is at `offset`.

    Raises ValueError for members that the writer never writes: other types, or longer than the file.
    """
    end, found = file.seek(0, io.SEEK_END), []
    for _ in range(count):
        file.seek(offset)
        member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "strict")
        start = offset + tarfile.BLOCKSIZE
        if not member.isreg() or member.issparse() or not 0 <= member.size <= end - start:
            raise ValueError(f"member at offset {offset} has type {member.type!r} and {member.size} bytes")
        file.seek(start)
        found.append(file.read(member.size))
        offset = start + member.size + -member.size % tarfile.BLOCKSIZE
    return found


def gunzip(content: bytes) -> bytes:
    """Decompress one gzip stream of at most MOST_TEXT bytes. Raises ValueError for a longer or damaged one."""
    stream = zlib.decompressobj(wbits=31)
    text = stream.decompress(content, MOST_TEXT)
    if not stream.eof or stream.unused_data:
        raise ValueError(f"a text of more than {MOST_TEXT} bytes, or a damaged one")
    return text


def read_npz(content: bytes, *names: str) -> dict[str, NDArray[Any]]:
    """Read the arrays of an .npz, all or those named, of at most MOST_MEMBER bytes. Raises ValueError for others."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
        if sum(info.file_size for info in members.values()) > MOST_MEMBER:
            raise ValueError(f"arrays of more than {MOST_MEMBER} bytes")
        return {name: _array(file.read(members[name])) for name in names or members}


def _array(content: bytes) -> NDArray[Any]:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject or fortran or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError(f"shape {shape} of {dtype} does not fit {len(content)} bytes")
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape).copy()


def check_columns(text: Any, numbers: Mapping[str, NDArray[Any]], count: int) -> None:
    """Check that a block's columns have one value for each of its `count` utterances. Raises ValueError."""
    if not isinstance(text, dict) or not isinstance(text.get("labels"), dict):
        raise ValueError("its text has no columns")
    lists = [text.get("id"), text.get("path", text.get("id")), *text["labels"].values()]
    if any(not isinstance(column, list) or len(column) != count for column in lists):
        raise ValueError(f"a column of its text has not {count} values")
    if not all(isinstance(name, str) for column in lists[:2] for name in column):
        raise ValueError("an id or a path is not text")
    for name, kind in NUMBERS.items():
        if numbers[name].shape != (count,) or numbers[name].dtype.kind != kind:
            raise ValueError(f"column {name} has shape {numbers[name].shape} and dtype {numbers[name].dtype}")
    if numbers["sha256"].shape != (count, 32) or numbers["sha256"].dtype != np.uint8:
        raise ValueError("column sha256 is not 32 bytes an utterance")
    if count and int(numbers["samples"].max()) >= LARGEST:
        raise ValueError("an utterance is too long")


def ids_of(text: bytes, count: int) -> list[str]:
    """Return the ids in the text columns of a block of `count` utterances. Raises ValueError."""
    found = json.loads(text)
    ids = found.get("id") if isinstance(found, dict) else None
    if not isinstance(ids, list) or len(ids) != count or not all(isinstance(id, str) for id in ids):
        raise ValueError(f"its text has not {count} ids")
    return ids


def read_streams(file: BinaryIO, offset: int, segments: int, codes_bytes: int) -> NDArray[np.unsignedinteger]:
    """Read the words of each stream of an entropy-coded block, one stream per segment.

    Together they must fill the block.

    offset: of the block's first member. Raises ValueError.
    """
    words = read_npz(read_members(file, offset, 2)[1], "stream_words")["stream_words"]
    if words.shape != (segments,) or words.dtype.kind != "u" or int(words.sum(dtype=np.uint64)) * 4 != codes_bytes:
        raise ValueError(f"its streams do not fit {segments} segments in {codes_bytes} bytes")
    return words


# ---------------------------------------------------------------- tables of an entropy-coded shard


def check_books(books: Sequence[Any], sizes: Sequence[int]) -> None:
    """Check that the tables of `entropy` code codebooks of these sizes. Raises ValueError."""
    if len(books) != len(sizes):
        raise ValueError(f"tables of {len(books)} codebooks, the card has {len(sizes)}")
    for k, (book, size) in enumerate(zip(books, sizes)):
        classes = 1
        sound = book.base.shape == (size,) and 1 <= len(book.ratio) <= 1 << 16 and type(book.step) is int
        sound = sound and 0 <= book.step <= 1 << 16 and sum(level.source == -1 for level in book.levels) <= 1
        for level in book.levels if sound else ():
            sound = type(level.source) is int and -1 <= level.source < k
            sound = sound and len(level.reduce) == (sizes[level.source] if level.source >= 0 else size + 1)
            sound = sound and len(level.merge) == classes * level.reduced <= 1 << 20
            if not sound:
                break
            classes = level.classes
        if not sound or classes > len(book.ratio):
            raise ValueError(f"the tables of codebook {k} do not fit together")
