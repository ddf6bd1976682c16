"""Shard folders as one list of utterances, of one codec, split into training and validation."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from codecssl.pretrain.chance import hashed
from codecssl.pretrain.config import DataConfig
from codecssl.pretrain.plan import Ints
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.errors import UserError
from codecssl.tokenize.shards import Shards


class Corpus:
    """The utterances of several shard folders, numbered through; `codes` reads one piece of one of them."""

    def __init__(self, dirs: Sequence[str | Path], *, num_codebooks: int | None = None) -> None:
        if not dirs:
            raise UserError("data: no shard folder given; add --data DIR")
        self._shards = [Shards(path) for path in dirs]
        self.card = _common_card(self._shards, num_codebooks)
        self.frames: npt.NDArray[Any] = np.concatenate([np.asarray(shards.frames) for shards in self._shards])
        self.fingerprints = [shards.fingerprint for shards in self._shards]
        self._first = np.cumsum([0, *(len(shards) for shards in self._shards)])

    @property
    def label_sizes(self) -> tuple[int, ...]:
        """Classes of each stream of the label folders; () without such."""
        return ()

    def __len__(self) -> int:
        return int(self._first[-1])

    def codes(self, index: int, start: int, frames: int) -> npt.NDArray[np.uint16]:
        """uint16 [K, frames] of utterance `index` from frame `start`."""
        shards, local = self._locate(index)
        return shards.codes(local, num_codebooks=self.card.num_codebooks, start=start, stop=start + frames)

    def utterance_id(self, index: int) -> str:
        shards, local = self._locate(index)
        return str(shards.utterance(local).id)

    def _locate(self, index: int) -> tuple[Shards, int]:
        folder = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._shards[folder], index - int(self._first[folder])


def split(corpus: Corpus, config: DataConfig) -> tuple[Ints, Ints]:
    """(training, validation) utterances of a corpus, told apart by a hash of the id: more data moves none."""
    usable = np.flatnonzero(corpus.frames >= config.min_frames).astype(np.int64)
    if config.valid_dirs or config.valid_fraction == 0.0:
        return usable, usable[:0]
    held_out = np.fromiter((_share(corpus.utterance_id(int(i))) < config.valid_fraction for i in usable), dtype=bool)
    return usable[~held_out], limited(corpus, usable[held_out], config)


def limited(corpus: Corpus, utterances: Ints, config: DataConfig) -> Ints:
    """Some of the usable `utterances`, from all over, that give `valid_frames` frames; at least one."""
    usable = utterances[corpus.frames[utterances] >= config.min_frames]
    usable = usable[np.argsort(hashed(usable), kind="stable")]
    seen = np.cumsum(np.minimum(corpus.frames[usable].astype(np.int64), config.crop_frames))
    return np.sort(usable[: max(1, int(np.searchsorted(seen, config.valid_frames, side="right")))])


def _share(identifier: str) -> float:
    """A number in [0, 1) that depends on the id alone."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:7], "big") / 2**56


def _common_card(shards: Sequence[Shards], num_codebooks: int | None) -> CodecCard:
    card = shards[0].card
    for other in shards[1:]:
        if other.card.fingerprint != card.fingerprint:
            raise UserError(
                f"{other.path}: written with codec {other.card.name}, {shards[0].path} with {card.name}"
                f" ({other.card.difference(card)}); train on shards of one codec"
            )
    if any(rate != 1 for rate in card.codes_per_frame):
        raise UserError(
            f"{shards[0].path}: codec {card.name} gives {card.codes_per_frame} codes a frame;"
            " pretraining needs one code per codebook and frame"
        )
    kept = card.num_codebooks if num_codebooks is None else num_codebooks
    if kept > card.num_codebooks:
        raise UserError(f"data.num_codebooks: {kept}, but {shards[0].path} has {card.num_codebooks}; lower it")
    return replace(card, codebook_sizes=card.codebook_sizes[:kept], codes_per_frame=card.codes_per_frame[:kept])
