"""Random and sequential access to token shards. `layout` describes the format on disk."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.remote import RemoteFolder, is_remote, mirrored
from codecssl.tokenize.format.bits import packed_size, unpack
from codecssl.tokenize.format.entropy import SEGMENT_FRAMES, Coder
from codecssl.tokenize.format.layout import (
    BLOCK,
    MEL_CRC32,
    from_planes,
    mel_offset,
    parse_coder,
    read_columns,
    read_header,
    read_numbers,
    runs_of,
    scales_of,
    segments_of,
    shard_path,
    starts,
    utterance_bytes,
)
from codecssl.tokenize.format.shard_files import ShardFiles
from codecssl.tokenize.format.validate import check_blocks, gunzip, ids_of, read_array, read_members, read_streams
from codecssl.tokenize.mel import MelSpec

__all__ = ["Shards", "Utterance"]

WHOLE_BYTES = 1 << 16
"""Maximum size of packed codes read whole. Of longer utterances, only the bytes of the requested frames are read."""
OFFSETS_CACHED = 4096
"""Number of blocks whose offsets are cached, about 4 bytes per utterance."""


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """Metadata of one utterance."""

    index: int
    id: str
    path: str
    """Relative to its source."""
    source_sha256: str
    samples: int
    """Length at the codec's sample rate, before padding to whole frames."""
    frames: int
    source_rate: int
    """Sample rate of the audio file in Hz."""
    source_samples: int
    """Length per channel at `source_rate`."""
    labels: dict[str, Any]
    scales: NDArray[np.float32] | None = field(default=None, compare=False)
    """[segments], for codecs with scales."""


