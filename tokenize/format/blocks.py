"""Blocks of utterances: three tar members each. Codes are packed first and entropy-coded when a shard is finished."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.bits import pack, pack_planes, packed_size, unpack
from codecssl.tokenize.format.entropy import SEGMENT_FRAMES, Coder
from codecssl.tokenize.format.layout import MEL_CRC32, from_planes
from codecssl.tokenize.format.records import EncodedUtterance
from codecssl.tokenize.format.validate import MOST_TEXT, read_members, read_npz

SAMPLE_CODES = 1 << 25
"""Maximum number of a shard's codes used to fit its tables. It bounds the memory of entropy coding."""

BlockPlace = dict[str, int]
"""Position of a block's codes in its members: count (utterances), codes_offset, codes_bytes, crc32 (of the codes)."""


def block_bytes(key: str, utterances: Sequence[EncodedUtterance], card: CodecCard) -> tuple[bytes, BlockPlace]:
    """Build the tar members of a block of packed codes."""
    if len(set(card.code_bits)) == 1:
        codes = pack_planes([plane for u in utterances for plane in u.codes], card.code_bits[0])
    else:
        codes = b"".join(pack(plane, bits) for u in utterances for plane, bits in zip(u.codes, card.code_bits))
    planes = [u.mel for u in utterances if u.mel is not None]
    mel = b"".join(np.ascontiguousarray(plane).tobytes() for plane in planes) if planes else None
    numbers = npz_bytes(_number_columns(utterances, card))
    return _members(key, _text_columns(utterances), numbers, codes, mel, len(utterances))


def _members(
    key: str, text: bytes, numbers: bytes, codes: bytes, mel: bytes | None, count: int
) -> tuple[bytes, BlockPlace]:
    head = tar_member(f"{key}.json.gz", text) + tar_member(f"{key}.npz", numbers)
    place = {
        "count": count,
        "codes_offset": len(head) + tarfile.BLOCKSIZE,
        "codes_bytes": len(codes),
        "crc32": zlib.crc32(codes),
    }
    tail = b"" if mel is None else tar_member(f"{key}.mel", mel)
    return head + tar_member(f"{key}.codes", codes) + tail, place


def tar_member(name: str, content: bytes) -> bytes:
    """Build one file's header, content and padding in a tar, without date or owner."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _text_columns(utterances: Sequence[EncodedUtterance]) -> bytes:
    names = sorted({name for u in utterances for name in u.labels})
    columns: dict[str, Any] = {"id": [u.id for u in utterances]}
    if any(u.path != u.id for u in utterances):  # most paths equal their ids
        columns["path"] = [u.path for u in utterances]
    columns["labels"] = {name: [u.labels.get(name) for u in utterances] for name in names}
    packed = json.dumps(columns, ensure_ascii=False, separators=(",", ":"), default=str).encode()
    if len(packed) > MOST_TEXT:
        raise UserError(f"a block has {len(packed)} bytes of ids and labels, at most {MOST_TEXT}; lower --block-inputs")
    return gzip.compress(packed, 9, mtime=0)


def _number_columns(utterances: Sequence[EncodedUtterance], card: CodecCard) -> dict[str, NDArray[Any]]:
    hashes = np.frombuffer(b"".join(bytes.fromhex(u.source_sha256) for u in utterances), np.uint8)
    columns: dict[str, NDArray[Any]] = {
        "sha256": hashes.reshape(-1, 32),
        "samples": np.array([u.samples for u in utterances], np.uint64),
        "source_rate": np.array([u.source_rate for u in utterances], np.uint32),
        "source_rest": np.array([_source_rest(u, card.sample_rate) for u in utterances], np.int64),
    }
    if card.segment_samples:
        columns["scales"] = np.concatenate([_scales(u, card) for u in utterances])
    if any(u.mel is not None for u in utterances):
        columns[MEL_CRC32] = np.array([zlib.crc32(_mel_of(u, card)) for u in utterances], np.uint32)
    return columns


def _mel_of(utterance: EncodedUtterance, card: CodecCard) -> bytes:
    frames = card.frames_of(utterance.samples)
    if utterance.mel is None or len(utterance.mel) != frames:
        found = None if utterance.mel is None else len(utterance.mel)
        raise UserError(f"{utterance.id}: {found} mel columns, its codes have {frames} frames")
    return np.ascontiguousarray(utterance.mel).tobytes()


def _source_rest(utterance: EncodedUtterance, sample_rate: int) -> int:
    """Remainder of the source's length lost in the resampler's rounding. It is close to 0 and compresses well."""
    return utterance.source_samples - utterance.samples * utterance.source_rate // sample_rate


def _scales(utterance: EncodedUtterance, card: CodecCard) -> NDArray[np.float32]:
    expected = card.segments_of(utterance.samples)
    scales = np.zeros(0, np.float32) if utterance.scales is None else np.asarray(utterance.scales, np.float32).ravel()
    if len(scales) != expected:
        raise UserError(f"{utterance.id}: {len(scales)} scales, {card.name} has {expected} for it, one per segment")
    return scales


def npz_bytes(columns: Mapping[str, NDArray[Any]]) -> bytes:
    """Serialize arrays in np.savez's format, deterministically. Hashes, being incompressible, are not deflated."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, column in columns.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, column, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_STORED if name == "sha256" else zipfile.ZIP_DEFLATED
            file.writestr(info, content.getvalue(), compresslevel=9)
    return buffer.getvalue()


# ---------------------------------------------------------------- entropy coding


