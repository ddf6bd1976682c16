"""Token shards, format versions 1 and 2: the layout on disk.

    DIR/dataset.json        format version, codec card, sources, totals; written last
    DIR/index.npy           frames of each utterance (uint16 or uint32), in order
    DIR/blocks.npy          position of each block of utterances (BLOCK)
    DIR/failed.jsonl        inputs that could not be read
    DIR/shards/00000.tar    a plain tar of blocks; per block three members:
        KEY.json.gz             columns of text: id, path, labels
        KEY.npz                 columns of numbers: sha256, samples, source_rate, source_rest (the source's samples are
                                samples * source_rate // sample_rate + source_rest), and scales, float32 per segment,
                                for codecs with scales
        KEY.codes               per utterance, per codebook, the codes packed at `code_bits`, each plane byte-aligned
        KEY.mel                 only if dataset.json has "mel": per utterance, frame and band one byte (see
                                codecssl.tokenize.mel); KEY.npz then has mel_crc32, one for each utterance
    DIR/shards/00000.json   sha256 and counts of the tar: its completion record. "notes" (NOTES), if any, lists ids of
                            utterances by note; dataset.json has their numbers in totals.notes

The offset of an utterance inside its block's codes follows from the frames before it and is not stored.

Version 2 is used for compressed datasets ("compression" in dataset.json). Their tars begin with the tables of
`entropy`, 00000.tables.npz. KEY.codes holds the streams of the utterances' segments of SEGMENT_FRAMES frames. The
column stream_words of KEY.npz holds the length of each stream in 32-bit little-endian words.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.entropy import SEGMENT_FRAMES, Coder
from codecssl.tokenize.format.validate import (
    MOST_TEXT,
    check_books,
    check_columns,
    check_header,
    gunzip,
    read_members,
    read_npz,
)

FORMAT = "codecssl-shards"
FORMAT_VERSION = 2
"""Newest readable version. Uncompressed datasets are written as version 1."""
NOTES = {
    "cancelled": "files whose channels cancel in their mean are almost silent; choose one with a `channel` column",
    "clipped": "segments ended up to 0.5 s after their file and were cut there",
}
"""Irregularities of audio that are counted, and their descriptions."""
MEL_CRC32 = "mel_crc32"
"""Number column of blocks with a log-mel plane: crc32 of each utterance's bytes in KEY.mel."""
COMPRESSION = "range"
"""`compression` in the header of a compressed dataset: constriction's range coder with the tables of `entropy`."""

BLOCK = np.dtype(
    [
        ("shard", "<u4"),
        ("first", "<u8"),  # index of the block's first utterance in the dataset
        ("count", "<u4"),  # utterances
        ("offset", "<u8"),  # of the block's first member in the shard's tar, bytes
        ("codes_offset", "<u8"),  # of the block's codes
        ("codes_bytes", "<u8"),
        ("crc32", "<u4"),  # of the block's codes
    ]
)


def utterance_bytes(frames: NDArray[np.integer], card: CodecCard) -> NDArray[np.int64]:
    """Bytes of the packed codes of utterances, given their numbers of frames."""
    wide = np.asarray(frames, dtype=np.int64)
    total = np.zeros_like(wide)
    for bits, rate in zip(card.code_bits, card.codes_per_frame):
        total += (wide * rate * bits + 7) // 8
    return total


def stored_bytes(
    numbers: Mapping[str, NDArray[Any]], frames: NDArray[np.integer], card: CodecCard
) -> NDArray[np.int64]:
    """Bytes in KEY.codes of each utterance of a block, given its number columns and its utterances' frames."""
    if "stream_words" not in numbers:
        return utterance_bytes(frames, card)
    ends = np.concatenate([[0], np.cumsum(numbers["stream_words"], dtype=np.int64)]) * 4
    last = np.cumsum(segments_of(frames))
    return ends[last] - ends[last - segments_of(frames)]


