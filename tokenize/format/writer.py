"""Writing shards: atomic blocks first, then the tar, then its completion record, then the dataset.

Every file is written under a temporary name, fsynced and renamed. A block's bytes depend only on its utterances, a
shard's only on its blocks. They are identical for every writer and any number of interruptions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import atomic_file, sync_folder, temporaries, write_atomic
from codecssl.tokenize.format.blocks import (
    BlockPlace,
    PackedBlock,
    block_bytes,
    entropy_coded_bytes,
    fit_coder,
    npz_bytes,
    tar_member,
)
from codecssl.tokenize.format.layout import (
    BLOCK,
    FORMAT,
    FORMAT_VERSION,
    load_json,
    read_numbers,
    sealed,
    shard_path,
)
from codecssl.tokenize.format.records import EncodedUtterance, Failure


def tidy(root: Path) -> None:
    """Remove leftovers of killed runs from a dataset whose shards are all finished."""
    shutil.rmtree(root / "work", ignore_errors=True)
    for path in temporaries(root) + temporaries(root / "shards"):
        path.unlink(missing_ok=True)


def to_json(value: object, indent: int | None = 1) -> bytes:
    """Serialize to JSON in UTF-8, deterministically. Bytes of file names that are not UTF-8 become JSON escapes."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


# ---------------------------------------------------------------- shards


