"""Utterances of a written shard in the form in which they were written, so that another shard can take them over."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.blocks import block_codes, mel_planes
from codecssl.tokenize.format.layout import (
    MEL_CRC32,
    mel_offset,
    read_coder,
    read_columns,
    scales_of,
    stored_bytes,
    to_planes,
)
from codecssl.tokenize.format.records import EncodedUtterance
from codecssl.tokenize.format.validate import read_members

CACHED_BLOCKS = 2
"""Number of blocks whose utterances are kept in memory by each process."""


@dataclass(frozen=True)
class StoredPlace:
    """Position of one utterance: its shard's tar, the fields of its block in the shard's mark, and its number there."""

    tar: str
    block: tuple[tuple[str, int], ...]
    within: int
    notes: tuple[str, ...] = ()
    """Notes about its audio, from the shard's mark."""


def stored_places(tar: Path, mark: dict[str, Any]) -> Iterator[StoredPlace]:
    """Yield the places of the utterances of a shard, in order. Their notes are left out."""
    for place in mark["blocks"]:
        fields = tuple(sorted(place.items()))
        for within in range(place["count"]):
            yield StoredPlace(str(tar), fields, within)


_cached: dict[tuple[str, int], list[EncodedUtterance]] = {}


def stored_utterance(place: StoredPlace, card: CodecCard) -> EncodedUtterance:
    """Read one utterance, without its labels. Raises UserError if its block is damaged."""
    block = dict(place.block)
    key = place.tar, block["offset"]
    if key not in _cached:
        try:
            utterances = _read_block(Path(place.tar), block, card)
        except Exception as error:  # a flipped bit can break any layer: tar, zip, gzip, JSON
            raise UserError(f"{place.tar}: cannot be read ({error}); run `codecssl-tokenize verify`") from error
        while len(_cached) >= CACHED_BLOCKS:
            del _cached[next(iter(_cached))]
        _cached[key] = utterances
    return _cached[key][place.within]


def _read_block(tar: Path, block: dict[str, int], card: CodecCard) -> list[EncodedUtterance]:
    with tar.open("rb") as file:
        text, numbers = read_columns(file, block["offset"], block["count"])
        file.seek(block["codes_offset"])
        codes = file.read(block["codes_bytes"])
        has_mel = MEL_CRC32 in numbers
        header = mel_offset(block["codes_offset"], block["codes_bytes"]) - 512
        mel = read_members(file, header, 1)[0] if has_mel else b""
    frames = card.frames_of(numbers["samples"].astype(np.int64))
    if zlib.crc32(codes) != block["crc32"] or int(stored_bytes(numbers, frames, card).sum()) != len(codes):
        raise ValueError("its codes are damaged")
    coder = read_coder(tar, card) if "stream_words" in numbers else None
    planes = mel_planes(mel, numbers, card) if has_mel else None
    if planes is not None and [zlib.crc32(plane.tobytes()) for plane in planes] != numbers[MEL_CRC32].tolist():
        raise ValueError("its log-mel plane is damaged")
    found = []
    for within, rows in enumerate(block_codes(codes, numbers, card, coder)):
        samples, rate = int(numbers["samples"][within]), int(numbers["source_rate"][within])
        found.append(
            EncodedUtterance(
                id=text["id"][within],
                path=text.get("path", text["id"])[within],
                codes=to_planes(rows, card),
                samples=samples,
                source_sha256=bytes(numbers["sha256"][within]).hex(),
                source_rate=rate,
                source_samples=samples * rate // card.sample_rate + int(numbers["source_rest"][within]),
                scales=scales_of(numbers, within, card),
                mel=None if planes is None else planes[within],
            )
        )
    return found
