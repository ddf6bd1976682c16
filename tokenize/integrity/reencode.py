"""Re-encodes a few utterances of a dataset and compares their codes with the stored ones."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.tokenize.codec import Codec, CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.blocks import packed_again
from codecssl.tokenize.format.layout import load_json, read_coder, read_columns, shard_path
from codecssl.tokenize.integrity.shard_check import Damage
from codecssl.tokenize.registry import load_codec_for
from codecssl.tokenize.shards import Shards, Utterance
from codecssl.tokenize.sources.sources import Input, is_stream, read_sources

READ = 64
"""Number of utterances to read."""
FOREIGN = 0.1
"""Share of differing codes in the coarsest codebook above which rounding cannot be the cause."""


def read_some(root: Path) -> Iterator[Damage]:
    """Read some utterances as training does. Each code must be below its codebook's size."""
    shards = Shards(root, check=False)
    for index in _spread(len(shards), READ):
        try:
            planes = shards.planes(index)
        except (UserError, ValueError, IndexError) as error:
            yield _damage(shards, index, str(error))
            continue
        if shards.mel_spec is not None:
            try:
                shards.mel(index)
            except UserError as error:
                yield _damage(shards, index, str(error))
        for k, (plane, size) in enumerate(zip(planes, shards.card.codebook_sizes)):
            if len(plane) and int(plane.max()) >= size:
                yield _damage(shards, index, f"code {int(plane.max())} in codebook {k}, which has {size} entries")


def coder_agrees(root: Path) -> Iterator[Damage]:
    """Check that an entropy-coded dataset's first block decodes correctly. Another coder version might differ."""
    shards = Shards(root)
    if not shards.entropy_coded or not len(shards):
        return
    tar = shard_path(root, int(shards.blocks["shard"][0]))
    place = load_json(tar.with_suffix(".json"))["blocks"][0]
    with tar.open("rb") as file:
        numbers = read_columns(file, place["offset"])[1]
        file.seek(place["codes_offset"])
        codes = file.read(place["codes_bytes"])
    try:
        found = zlib.crc32(packed_again(codes, numbers, read_coder(tar, shards.card), shards.card))
    except AssertionError:  # the coder rejects streams that it cannot have written
        found = None
    if found != place["packed_crc32"]:
        what = "its first block does not decode to the codes that were encoded"
        yield Damage(file=tar.relative_to(root).as_posix(), what=what, shard=int(shards.blocks["shard"][0]))


def _spread(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` of `count` positions, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)).tolist() if count else []


def _damage(shards: Shards, index: int, what: str) -> Damage:
    row = shards.blocks[np.searchsorted(shards.blocks["first"], index, "right") - 1]
    tar = shard_path(shards.path, shard := int(row["shard"]))
    what = f"utterance {index} ({shards.utterance(index).id}): {what}"
    return Damage(file=tar.relative_to(shards.path).as_posix(), what=what, shard=shard)


def spot_check(root: Path, plan: dict[str, Any], count: int, weights: str | None) -> tuple[list[Damage], list[str]]:
    """Encode `count` evenly spread utterances again. Return (damages, notes for the user).

    A check that is impossible here (no weights, no sources, a changed source) is a note. A small share of differing
    codes is also a note, because other processors and libraries round differently. Codes of other audio are a damage.
    """
    shards = Shards(root)
    device = "cuda" if shards.card.policies.get("device", "cpu").startswith("cuda") else "cpu"
    try:
        codec = load_codec_for(shards.card, device=_available(device), weights=weights)
    except (UserError, ImportError) as error:
        return [], [f"no utterance encoded again: {error}"]
    found = _SpotCheck(shards, codec)
    try:
        for utterance, item in _picked(shards, plan, count):
            found.compare(utterance, item)
    except UserError as error:
        found.notes.append(f"the sources are not all here: {error}")
    return found.damages, [found.summary(), *found.notes]


def _available(device: str) -> str:
    import torch

    return device if torch.cuda.is_available() else "cpu"


def _picked(shards: Shards, plan: dict[str, Any], count: int) -> Iterator[tuple[Utterance, Input]]:
    """Yield utterances and their inputs. The sources are listed once, in the shards' order."""
    sources = list(plan.get("sources", []))
    if not sources:
        raise UserError("the dataset was written from existing codes, so there is no audio to re-encode")
    streamed = any(is_stream(source) for source in sources)
    picks = iter(_spread(min(len(shards), count) if streamed else len(shards), count))  # not to fetch a corpus for it
    wanted = next(picks, None)
    for item in read_sources(sources):
        if wanted is None:
            return
        if item.id == (utterance := shards.utterance(wanted)).id:
            yield utterance, item
            wanted = next(picks, None)
    if wanted is not None:
        raise UserError(f"{shards.utterance(wanted).id} is no longer among them")


class _SpotCheck:
    def __init__(self, shards: Shards, codec: Codec) -> None:
        self.shards, self.codec = shards, codec
        self.encoded = self.codes = self.differing = 0
        self.damages: list[Damage] = []
        self.notes: list[str] = []

    def compare(self, utterance: Utterance, item: Input) -> None:
        from codecssl.tokenize.encode import encode_loaded, read
        from codecssl.tokenize.format.records import Failure

        [result] = encode_loaded(self.codec, [read(item, self.codec.card)], self.shards.mel_spec)
        if isinstance(result, Failure):
            self.notes.append(f"{utterance.id}: its source can no longer be read: {result.reason}")
            return
        if result.source_sha256 != utterance.source_sha256:
            self.notes.append(f"{utterance.id}: its source changed since")
            return
        planes = self.shards.planes(utterance.index)
        self.encoded += 1
        if [len(p) for p in planes] != [len(p) for p in result.codes]:
            what = f"{len(planes[0])} codes a codebook, its source gives {len(result.codes[0])}"
            self.damages.append(_damage(self.shards, utterance.index, what))
            return
        if result.mel is not None and int(np.abs(self.shards.mel(utterance.index) - result.mel.astype(int)).max()) > 1:
            self.damages.append(_damage(self.shards, utterance.index, "its log-mel plane is not its source's"))
        differing = [int((a != b).sum()) for a, b in zip(planes, result.codes)]
        self.codes += sum(len(plane) for plane in planes)
        self.differing += sum(differing)
        if differing[0] > FOREIGN * len(planes[0]):
            what = f"{differing[0]} of {len(planes[0])} codes of codebook 0 are not its source's"
            self.damages.append(_damage(self.shards, utterance.index, what))

    def summary(self) -> str:
        """One-line summary: the numbers of utterances and differing codes and, if any differ, the versions."""
        line = f"{self.encoded} utterances encoded again: {self.differing} of {self.codes} codes differ"
        if not self.differing:
            return line
        rate = f"{self.differing / self.codes:.3%}"
        return f"{line} ({rate}; written with {_versions(self.shards.card)}, here {_versions(self.codec.card)})"


def _versions(card: CodecCard) -> str:
    device = card.policies.get("device", "cpu")
    return ", ".join([device, *(f"{name} {version}" for name, version in card.versions.items())])