class ShardWriter:
    """Collects one shard, block by block. `done` restores the blocks that an earlier run finished.

    With `entropy_code`, the codes are entropy-coded when the shard is finished, with tables fitted to all of its codes.
    Until then its blocks are the same as without.

    work/00007/0000-0128.block holds block 0, made of inputs 0..127 of the shard. The .json file of the same name
    holds its place and the failures among those inputs.
    """

    def __init__(self, root: Path, shard: int, card: CodecCard, *, entropy_code: bool = False) -> None:
        self.root, self.shard, self.card, self.entropy_code = root, shard, card, entropy_code
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

    def _key(self, block: int) -> str:
        return f"{self.shard:05d}-{block:05d}"

    @property
    def done(self) -> int:
        """Inputs of this shard that need not be encoded again."""
        return sum(part["inputs"] for part in self.parts)

    def add_block(
        self, inputs: int, utterances: list[EncodedUtterance], failures: list[Failure], inputs_sha256: str | None = None
    ) -> None:
        """Write the next block durably. `inputs` counts the utterances and the failures.

        inputs_sha256: over all inputs of the shard so far. A resumed run compares it.
        """
        block = len(self.parts)
        content, place = block_bytes(self._key(block), utterances, self.card) if utterances else (b"", {"count": 0})
        part: dict[str, Any] = place | {
            "inputs": inputs,
            "inputs_sha256": inputs_sha256,
            "frames": sum(self.card.frames_of(u.samples) for u in utterances),
            "samples": sum(u.samples for u in utterances),
            "failed": [asdict(f) for f in failures],
            "block_crc32": zlib.crc32(content),
        }
        if notes := _notes((note, u.id) for u in utterances for note in u.notes):
            part["notes"] = notes
        write_atomic(self._part_path(block, "block"), content)
        write_atomic(self._part_path(block, "json"), to_json(sealed(part)))
        self.parts.append(part)

    def finish(self, inputs_sha256: str) -> None:
        """Join the blocks into the tar, make it durable and write its completion record."""
        target = shard_path(self.root, self.shard)
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{target.stem}.*.tmp"):  # from a killed run
            left.unlink()
        digest, blocks, offset = hashlib.sha256(), [], 0
        with atomic_file(target) as file:
            for content, place in self._contents():
                if place is not None:
                    blocks.append(_moved(place, offset))
                offset += len(content)
                digest.update(content)
                file.write(content)
        record = {
            "format_version": FORMAT_VERSION if self.entropy_code else 1,
            "shard": self.shard,
            "sha256": digest.hexdigest(),
            "bytes": offset,
            "inputs": self.done,
            "inputs_sha256": inputs_sha256,
            "utterances": sum(b["count"] for b in blocks),
            "frames": sum(p["frames"] for p in self.parts),
            "samples": sum(p["samples"] for p in self.parts),
            "blocks": blocks,
            "failed": [f for part in self.parts for f in part["failed"]],
        }
        if notes := _notes((n, id) for part in self.parts for n, ids in part.get("notes", {}).items() for id in ids):
            record["notes"] = notes
        write_atomic(target.with_suffix(".json"), to_json(sealed(record), indent=None))
        shutil.rmtree(self.folder, ignore_errors=True)  # a sibling may tidy up at the same time

    def _contents(self) -> Iterator[tuple[bytes, BlockPlace | None]]:
        """Yield the parts of the tar, and for each block its place."""
        if self.entropy_code:
            yield from self._entropy_coded()
        else:
            for block, part in self._blocks():
                yield self._read(block), part
        yield bytes(2 * tarfile.BLOCKSIZE), None

    def _entropy_coded(self) -> Iterator[tuple[bytes, BlockPlace | None]]:
        def packed() -> Iterator[PackedBlock]:
            for block, _ in self._blocks():
                yield PackedBlock.read(self._read(block), self.card)

        if not any(self._blocks()):
            return
        coder = fit_coder(packed, self.card, sum(part["frames"] for part in self.parts))
        yield tar_member(f"{self.shard:05d}.tables.npz", npz_bytes(coder.arrays())), None
        for (block, _), content in zip(self._blocks(), packed()):
            yield entropy_coded_bytes(self._key(block), content, coder)

    def _read(self, block: int) -> bytes:
        path = self._part_path(block, "block")
        content = path.read_bytes()
        if zlib.crc32(content) != self.parts[block].get("block_crc32", zlib.crc32(content)):
            raise UserError(f"{path}: damaged since it was written; remove {self.folder} and run again")
        return content

    def _blocks(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the blocks that hold utterances. In the other blocks every input failed."""
        return ((block, part) for block, part in enumerate(self.parts) if part["count"])


def _notes(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Group (note, id) by note, in alphabetical order of the notes."""
    found: dict[str, list[str]] = {}
    for note, id in pairs:
        found.setdefault(note, []).append(id)
    return dict(sorted(found.items()))


def _moved(place: BlockPlace, offset: int) -> dict[str, int]:
    """Return the place of a block whose members begin at `offset` of the tar."""
    names = ("codes_bytes", "count", "crc32", "packed_crc32")
    kept = {name: place[name] for name in names if name in place}
    return {"offset": offset, "codes_offset": offset + place["codes_offset"]} | kept


def replace_shards(root: Path, folder: Path, mine: Callable[[int], bool]) -> list[int]:
    """Move the finished shards of `folder`, those for which `mine` is true, to `root` and return their numbers.

    dataset.json is removed first: readers never see a mixture. The completion record of a moved shard appears last. The
    next call completes an interrupted one.
    """
    marks = sorted((folder / "shards").glob("[0-9]*.json"))
    moved = [int(path.stem) for path in marks if path.stem.isdecimal() and mine(int(path.stem))]
    if moved:
        (root / "dataset.json").unlink(missing_ok=True)
        sync_folder(root)
    for shard in moved:
        new, old = shard_path(folder, shard), shard_path(root, shard)
        old.with_suffix(".json").unlink(missing_ok=True)
        sync_folder(old.parent)
        if new.exists():  # else moved by a run that was killed here
            new.replace(old)
        new.with_suffix(".json").replace(old.with_suffix(".json"))
        sync_folder(old.parent)
        shutil.rmtree(folder / "work" / f"{shard:05d}", ignore_errors=True)  # of a run that was killed
    for left in (folder / "work", folder / "shards", folder):
        with suppress(OSError):  # other tasks use it, or it is not there
            left.rmdir()
    return moved


# ---------------------------------------------------------------- the dataset


def finish_dataset(root: Path, header: dict[str, Any], shards: int) -> dict[str, Any]:
    """Write index.npy, blocks.npy, failed.jsonl and, last, dataset.json. Return the totals.

    `header` holds the fields known to the run (codec, sources, sizes). Only one shard's record is in memory at a time.
    The function is idempotent: two tasks that finish at once write the same.
    """
    card = CodecCard.from_dict(header["codec"])
    totals = dict.fromkeys(("inputs", "utterances", "frames", "samples", "bytes"), 0)
    digest, failed, blocks, notes = hashlib.sha256(), 0, 0, Counter[str]()
    with atomic_file(root / "failed.jsonl") as file:
        for record in _completion_records(root, shards):
            totals = {key: value + record[key] for key, value in totals.items()}
            digest.update(record["sha256"].encode())
            failed += len(record["failed"])
            notes.update({note: len(ids) for note, ids in record.get("notes", {}).items()})
            blocks += len(record["blocks"])
            file.writelines(to_json(row, indent=None) for row in record["failed"])
    _write_index(root, shards, card, totals["utterances"], blocks)
    found: dict[str, Any] = totals | {
        "failed": failed,
        "shards": shards,
        "hours": round(totals["samples"] / card.sample_rate / 3600, 4),
    }
    if notes:
        found["notes"] = dict(sorted(notes.items()))
    version = FORMAT_VERSION if header.get("compression") else 1
    dataset = {"format": FORMAT, "format_version": version, "sha256": digest.hexdigest(), "totals": found}
    write_atomic(root / "dataset.json", to_json(sealed(dataset | header)))
    return found


def _completion_records(root: Path, shards: int) -> Iterator[dict[str, Any]]:
    return (load_json(shard_path(root, shard).with_suffix(".json")) for shard in range(shards))


def _write_index(root: Path, shards: int, card: CodecCard, utterances: int, blocks: int) -> None:
    """Write index.npy and blocks.npy. The frames pass through a file, because their dtype is known only at the end."""
    first = largest = 0
    with TemporaryFile(dir=root, prefix=".", suffix=".tmp") as passed, atomic_file(root / "blocks.npy") as rows:
        _write_npy_header(rows, BLOCK, blocks)
        for record in _completion_records(root, shards):
            with shard_path(root, record["shard"]).open("rb") as tar:
                for block in record["blocks"]:
                    frames = card.frames_of(read_numbers(tar, block["offset"])["samples"].astype(np.int64))
                    passed.write(frames.astype(np.uint32).tobytes())
                    places = (block[key] for key in ("offset", "codes_offset", "codes_bytes", "crc32"))
                    rows.write(np.array([(record["shard"], first, block["count"], *places)], BLOCK).tobytes())
                    first, largest = first + len(frames), max(largest, int(frames.max()))
        width = np.dtype(np.uint16 if largest < 1 << 16 else np.uint32)
        passed.seek(0)
        with atomic_file(root / "index.npy") as index:
            _write_npy_header(index, width, utterances)
            while chunk := passed.read(1 << 20):
                index.write(np.frombuffer(chunk, np.uint32).astype(width).tobytes())


def _write_npy_header(file: BinaryIO, dtype: np.dtype[Any], length: int) -> None:
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, described)
