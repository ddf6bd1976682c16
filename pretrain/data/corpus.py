"""Shard folders of one codec as one list of utterances, with optional label folders."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.mel import MelSpec
from codecssl.tokenize.shards import Shards


class TokenCorpus:
    """The utterances of several shard folders, numbered consecutively. `codes` reads one piece of an utterance.

    dirs: folders, or URLs (`codecssl.tokenize.common.remote`), as the user gave them.
    labels: label folders, one for each of `dirs` (see label.py), with the same utterances and frames.
    retry_seconds: time for which a read is retried while a disk is unavailable.
    Raises UserError for folders of different codecs, and for labels of other data.
    """

    def __init__(
        self,
        dirs: Sequence[str | Path],
        *,
        num_codebooks: int | None = None,
        labels: Sequence[str | Path] = (),
        retry_seconds: float = 0.0,
    ) -> None:
        if not dirs:
            raise UserError("data: no shard folder given; add --data DIR")
        self._shards, given = (
            [Shards(path, retry_seconds=retry_seconds, remote=True) for path in each] for each in (dirs, labels)
        )
        self.card = _common_card(self._shards, num_codebooks)
        self._labels = _matching(self._shards, given) if given else []
        frames = [shards.frames for shards in self._shards]
        self.frames: npt.NDArray[Any] = frames[0] if len(frames) == 1 else np.concatenate(frames)
        """[N] frames of each utterance. With one folder it is a memory map, which the ranks of a node share."""
        self.mel_spec = _common_mel(self._shards)
        """Specification of the log-mel plane that all folders have, or None."""
        self.fingerprints = [shards.fingerprint for shards in (*self._shards, *self._labels)]
        self.first = np.cumsum([0, *(len(shards) for shards in self._shards)])
        """[F + 1] first utterance of each folder."""

    @property
    def label_sizes(self) -> tuple[int, ...]:
        """Number of classes of each stream of the label folders; () without label folders."""
        return self._labels[0].card.codebook_sizes if self._labels else ()

    @property
    def clustering(self) -> str:
        """sha256 of the centroids, or of the file, from which the labels were made; "" without label folders."""
        return self._labels[0].card.weights_sha256 if self._labels else ""

    def __len__(self) -> int:
        return int(self.first[-1])

    def codes(self, index: int, start: int, frames: int) -> npt.NDArray[np.uint16]:
        """Return the codes uint16 [R, frames] of utterance `index` from frame `start`."""
        folder, local = self._locate(index)
        kept = self.card.num_codebooks
        return self._shards[folder].codes(local, num_codebooks=kept, start=start, stop=start + frames)

    def mel(self, index: int, start: int, frames: int) -> npt.NDArray[np.uint8]:
        """Return the stored log-mel plane uint8 [bands, frames] of the same piece."""
        folder, local = self._locate(index)
        return self._shards[folder].mel(local, start=start, stop=start + frames).T

    def require_mel(self, model_input: str) -> MelSpec | None:
        """Return the log-mel plane that a model with this `model.input` reads; None for codes.

        Raises UserError if a folder has no log-mel plane.
        """
        if model_input == "codes":
            return None
        first = self._shards[0].mel_spec
        for shards in self._shards:
            if shards.mel_spec is None or first is None:
                raise UserError(
                    f"model.input: {model_input}, but {shards.path} has no log-mel plane; tokenize the audio with"
                    " --with-mel 80, or set model.input codes"
                )
            if shards.mel_spec != first:
                raise UserError(
                    f"{shards.path}: another log-mel plane than {self._shards[0].path}"
                    f" ({shards.mel_spec.difference(first)}); tokenize both with {first.options}"
                )
        return self.mel_spec

    def labels(self, index: int, start: int, frames: int) -> npt.NDArray[np.uint16]:
        """Return the labels uint16 [S, frames] of the same piece."""
        folder, local = self._locate(index)
        return self._labels[folder].codes(local, start=start, stop=start + frames)

    def utterance_id(self, index: int) -> str:
        folder, local = self._locate(index)
        return str(self._shards[folder].utterance(local).id)

    def _locate(self, index: int) -> tuple[int, int]:
        folder = int(np.searchsorted(self.first, index, side="right")) - 1
        return folder, index - int(self.first[folder])


def _common_mel(shards: Sequence[Shards]) -> MelSpec | None:
    first = shards[0].mel_spec
    return first if all(other.mel_spec == first for other in shards) else None


def _matching(shards: Sequence[Shards], labels: Sequence[Shards]) -> list[Shards]:
    """Check that each label folder fits its shards and that all are of one clustering. Return them."""
    if len(labels) != len(shards):
        raise UserError(f"data.labels: {len(labels)} folders for {len(shards)} of data.dirs; give one for each")
    for data, given in zip(shards, labels, strict=True):
        if given.card.policies.get("labels_of") != data.fingerprint:
            raise UserError(f"{given.path}: labels of other data than {data.path}; label that folder")
        if len(given) != len(data) or not np.array_equal(given.frames, data.frames):
            raise UserError(f"{given.path}: not as many frames as {data.path}; label at the codes' frame rate")
        if given.card.weights_sha256 != labels[0].card.weights_sha256:
            raise UserError(f"{given.path}: clustering differs from that of {labels[0].path}; use one clustering")
    return list(labels)


def _common_card(shards: Sequence[Shards], num_codebooks: int | None) -> CodecCard:
    """Return the codec's card with the codebooks that are kept.

    Folders may hold more codebooks, and may differ in their number.
    """
    kept = shards[0].card.num_codebooks if num_codebooks is None else num_codebooks
    for each in shards:
        if num_codebooks is not None and kept > each.card.num_codebooks:
            raise UserError(f"data.num_codebooks: {kept}, but {each.path} has {each.card.num_codebooks}; lower it")
    card = with_codebooks(shards[0].card, kept)
    for other in shards[1:]:
        theirs = other.card if num_codebooks is None else with_codebooks(other.card, kept)
        if theirs.fingerprint != card.fingerprint:
            both = min(kept, other.card.num_codebooks)
            same = with_codebooks(other.card, both).fingerprint == with_codebooks(card, both).fingerprint
            remedy = (
                f"read the {both} that both have: --data.num_codebooks {both}"
                if same
                else "train on shards of one codec"
            )
            raise UserError(
                f"{other.path}: written with codec {other.card.name}, {shards[0].path} with {card.name}"
                f" ({theirs.difference(card)}); {remedy}"
            )
    return card


def with_codebooks(card: CodecCard, count: int) -> CodecCard:
    """Return the card of the first `count` codebooks of a codec."""
    return replace(card, codebook_sizes=card.codebook_sizes[:count], codes_per_frame=card.codes_per_frame[:count])
