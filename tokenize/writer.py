"""Writing shards: blocks first, each whole or absent, then the tar, then its completion mark, then the dataset.

Every file is written beside its place, fsynced and renamed. A block's bytes depend on its utterances alone, a shard's
on its blocks: whoever writes them, and however often a run is killed, they are the same.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.bits import pack
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.errors import UserError
from codecssl.tokenize.shards import (
    BLOCK,
    FORMAT,
    FORMAT_VERSION,
    Shards,
    load_json,
    read_columns,
    shard_path,
)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One utterance, ready to be written."""

    id: str
    path: str
    codes: Sequence[NDArray[np.integer]]
    """Per codebook, 1-D."""
    samples: int
    source_sha256: str
    source_rate: int
    source_samples: int
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One input that could not be read."""

    id: str
    path: str
    reason: str


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: object, indent: int | None = 1) -> bytes:
    """JSON in UTF-8, the same bytes for the same value."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------- blocks


def block_bytes(key: str, utterances: list[Encoded], card: CodecCard) -> tuple[bytes, dict[str, int]]:
    """The tar members of a block, and where its codes lie in them.

    The dict has `count`, `codes_offset` and `codes_bytes` (within the returned bytes) and `crc32` of the codes.
    """
    codes = b"".join(pack(plane, bits) for u in utterances for plane, bits in zip(u.codes, card.code_bits))
    text, numbers = _text_columns(utterances), _number_columns(utterances, card.sample_rate)
    head = _member(f"{key}.json.gz", text) + _member(f"{key}.npz", numbers)
    place = {
        "count": len(utterances),
        "codes_offset": len(head) + tarfile.BLOCKSIZE,
        "codes_bytes": len(codes),
        "crc32": zlib.crc32(codes),
    }
    return head + _member(f"{key}.codes", codes), place


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _text_columns(utterances: list[Encoded]) -> bytes:
    names = sorted({name for u in utterances for name in u.labels})
    columns: dict[str, Any] = {"id": [u.id for u in utterances]}
    if any(u.path != u.id for u in utterances):  # most paths are their ids
        columns["path"] = [u.path for u in utterances]
    columns["labels"] = {name: [u.labels.get(name) for u in utterances] for name in names}
    packed = json.dumps(columns, ensure_ascii=False, separators=(",", ":"), default=str).encode()
    return gzip.compress(packed, 9, mtime=0)


