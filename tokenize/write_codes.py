"""Write existing codes as a dataset, without audio."""

from __future__ import annotations

import hashlib
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.layout import COMPRESSION, to_planes
from codecssl.tokenize.format.records import EncodedUtterance
from codecssl.tokenize.format.writer import ShardWriter, finish_dataset, tidy
from codecssl.tokenize.shards import Shards

Item = tuple[str, NDArray[np.integer], dict[str, Any]] | tuple[str, NDArray[np.integer], dict[str, Any], Any]


def write_shards(
    path: str | Path, card: CodecCard, items: Iterable[Item], per_shard: int = 8192, *, entropy_code: bool = False
) -> Shards:
    """Write existing codes as a dataset. Items are (id, codes [R, T], labels) or (..., scales [segments]).

    Use it for tests and for codes from other programs. Their sources are unknown: the source hashes are those of the
    codes.
    """
    root = Path(path)
    if (root / "dataset.json").exists():
        raise UserError(f"{root}: holds a dataset already; give another folder")
    shards = 0
    for shard, group in enumerate(_groups(iter(items), per_shard)):
        write_shard(root, shard, card, group, entropy_code=entropy_code)
        shards = shard + 1
    finish_written(root, card, shards, entropy_code=entropy_code)
    return Shards(root)


def write_shard(root: Path, shard: int, card: CodecCard, items: Sequence[Item], *, entropy_code: bool = False) -> None:
    """Write one shard of `write_shards`. Remains of a killed process are overwritten."""
    shutil.rmtree(root / "work" / f"{shard:05d}", ignore_errors=True)
    writer = ShardWriter(root, shard, card, entropy_code=entropy_code)
    writer.add_block(len(items), [_encoded(card, *item) for item in items], [])
    writer.finish(inputs_sha256="")


def finish_written(root: Path, card: CodecCard, shards: int, *, entropy_code: bool = False) -> None:
    """Finish a dataset of the shards 0 .. shards - 1 of `write_shard`."""
    header: dict[str, Any] = {"codec": card.to_dict(), "sources": []}
    finish_dataset(root, header | ({"compression": COMPRESSION} if entropy_code else {}), shards)
    tidy(root)


def _groups(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := [item for _, item in zip(range(size), items)]:
        yield group


def _encoded(
    card: CodecCard, id: str, codes: NDArray[np.integer], labels: dict[str, Any], scales: Any = None
) -> EncodedUtterance:
    if codes.ndim != 2 or codes.shape[0] != card.num_rows:
        raise UserError(f"{id}: codes of shape {codes.shape}, expected [{card.num_rows}, T]")
    samples = _samples_of(codes.shape[1], card)
    digest = hashlib.sha256(np.ascontiguousarray(codes, np.uint16).tobytes()).hexdigest()
    return EncodedUtterance(
        id=id,
        path=id,
        codes=to_planes(codes, card),
        samples=samples,
        source_sha256=digest,
        source_rate=card.sample_rate,
        source_samples=samples,
        labels=labels,
        scales=scales,
    )


def _samples_of(frames: int, card: CodecCard) -> int:
    """Return the maximum length of a wave with `frames` frames."""
    samples = bisect_right(range(frames * card.hop_length + 1), frames, key=card.frames_of) - 1
    if card.frames_of(samples) != frames:
        raise UserError(f"{frames} frames: no wave has that many with {card.name}, whose segments overlap")
    return samples
