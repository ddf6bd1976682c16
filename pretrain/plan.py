"""The order of data: a pure function of (seed, epoch, step), the same on every rank and after every resume.

An epoch cuts each utterance into pieces of at most `crop_frames` (from a new random offset every epoch),
shuffles the pieces within buckets of like length, and cuts that list into batches of equal frames, which it
shuffles. Nothing is kept but a few integers a piece for the current epoch.
"""

from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from codecssl.pretrain.chance import hashed, uniform
from codecssl.tokenize.errors import UserError

Ints = npt.NDArray[np.int64]

_ORDER, _OFFSET, _BATCHES = range(100, 103)  # streams of random numbers; masking has its own


@dataclass(frozen=True)
class Pieces:
    """Pieces of utterances, as parallel arrays [n]: frames start .. start + frames of each utterance."""

    utterance: Ints
    start: Ints
    frames: Ints

    def __len__(self) -> int:
        return len(self.utterance)

    def __getitem__(self, part: slice) -> "Pieces":
        return Pieces(self.utterance[part], self.start[part], self.frames[part])


class Plan:
    """step -> the pieces of that step's global batch; `cut` gives one rank's share of it.

    frames:       [N] frames per utterance, of the whole corpus (may be a memory map).
    utterances:   which of them to use.
    batch_frames: bound on the frames of a global batch. All batches are within one piece of total /
    steps_per_epoch,
                  the largest equal share not above the bound.
    parts:        into how many shares every batch must be divisible (ranks x accumulation).
    """

    def __init__(
        self, frames: npt.NDArray[Any], utterances: Ints, *,
        seed: int, batch_frames: int, crop_frames: int, bucket_ratio: float, parts: int = 1,
    ) -> None:  # fmt: skip
        if not len(utterances):
            raise UserError("data: no utterance is left to use; lower data.min_frames or give more data")
        self._seed, self._crop, self._ratio = seed, crop_frames, bucket_ratio
        self._utterances, self._frames = utterances, np.asarray(frames[utterances], dtype=np.int64)
        counts = np.maximum(self._frames // crop_frames, 1)
        self._first = np.concatenate([[0], np.cumsum(counts)])  # [N + 1] first piece of each utterance
        self.pieces_per_epoch = int(self._first[-1])
        self.frames_per_epoch = int((counts * np.minimum(self._frames, crop_frames)).sum())
        self.steps_per_epoch = -(-self.frames_per_epoch // batch_frames)
        longest = int(np.minimum(self._frames, crop_frames).max())
        if self.frames_per_epoch < longest * self.steps_per_epoch * parts:
            raise UserError(
                f"data: {self.frames_per_epoch} frames in {self.steps_per_epoch} batches do not fill"
                f" {parts} part(s) with pieces of up to {longest} frames; use fewer parts (ranks x"
                " engine.accumulation), a smaller data.crop_frames or a larger data.batch_frames"
            )
        self._epochs: dict[int, tuple[Ints, Ints, Ints]] = {}
        self._lock = Lock()  # readers in several threads may ask for the first batch of an epoch at once

    def epoch(self, step: int) -> int:
        """The epoch that step (0, 1, ...) falls into."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Pieces:
        """The global batch of a step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        with self._lock:
            if epoch not in self._epochs:
                kept = {epoch - 1: self._epochs[epoch - 1]} if epoch - 1 in self._epochs else {}
                self._epochs = {**kept, epoch: self._order(epoch)}
            order, bounds, turns = self._epochs[epoch]
        turn = int(turns[index])
        return self._pieces(epoch, order[bounds[turn] : bounds[turn + 1]])

    def _order(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """An epoch's pieces, shuffled in buckets; [steps + 1] bounds of its batches; their order."""
        pieces, steps = np.arange(self.pieces_per_epoch), np.arange(self.steps_per_epoch)
        frames = np.repeat(np.minimum(self._frames, self._crop), np.diff(self._first))
        bucket = np.floor(np.log(frames) / np.log(self._ratio)).astype(np.int32)
        order = np.lexsort((hashed(self._seed, _ORDER, epoch, pieces), bucket))
        turns = np.argsort(hashed(self._seed, _BATCHES, epoch, steps))
        return order, equal_cuts(frames[order], self.steps_per_epoch), turns

    def _pieces(self, epoch: int, pieces: Ints) -> Pieces:
        owner = np.searchsorted(self._first, pieces, side="right") - 1
        frames = np.minimum(self._frames[owner], self._crop)
        count = self._first[owner + 1] - self._first[owner]
        slack = self._frames[owner] - count * frames  # frames that this epoch leaves out
        utterance = self._utterances[owner]
        offset = np.floor(uniform(self._seed, _OFFSET, epoch, utterance) * (slack + 1)).astype(np.int64)
        return Pieces(utterance, offset + (pieces - self._first[owner]) * frames, frames)


def cut(batch: Pieces, parts: int) -> list[Pieces]:
    """A global batch as `parts` shares of equal frames (within one piece), together the batch, in order."""
    bounds = equal_cuts(batch.frames, parts)
    return [batch[int(a) : int(b)] for a, b in pairwise(bounds)]


def equal_cuts(frames: Ints, parts: int) -> Ints:
    """[parts + 1] bounds: part p holds the items whose first frame lies in its equal share of all frames."""
    starts = np.cumsum(frames) - frames
    total = int(frames.sum())
    shares = -(-np.arange(parts + 1, dtype=np.int64) * total // parts)
    return np.searchsorted(starts, shares, side="left").astype(np.int64)