def segments_of(frames: NDArray[np.integer]) -> NDArray[np.int64]:
    """Number of separately coded segments of utterances in a compressed dataset, given their numbers of frames."""
    return -(-np.asarray(frames, dtype=np.int64) // SEGMENT_FRAMES)


def to_planes(codes: NDArray[np.integer], card: CodecCard) -> list[NDArray[np.integer]]:
    """Split codes [R, T] into one plane per codebook, [T * codes per frame], in time order."""
    if card.num_rows == card.num_codebooks:
        return list(codes)
    rows = np.cumsum(card.codes_per_frame)
    return [codes[row - n : row].T.reshape(-1) for row, n in zip(rows, card.codes_per_frame)]


def from_planes(planes: Sequence[NDArray[Any]], card: CodecCard) -> NDArray[Any]:
    """Join planes of the first codebooks into codes [R, T]. Inverse of `to_planes`."""
    return np.concatenate([plane.reshape(-1, n).T for plane, n in zip(planes, card.codes_per_frame)])


SEAL = "check"
"""Last key of the format's JSON files: the crc32 of everything before it."""


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Add the crc32 of the JSON of `value`, which `load_json` checks and removes."""
    return value | {SEAL: zlib.crc32(json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace"))}


def load_json(path: Path) -> dict[str, Any]:
    """Read a sealed JSON object. Raises UserError if it is not one or was changed."""
    if path.exists() and (not path.is_file() or path.stat().st_size > MOST_TEXT):
        raise UserError(f"{path}: not a file, or larger than {MOST_TEXT >> 20} MiB, which no run writes")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # including a number with too many digits
        raise UserError(f"{path}: damaged, not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, not a JSON object")
    if SEAL in value and value.pop(SEAL) != sealed(value)[SEAL]:
        raise UserError(f"{path}: damaged, its crc32 differs; run `codecssl-tokenize verify`")
    return value


def read_header(path: Path) -> dict[str, Any]:
    """Read dataset.json of a finished dataset. Raises UserError for other folders, unfinished or newer datasets."""
    file = path / "dataset.json"
    if not file.exists():
        if (path / "plan.json").exists():
            raise UserError(f"{path}: not finished; run the same `codecssl-tokenize run` again to complete it")
        raise UserError(f"{path}: no dataset.json; this is not a folder of token shards")
    header = load_json(file)
    if header.get("format") != FORMAT:
        raise UserError(f"{file}: format {header.get('format')!r}, expected {FORMAT!r}")
    version = header.get("format_version")
    if type(version) is not int or version > FORMAT_VERSION:
        raise UserError(f"{file}: format version {version}, this version reads up to {FORMAT_VERSION}")
    check_header(header, file)
    return header


def shard_path(root: Path, shard: int) -> Path:
    """Return the path of a shard's tar."""
    return root / "shards" / f"{shard:05d}.tar"


def shard_name(shard: int) -> str:
    """Return the path of a shard's tar, relative to its dataset."""
    return f"shards/{shard:05d}.tar"


def mel_offset(codes_offset: int, codes_bytes: int) -> int:
    """Offset of KEY.mel's content in the tar: after KEY.codes, padded to a whole record, and one header."""
    return codes_offset + codes_bytes + -codes_bytes % tarfile.BLOCKSIZE + tarfile.BLOCKSIZE


def scales_of(numbers: Mapping[str, NDArray[Any]], within: int, card: CodecCard) -> NDArray[np.float32] | None:
    """Scales of the utterance at this position in a block; None for codecs without scales."""
    if "scales" not in numbers:
        return None
    counts = card.segments_of(numbers["samples"][: within + 1].astype(np.int64))  # type: ignore[arg-type]
    stop = int(np.sum(counts))
    return numbers["scales"][stop - int(counts[-1]) : stop]  # type: ignore[index]


def read_columns(
    file: BinaryIO, offset: int, count: int | None = None
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read the text and number columns of the block whose first member's header is at `offset` of a shard.

    count: number of utterances, checked against the columns. Raises ValueError on a mismatch.
    """
    packed, arrays = read_members(file, offset, 2)
    text, numbers = json.loads(gunzip(packed)), read_npz(arrays)
    if count is not None:
        check_columns(text, numbers, count)
    return text, numbers


def read_numbers(file: BinaryIO, offset: int, *names: str) -> dict[str, NDArray[Any]]:
    """Read the number columns only, all or those named."""
    return read_npz(read_members(file, offset, 2)[1], *names)


def read_coder(path: Path, card: CodecCard) -> Coder:
    """Read the tables at the beginning of an entropy-coded shard. Raises UserError if they are missing or damaged."""
    try:
        with path.open("rb") as file:
            return parse_coder(file, card)
    except Exception as error:
        raise UserError(f"{path}: its tables are damaged ({type(error).__name__}: {error}); verify it") from error


def parse_coder(file: BinaryIO, card: CodecCard) -> Coder:
    """Read the tables from an open shard. A flipped bit can break any layer of tar, zip or JSON and raise any error."""
    try:
        coder = Coder.from_bytes(read_members(file, 0, 1)[0], card.codes_per_frame)
        check_books(coder.books, card.codebook_sizes)
    except OSError:  # of the disk, which is tried again
        raise
    except Exception as error:
        name = getattr(file, "name", "shard")
        raise UserError(f"{name}: its tables are damaged ({type(error).__name__}: {error}); verify it") from error
    return coder


@dataclass(frozen=True)
class CodebookRun:
    """Consecutive codebooks whose codes have the same width and rate."""

    first: int
    count: int
    bits: int
    rate: int


def runs_of(card: CodecCard) -> list[CodebookRun]:
    """Group the codebooks of a codec into runs of equal width and rate."""
    runs: list[CodebookRun] = []
    for key, group in groupby(enumerate(zip(card.code_bits, card.codes_per_frame)), key=lambda pair: pair[1]):
        books = [k for k, _ in group]
        runs.append(CodebookRun(books[0], len(books), *key))
    return runs


def starts(sizes: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
    """Start of each of n items and the end, [n + 1], in the smallest dtype that fits: many are kept in memory."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return ends.astype(np.uint32 if ends[-1] < 1 << 32 else np.uint64)
