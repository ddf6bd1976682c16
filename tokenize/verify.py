"""`codecssl-tokenize verify`: is every byte of a dataset what was written, and is every input accounted for?"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.errors import UserError
from codecssl.tokenize.shards import Shards, load_json, read_columns, read_header, shard_path, utterance_bytes


def verify(root: Path, report: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Every damage found, one line each, naming the shard and, where it can be told, the offset; [] when whole.

    Raises UserError when `root` is no finished dataset.
    """
    header = read_header(root)
    card = CodecCard.from_dict(header["codec"])
    total, damages, marks = header["totals"]["shards"], [], []
    for shard in range(total):
        mark, found = _verify_shard(root, shard, card)
        damages += found
        if mark:
            marks.append(mark)
        report(shard + 1, total)
    if damages:
        return damages
    return list(_verify_dataset(root, header, marks))


def _verify_shard(root: Path, shard: int, card: CodecCard) -> tuple[dict[str, Any] | None, list[str]]:
    path, name = shard_path(root, shard), f"shard {shard:05d}"
    try:
        mark = load_json(path.with_suffix(".json"))
    except FileNotFoundError:
        return None, [f"{name}: {path.with_suffix('.json').name} is missing: the shard was never finished"]
    except UserError as error:
        return None, [f"{name}: {error}"]
    if not path.exists():
        return mark, [f"{name}: {path.name} is missing"]
    damages = []
    if path.stat().st_size != mark["bytes"]:
        damages.append(f"{name}: {path.stat().st_size} bytes, expected {mark['bytes']}")
    elif _sha256(path) != mark["sha256"]:
        damages.append(f"{name}: sha256 differs")
    found = list(_verify_blocks(path, name, mark, card))
    if damages and found:
        return mark, found  # they say where
    if mark["inputs"] != mark["utterances"] + len(mark["failed"]):
        damages.append(
            f"{name}: {mark['inputs']} inputs, but {mark['utterances']} utterances and {len(mark['failed'])} failures"
        )
    return mark, damages + found


def _verify_blocks(path: Path, name: str, mark: dict[str, Any], card: CodecCard) -> Iterator[str]:
    utterances = frames = 0
    with path.open("rb") as file:
        for number, block in enumerate(mark["blocks"]):
            where = f"{name}, block {number}"
            file.seek(block["codes_offset"])
            codes = file.read(block["codes_bytes"])
            if zlib.crc32(codes) != block["crc32"]:
                end = block["codes_offset"] + block["codes_bytes"]
                yield f"{where}: codes damaged between offsets {block['codes_offset']} and {end}"
            try:
                text, numbers = read_columns(file, block["offset"])
            except Exception as error:  # a flipped bit can break any layer of tar, zip, gzip or JSON
                yield f"{where}: index damaged at offset {block['offset']} ({type(error).__name__})"
                continue
            lengths = card.frames_of(numbers["samples"].astype(np.int64))
            if len(text["id"]) != block["count"] or utterance_bytes(lengths, card).sum() != block["codes_bytes"]:
                yield f"{where}: index at offset {block['offset']} does not fit {block['codes_bytes']} bytes of codes"
            utterances += len(text["id"])
            frames += int(lengths.sum())
    if (utterances, frames) != (mark["utterances"], mark["frames"]):
        yield f"{name}: {utterances} utterances, {frames} frames; its mark says {mark['utterances']}, {mark['frames']}"


def _verify_dataset(root: Path, header: dict[str, Any], marks: list[dict[str, Any]]) -> Iterator[str]:
    totals = header["totals"]
    for key in ("inputs", "utterances", "frames", "samples", "bytes"):
        if (count := sum(mark[key] for mark in marks)) != totals[key]:
            yield f"dataset.json: {totals[key]} {key}, the shards have {count}"
    if hashlib.sha256("".join(mark["sha256"] for mark in marks).encode()).hexdigest() != header["sha256"]:
        yield "dataset.json: sha256 differs from the shards'"
    failed = (root / "failed.jsonl").read_text().count("\n") if (root / "failed.jsonl").exists() else -1
    if failed != totals["failed"]:
        yield f"failed.jsonl: {failed} rows, expected {totals['failed']}"
    try:
        shards = Shards(root)
    except (UserError, OSError, ValueError) as error:
        yield f"index: {error}"
        return
    if int(shards.frames.sum()) != totals["frames"] or int(shards.blocks["count"].sum()) != totals["utterances"]:
        yield f"index.npy, blocks.npy: {int(shards.frames.sum())} frames, expected {totals['frames']}"
    yield from _verify_codes(shards)


def _verify_codes(shards: Shards, sample: int = 64) -> Iterator[str]:
    """Read some utterances as the trainer does; a code must be below its codebook's size."""
    picks: list[int] = np.unique(np.linspace(0, len(shards) - 1, sample).astype(int)).tolist() if len(shards) else []
    for index in picks:
        for k, (plane, size) in enumerate(zip(shards.planes(index), shards.card.codebook_sizes)):
            if len(plane) and int(plane.max()) >= size:
                yield f"utterance {index}: code {int(plane.max())} in codebook {k}, which has {size} entries"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