@dataclass(frozen=True)
class PackedBlock:
    """A block made by `block_bytes`, split into its parts."""

    text: bytes
    numbers: dict[str, NDArray[Any]]
    codes: bytes
    mel: bytes | None
    card: CodecCard

    @classmethod
    def read(cls, content: bytes, card: CodecCard) -> PackedBlock:
        file = io.BytesIO(content)
        text, packed, codes = read_members(file, 0, 3)
        numbers = read_npz(packed)
        mel = read_members(file, 0, 4)[3] if MEL_CRC32 in numbers else None
        return cls(text, numbers, codes, mel, card)

    def segments(self) -> Iterator[list[NDArray[np.uint16]]]:
        """Yield the planes of each segment of each utterance, in order."""
        buffer, offset = np.frombuffer(self.codes, np.uint8), 0
        for frames in self.card.frames_of(self.numbers["samples"].astype(np.int64)).tolist():
            planes = []
            for bits, rate in zip(self.card.code_bits, self.card.codes_per_frame):
                size = packed_size(frames * rate, bits)
                planes.append(unpack(buffer[offset : offset + size], bits, 0, frames * rate))
                offset += size
            for first in range(0, frames, SEGMENT_FRAMES):
                last = min(first + SEGMENT_FRAMES, frames)
                yield [plane[first * n : last * n] for plane, n in zip(planes, self.card.codes_per_frame)]


def packed_again(codes: bytes, numbers: Mapping[str, NDArray[Any]], coder: Coder, card: CodecCard) -> bytes:
    """Restore the packed codes of a block from its entropy-coded ones.

    Their crc32 is `packed_crc32` of the shard's completion record.

    Raises AssertionError for streams that the coder did not write.
    """
    words, planes, first = np.frombuffer(codes, "<u4"), [], 0
    lengths = iter(numbers["stream_words"].tolist())
    for frames in card.frames_of(numbers["samples"].astype(np.int64)).tolist():
        segments = []
        for start in range(0, frames, SEGMENT_FRAMES):
            last = first + next(lengths)
            segments.append(coder.decode(words[first:last], min(SEGMENT_FRAMES, frames - start), card.num_codebooks))
            first = last
        planes += [pack(np.concatenate(pieces), bits) for pieces, bits in zip(zip(*segments), card.code_bits)]
    return b"".join(planes)


def fit_coder(blocks: Callable[[], Iterable[PackedBlock]], card: CodecCard, frames: int) -> Coder:
    """Fit the tables of a shard of `frames` frames to its own codes, or to every n-th segment of a large shard."""
    from codecssl.tokenize.format.entropy_tables import fit

    every = max(1, -(-frames * card.num_rows // SAMPLE_CODES))
    segments = (segment for block in blocks() for segment in block.segments())
    sample = [[plane.copy() for plane in segment] for number, segment in enumerate(segments) if number % every == 0]
    lengths = np.array([len(segment[0]) // card.codes_per_frame[0] for segment in sample], np.int64)
    planes = [np.concatenate(pieces) for pieces in zip(*sample)]
    return Coder(fit(planes, lengths, card.codebook_sizes), card.codes_per_frame)


def entropy_coded_bytes(key: str, block: PackedBlock, coder: Coder) -> tuple[bytes, BlockPlace]:
    """Build the tar members of a block with entropy-coded codes. The place also has the crc32 of the packed codes."""
    streams = []
    for segment in block.segments():
        words = coder.encode(segment)
        decoded = coder.decode(words, len(segment[0]) // coder.codes_per_frame[0], len(segment))
        if not all(np.array_equal(a, b) for a, b in zip(segment, decoded)):
            raise RuntimeError(f"block {key}: a segment's codes do not come back from its stream; please report it")
        streams.append(words)
    lengths = np.array([len(words) for words in streams], np.uint32)
    if lengths.max(initial=0) < 1 << 16:
        lengths = lengths.astype(np.uint16)  # type: ignore[assignment]
    numbers = npz_bytes(block.numbers | {"stream_words": lengths})
    codes = b"".join(words.astype("<u4").tobytes() for words in streams)
    members, place = _members(key, block.text, numbers, codes, block.mel, len(block.numbers["samples"]))
    return members, place | {"packed_crc32": zlib.crc32(block.codes)}


# ---------------------------------------------------------------- reading


def mel_planes(mel: bytes, numbers: Mapping[str, NDArray[Any]], card: CodecCard) -> list[NDArray[np.uint8]]:
    """Split KEY.mel of a block into the plane [T, bands] of each utterance."""
    ends = np.cumsum(card.frames_of(numbers["samples"].astype(np.int64)))
    return np.split(np.frombuffer(mel, np.uint8).reshape(int(ends[-1]), -1), ends[:-1])


def block_codes(
    codes: bytes, numbers: Mapping[str, NDArray[Any]], card: CodecCard, coder: Coder | None = None
) -> Iterator[NDArray[np.uint16]]:
    """Yield codes [R, T] of each utterance of a block from KEY.codes and KEY.npz. Compressed shards need `coder`."""
    packed, words = np.frombuffer(codes, np.uint8), iter(numbers.get("stream_words", np.zeros(0, int)).tolist())
    offset = 0
    for frames in card.frames_of(numbers["samples"].astype(np.int64)).tolist():
        pieces: list[list[NDArray[np.uint16]]] = []
        if coder is None:
            pieces.append([])
            for bits, rate in zip(card.code_bits, card.codes_per_frame):
                size = packed_size(frames * rate, bits)
                pieces[0].append(unpack(packed[offset : offset + size], bits, 0, frames * rate))
                offset += size
        else:
            for first in range(0, frames, SEGMENT_FRAMES):
                size = 4 * next(words)
                stream = np.frombuffer(codes, "<u4", size // 4, offset)
                pieces.append(coder.decode(stream, min(SEGMENT_FRAMES, frames - first), card.num_codebooks))
                offset += size
        yield from_planes([np.concatenate(planes) for planes in zip(*pieces)], card)