def _number_columns(utterances: list[Encoded], sample_rate: int) -> bytes:
    hashes = np.frombuffer(b"".join(bytes.fromhex(u.source_sha256) for u in utterances), np.uint8).reshape(-1, 32)
    columns: dict[str, NDArray[Any]] = {
        "samples": np.array([u.samples for u in utterances], np.uint64),
        "source_rate": np.array([u.source_rate for u in utterances], np.uint32),
        "source_rest": np.array([source_rest(u, sample_rate) for u in utterances], np.int64),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        _add_array(file, "sha256", hashes, zipfile.ZIP_STORED)
        for name, column in columns.items():
            _add_array(file, name, column, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def source_rest(utterance: Encoded, sample_rate: int) -> int:
    """What the resampler's rounding hides of the source's length: 0 or close to it, so that it takes no room."""
    return utterance.source_samples - utterance.samples * utterance.source_rate // sample_rate


def _add_array(file: zipfile.ZipFile, name: str, array: NDArray[Any], compression: int) -> None:
    # np.savez's format, member by member: hashes don't shrink, counts do
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    info.compress_type = compression
    file.writestr(info, buffer.getvalue(), compresslevel=9)


# ---------------------------------------------------------------- shards


class ShardWriter:
    """Collects one shard, block by block. Blocks that an earlier run finished are found again by `done`.

    work/00007/0000-0128.block holds block 0, made of inputs 0..127 of the shard; beside it a .json with its place and
    the failures among those inputs.
    """

    def __init__(self, root: Path, shard: int, card: CodecCard) -> None:
        self.root, self.shard, self.card = root, shard, card
        self.folder = root / "work" / f"{shard:05d}"
        self.parts: list[dict[str, Any]] = []
        if self.folder.is_dir():
            self._find_parts()
        self.folder.mkdir(parents=True, exist_ok=True)

    def _find_parts(self) -> None:
        while (marker := self._part_path(len(self.parts), "json")).exists():
            self.parts.append(load_json(marker))

    def _part_path(self, block: int, suffix: str) -> Path:
        return self.folder / f"{block:05d}.{suffix}"

    @property
    def done(self) -> int:
        """Inputs of this shard that need not be encoded again."""
        return sum(part["inputs"] for part in self.parts)

    def add_block(self, inputs: int, utterances: list[Encoded], failures: list[Failure]) -> None:
        """Write the next block durably; `inputs` counts the utterances and the failures."""
        block = len(self.parts)
        key = f"{self.shard:05d}-{block:05d}"
        content, place = block_bytes(key, utterances, self.card) if utterances else (b"", {"count": 0})
        part = place | {
            "inputs": inputs,
            "frames": sum(self.card.frames_of(u.samples) for u in utterances),
            "samples": sum(u.samples for u in utterances),
            "failed": [asdict(f) for f in failures],
        }
        write_atomic(self._part_path(block, "block"), content)
        write_atomic(self._part_path(block, "json"), to_json(part))
        self.parts.append(part)

    def finish(self, inputs_sha256: str) -> None:
        """Join the blocks into the tar, make it durable, and write its completion mark."""
        target = shard_path(self.root, self.shard)
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        digest, blocks, offset = hashlib.sha256(), [], 0
        with temporary.open("wb") as file:
            for block, part in enumerate(self.parts):
                if not part["count"]:  # every input of it failed
                    continue
                content = self._part_path(block, "block").read_bytes()
                blocks.append(self._place(part, offset))
                offset += len(content)
                digest.update(content)
                file.write(content)
            end = bytes(2 * tarfile.BLOCKSIZE)
            digest.update(end)
            file.write(end)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
        mark = {
            "format_version": FORMAT_VERSION,
            "shard": self.shard,
            "sha256": digest.hexdigest(),
            "bytes": offset + len(end),
            "inputs": self.done,
            "inputs_sha256": inputs_sha256,
            "utterances": sum(b["count"] for b in blocks),
            "frames": sum(p["frames"] for p in self.parts),
            "samples": sum(p["samples"] for p in self.parts),
            "blocks": blocks,
            "failed": [f for part in self.parts for f in part["failed"]],
        }
        write_atomic(target.with_suffix(".json"), to_json(mark, indent=None))
        shutil.rmtree(self.folder)

    @staticmethod
    def _place(part: dict[str, Any], offset: int) -> dict[str, int]:
        return {
            "offset": offset,
            "codes_offset": offset + part["codes_offset"],
            "codes_bytes": part["codes_bytes"],
            "count": part["count"],
            "crc32": part["crc32"],
        }


# ---------------------------------------------------------------- the dataset


def finish_dataset(root: Path, header: dict[str, Any], shards: int) -> dict[str, Any]:
    """Write index.npy, blocks.npy, failed.jsonl and, last, dataset.json; return the totals.

    `header` holds what the run knows (codec, sources, sizes). Idempotent: two tasks that finish at once write the same.
    """
    marks = [load_json(shard_path(root, shard).with_suffix(".json")) for shard in range(shards)]
    card = CodecCard.from_dict(header["codec"])
    frames, rows, first = [], [], 0
    for mark in marks:
        for block in mark["blocks"]:
            frames.append(_frames_of_block(root, mark["shard"], block["offset"], card))
            rows.append(
                (
                    mark["shard"],
                    first,
                    block["count"],
                    *(block[k] for k in ("offset", "codes_offset", "codes_bytes", "crc32")),
                )
            )
            first += block["count"]
    index = np.concatenate(frames) if frames else np.zeros(0, np.uint32)
    _save_array(root / "index.npy", index.astype(np.uint16 if index.max(initial=0) < 1 << 16 else np.uint32))
    _save_array(root / "blocks.npy", np.array(rows, BLOCK))
    failed = [failure for mark in marks for failure in mark["failed"]]
    write_atomic(root / "failed.jsonl", b"".join(to_json(row, indent=None) for row in failed))
    totals = {key: sum(mark[key] for mark in marks) for key in ("inputs", "utterances", "frames", "samples", "bytes")}
    totals |= {
        "failed": len(failed),
        "shards": shards,
        "hours": round(totals["samples"] / card.sample_rate / 3600, 4),
    }
    digest = hashlib.sha256("".join(mark["sha256"] for mark in marks).encode()).hexdigest()
    dataset = {"format": FORMAT, "format_version": FORMAT_VERSION, "sha256": digest, "totals": totals}
    write_atomic(root / "dataset.json", to_json(dataset | header))
    return totals


def _frames_of_block(root: Path, shard: int, offset: int, card: CodecCard) -> NDArray[np.integer]:
    with shard_path(root, shard).open("rb") as file:
        samples = read_columns(file, offset)[1]["samples"].astype(np.int64)
    return card.frames_of(samples)


def _save_array(path: Path, array: NDArray[Any]) -> None:
    np.save(buffer := io.BytesIO(), array)
    write_atomic(path, buffer.getvalue())


def write_shards(
    path: str | Path,
    card: CodecCard,
    items: Iterable[tuple[str, NDArray[np.integer], dict[str, Any]]],
    per_shard: int = 8192,
) -> Shards:
    """Write codes that are at hand as a dataset: items are (id, codes [K, T], labels).

    For codes made elsewhere and for tests; their sources are unknown, so the hashes are those of the codes.
    """
    root = Path(path)
    if (root / "dataset.json").exists():
        raise UserError(f"{root}: holds a dataset already; give another folder")
    shards = 0
    for shard, group in enumerate(_groups(iter(items), per_shard)):
        writer = ShardWriter(root, shard, card)
        writer.add_block(len(group), [_encoded(card, *item) for item in group], [])
        writer.finish(inputs_sha256="")
        shards = shard + 1
    finish_dataset(root, {"codec": card.to_dict(), "sources": []}, shards)
    shutil.rmtree(root / "work", ignore_errors=True)
    return Shards(root)


def _groups(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := [item for _, item in zip(range(size), items)]:
        yield group


def _encoded(card: CodecCard, id: str, codes: NDArray[np.integer], labels: dict[str, Any]) -> Encoded:
    if codes.ndim != 2 or codes.shape[0] != card.num_codebooks:
        raise UserError(f"{id}: codes of shape {codes.shape}, expected [{card.num_codebooks}, T]")
    samples = codes.shape[1] * card.hop_length
    digest = hashlib.sha256(np.ascontiguousarray(codes, np.uint16).tobytes()).hexdigest()
    return Encoded(
        id=id,
        path=id,
        codes=list(codes),
        samples=samples,
        source_sha256=digest,
        source_rate=card.sample_rate,
        source_samples=samples,
        labels=labels,
    )