class Shards:
    """A finished dataset of token shards: `len`, `frames`, `codes(i)`, `utterance(i)`.

    Opening reads a few small files, whatever the size of the corpus. Instances can be pickled and forked.

    With `check`, the first read of a block compares it with its CRC-32, and the index with the block's own columns.
    `retry_seconds` limits how long a shard is retried while its disk is unavailable.
    With `remote`, the path may be a URL (`common.remote`). It must come from the user, never from a file that others
    may have written: without `remote` a URL is an error.
    Raises UserError if the folder holds no finished dataset, and on reading damaged data.
    """

    def __init__(
        self, path: str | Path, *, check: bool = True, retry_seconds: float = 0.0, remote: bool = False
    ) -> None:
        folder: RemoteFolder | None = None
        self.path = local = Path(path)
        if is_remote(path):
            if not remote:
                raise UserError(f"{path}: is a URL; only --data of codecssl-pretrain run reads those, copy the folder")
            folder = RemoteFolder(str(path))
            self.path = folder.url  # type: ignore[assignment]  # it joins and prints like a path
            local = mirrored(folder, ("dataset.json", "index.npy", "blocks.npy"), retry_seconds)
        self._check, self._remote = check, remote
        self._files = ShardFiles(self.path, retry_seconds=retry_seconds, remote=folder)
        self.header = read_header(local)
        self.card = CodecCard.from_dict(self.header["codec"])
        self.entropy_coded = bool(self.header.get("compression"))
        self.mel_spec = MelSpec.from_dict(self.header["mel"]) if "mel" in self.header else None
        """Spec of the stored log-mel plane, or None."""
        self.frames: NDArray[np.integer] = read_array(local / "index.npy", ("<u2", "<u4"))
        """Number of frames of each utterance, [N]."""
        self.blocks = read_array(local / "blocks.npy", (BLOCK,))
        if len(self.frames) != self.header["totals"]["utterances"]:
            raise UserError(
                f"{self.path}: index.npy has {len(self.frames)} utterances, dataset.json says otherwise; verify it"
            )
        check_blocks(self.blocks, len(self.frames), self.header["totals"]["shards"], self.path / "blocks.npy")
        # lists, since a row of a numpy table costs more than unpacking an utterance
        self._firsts: list[int] = self.blocks["first"].tolist()
        self._places: list[tuple[int, int]] = self.blocks[["shard", "codes_offset"]].tolist()
        self._runs = runs_of(self.card)
        self._sound = bytearray(len(self.blocks))
        self._intact_mel = bytearray(len(self.frames) if self.mel_spec else 0)
        self._open_caches()

    def _open_caches(self) -> None:
        # per instance, so that a closed dataset frees its memory
        self._offsets = lru_cache(maxsize=OFFSETS_CACHED)(self._block_offsets)
        self._streams = lru_cache(maxsize=OFFSETS_CACHED)(self._block_streams)
        self._mel = lru_cache(maxsize=OFFSETS_CACHED)(self._block_mel)
        self._columns = lru_cache(maxsize=4)(self._read_columns)
        self._coder = lru_cache(maxsize=256)(self._read_coder)  # 3 MB and 20 ms each, too slow to build per utterance
        self._segment = lru_cache(maxsize=64)(self._decode_segment)

    def __getstate__(self) -> dict[str, Any]:
        seconds = self._files.retry_seconds
        return {"path": self.path, "check": self._check, "retry_seconds": seconds, "remote": self._remote}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def fingerprint(self) -> str:
        """sha256 over the sha256 of all shards. Changes with any code."""
        return str(self.header["sha256"])

    @property
    def num_codebooks(self) -> int:
        return self.card.num_codebooks

    def codes(
        self, index: int, *, num_codebooks: int | None = None, start: int = 0, stop: int | None = None
    ) -> NDArray[np.uint16]:
        """Return codes [R, stop - start] of one utterance, with rows as in `Codec`. Only the requested frames are read.

        `num_codebooks` keeps the rows of the first codebooks. Raises IndexError for indices out of range.
        """
        kept, stop = self._checked(index, num_codebooks, start, stop)
        if self.entropy_coded:
            return from_planes(self._decoded(index, kept, start, stop), self.card)
        stacks = self._unpacked(index, kept, start, stop)
        if len(stacks) == 1 and self._runs[0].rate == 1:
            return stacks[0]
        return from_planes([plane for stack in stacks for plane in stack], self.card)

    def planes(
        self, index: int, *, num_codebooks: int | None = None, start: int = 0, stop: int | None = None
    ) -> list[NDArray[np.uint16]]:
        """Return, per codebook k, the (stop - start) * codes_per_frame[k] codes of frames start..stop."""
        kept, stop = self._checked(index, num_codebooks, start, stop)
        if self.entropy_coded:
            return self._decoded(index, kept, start, stop)
        return [plane for stack in self._unpacked(index, kept, start, stop) for plane in stack]

    def mel(self, index: int, *, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Return the log-mel plane uint8 [stop - start, bands] of one utterance; `mel_spec.log_power` dequantizes it.

        The first read of an utterance checks its crc32. Raises UserError for a dataset without a plane, or if the crc32
        differs.
        """
        if self.mel_spec is None:
            raise UserError(f"{self.path}: has no log-mel plane; tokenize the audio with --with-mel 80")
        _, stop = self._checked(index, None, start, stop)
        block, within = self._find(index)
        frames, bands = int(self.frames[index]), self.mel_spec.bands
        shard, codes_offset = self._places[block]
        first, sums = self._mel(block)
        offset = mel_offset(codes_offset, int(self.blocks["codes_bytes"][block])) + bands * int(first[within])
        if self._check and not self._intact_mel[index]:
            if self._files.crc32(shard, offset, frames * bands) != int(sums[within]):
                raise UserError(
                    f"{shard_path(self.path, shard)}: the log-mel plane of utterance {index} is damaged; "
                    f"run `codecssl-tokenize verify {self.path}`"
                )
            self._intact_mel[index] = 1
        content = self._files.read(shard, offset + start * bands, (stop - start) * bands)
        return np.frombuffer(content, np.uint8).reshape(stop - start, bands)

    def utterance(self, index: int) -> Utterance:
        """Return id, source and labels of one utterance."""
        block, within = self._find(index)
        text, numbers = self._columns(block)
        labels = {k: v[within] for k, v in text["labels"].items()}
        samples, source_rate = int(numbers["samples"][within]), int(numbers["source_rate"][within])
        return Utterance(
            index=index,
            id=text["id"][within],
            path=text.get("path", text["id"])[within],
            source_sha256=bytes(numbers["sha256"][within]).hex(),
            samples=samples,
            frames=int(self.frames[index]),
            source_rate=source_rate,
            source_samples=samples * source_rate // self.card.sample_rate + int(numbers["source_rest"][within]),
            labels={k: v for k, v in labels.items() if v is not None},
            scales=scales_of(numbers, within, self.card),
        )

    def utterances(self) -> Iterator[Utterance]:
        """Iterate over all utterances, in order."""
        return (self.utterance(i) for i in range(len(self)))

    def ids(self) -> Iterator[str]:
        """Iterate over the ids of all utterances, in order. Reads whole blocks and is much faster than `utterances`."""
        for block in range(len(self.blocks)):
            yield from self._read_ids(block, self._read_text(block))

    def source_hashes(self) -> Iterator[NDArray[np.uint8]]:
        """Yield per block the sha256 [n, 32] of the utterances' audio files, in order."""
        return (self._columns(block)[1]["sha256"] for block in range(len(self.blocks)))

    def find(self, id: str) -> int:
        """Return the index of an utterance by its id. Scans the text, not the codes.

        Raises UserError for an unknown id.
        """
        needle = json.dumps(id, ensure_ascii=False).encode()
        for block, first in enumerate(self._firsts):
            text = self._read_text(block)
            if needle in text and id in (ids := self._read_ids(block, text)):
                return first + ids.index(id)
        example = f"; ids look like {self.utterance(0).id!r}" if len(self) else ""
        raise UserError(f"id {id!r}: not in {self.path}{example}")

    # ------------------------------------------------------------ codes

    def _checked(self, index: int, num_codebooks: int | None, start: int, stop: int | None) -> tuple[int, int]:
        if not 0 <= index < len(self.frames):
            raise IndexError(f"utterance {index}: the dataset has {len(self)}")
        frames = int(self.frames[index])
        stop = frames if stop is None else stop
        if not 0 <= start <= stop <= frames:
            raise IndexError(f"frames {start}..{stop}: utterance {index} has {frames}")
        kept = self.num_codebooks if num_codebooks is None else num_codebooks
        if not 1 <= kept <= self.num_codebooks:
            raise IndexError(f"num_codebooks {kept}: the shards hold 1 to {self.num_codebooks}")
        return kept, stop

    def _unpacked(self, index: int, kept: int, start: int, stop: int) -> list[NDArray[np.uint16]]:
        """Unpack the planes. Those of the same width and rate are stacked and unpacked together."""
        frames = int(self.frames[index])
        block, within = self._find(index)
        self._check_block(block)
        shard, offset = self._places[block]
        offset += int(self._offsets(block)[within])
        size = sum(run.count * packed_size(frames * run.rate, run.bits) for run in self._runs)
        if size > WHOLE_BYTES:
            return self._unpacked_long(shard, offset, frames, kept, start, stop)
        whole, at = np.frombuffer(self._files.read(shard, offset, size), np.uint8), 0
        stacks: list[NDArray[np.uint16]] = []
        for run in self._runs:
            count = min(run.count, kept - run.first)
            if count <= 0:
                break
            size = packed_size(frames * run.rate, run.bits)
            packed = whole[at : at + count * size].reshape(count, size)
            stacks.append(unpack(packed, run.bits, start * run.rate, stop * run.rate))
            at += count * size
        return stacks

    def _unpacked_long(
        self, shard: int, offset: int, frames: int, kept: int, start: int, stop: int
    ) -> list[NDArray[np.uint16]]:
        """Unpack planes of a long utterance, reading only the bytes of the requested frames."""
        stacks: list[NDArray[np.uint16]] = []
        for run in self._runs:
            first, last = start * run.rate // 8 * 8, stop * run.rate  # eight codes of any width end on a byte
            begin, end = first * run.bits // 8, packed_size(last, run.bits)
            size, rows = packed_size(frames * run.rate, run.bits), list[bytes]()
            for _ in range(min(run.count, kept - run.first)):
                rows.append(self._files.read(shard, offset + begin, end - begin))
                offset += size
            if rows:
                packed = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), end - begin)
                stacks.append(unpack(packed, run.bits, start * run.rate - first, last - first))
        return stacks

    def _decoded(self, index: int, kept: int, start: int, stop: int) -> list[NDArray[np.uint16]]:
        """Decode the planes of an entropy-coded utterance from the segments that hold them."""
        first, rates = start // SEGMENT_FRAMES, self.card.codes_per_frame
        segments = [self._segment(index, s, kept) for s in range(first, -(-stop // SEGMENT_FRAMES))]
        if start == stop:
            return [np.zeros(0, np.uint16) for _ in range(kept)]
        skipped = start - first * SEGMENT_FRAMES
        return [
            np.concatenate(pieces)[skipped * rate : (skipped + stop - start) * rate]
            for pieces, rate in zip(zip(*segments), rates)
        ]

    def _decode_segment(self, index: int, segment: int, kept: int) -> list[NDArray[np.uint16]]:
        block, within = self._find(index)
        self._check_block(block)
        shard, offset = self._places[block]
        ends, firsts = self._streams(block)
        number = int(firsts[within]) + segment
        begin, end = int(ends[number]), int(ends[number + 1])
        words = self._files.read(shard, offset + begin, end - begin)
        frames = min(SEGMENT_FRAMES, int(self.frames[index]) - segment * SEGMENT_FRAMES)
        coder = self._coder(shard)
        try:
            return coder.decode(np.frombuffer(words, "<u4"), frames, kept)
        except (AssertionError, IndexError) as error:  # not a valid stream
            raise UserError(
                f"{shard_path(self.path, shard)}: utterance {index} cannot be decoded; "
                f"run `codecssl-tokenize verify {self.path}`"
            ) from error

    # ------------------------------------------------------------ inside

    def _check_block(self, block: int) -> None:
        """Compare a block with its CRC-32, and its part of the index with its columns. Runs once per block.

        Several threads may do this concurrently.
        """
        if not self._check or self._sound[block]:
            return
        row = self.blocks[block]
        shard, offset, size = int(row["shard"]), int(row["codes_offset"]), int(row["codes_bytes"])
        path = shard_path(self.path, shard)
        damaged = self._files.crc32(shard, offset, size) != int(row["crc32"])
        if damaged and self._files.forget(shard, offset, size):  # the copy may be damaged, and not the original
            damaged = self._files.crc32(shard, offset, size) != int(row["crc32"])
        if damaged:
            first, last = self._firsts[block], self._firsts[block] + int(row["count"]) - 1
            raise UserError(
                f"{path}: the codes of utterances {first} to {last} are damaged (CRC-32 of bytes {offset} to"
                f" {offset + size}); run `codecssl-tokenize verify {self.path}`, then `repair`"
            )
        samples = self._files.parse(shard, lambda file: read_numbers(file, int(row["offset"]))["samples"])
        if not np.array_equal(self.card.frames_of(samples.astype(np.int64)), self._frames_of(block)):
            raise UserError(
                f"{self.path / 'index.npy'}: its frames are not those of {path}; `codecssl-tokenize repair"
                f" {self.path}` writes it again"
            )
        self._sound[block] = True

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self.frames):
            raise IndexError(f"utterance {index}: the dataset has {len(self)}")
        block = bisect_right(self._firsts, index) - 1
        return block, index - self._firsts[block]

    def _frames_of(self, block: int) -> NDArray[np.integer]:
        first = self._firsts[block]
        return self.frames[first : first + int(self.blocks["count"][block])]

    def _block_offsets(self, block: int) -> NDArray[np.unsignedinteger]:
        """Return the offset of each utterance's codes in the block, [count]."""
        begins = starts(utterance_bytes(self._frames_of(block), self.card))
        if int(begins[-1]) != int(self.blocks["codes_bytes"][block]):
            raise UserError(
                f"{self.path}: block {block} of blocks.npy does not fit its utterances; run `codecssl-tokenize repair`"
            )
        return begins

    def _block_streams(self, block: int) -> tuple[NDArray[np.unsignedinteger], NDArray[np.unsignedinteger]]:
        """Return the stream offsets in the block [segments + 1] and the first segment of each utterance [count]."""
        shard, offset = self._members(block)
        firsts, size = starts(segments_of(self._frames_of(block))), int(self.blocks["codes_bytes"][block])
        words = self._files.parse(shard, lambda file: read_streams(file, offset, int(firsts[-1]), size))
        return starts(words.astype(np.int64) * 4), firsts

    def _block_mel(self, block: int) -> tuple[NDArray[np.unsignedinteger], NDArray[np.uint32]]:
        """Return the first frame of each utterance in the block's plane [count + 1] and the crc32 of each [count]."""
        shard, offset = self._members(block)
        sums = self._files.parse(shard, lambda file: read_numbers(file, offset)[MEL_CRC32])
        return starts(self._frames_of(block).astype(np.int64)), sums

    def _read_coder(self, shard: int) -> Coder:
        return self._files.parse(shard, lambda file: parse_coder(file, self.card))

    def _read_columns(self, block: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        shard, offset = self._members(block)
        count = int(self.blocks["count"][block])
        return self._files.parse(shard, lambda file: read_columns(file, offset, count))

    def _read_text(self, block: int) -> bytes:
        shard, offset = self._members(block)
        return self._files.parse(shard, lambda file: gunzip(read_members(file, offset, 1)[0]))

    def _read_ids(self, block: int, text: bytes) -> list[str]:
        count = int(self.blocks["count"][block])
        return self._files.parse(self._members(block)[0], lambda _: ids_of(text, count))

    def _members(self, block: int) -> tuple[int, int]:
        """Return the shard and the offset of the block's first member in its tar."""
        row = self.blocks[block]
        return int(row["shard"]), int(row["offset"])
