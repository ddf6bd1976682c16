"""The order of data: a pure function of (seed, epoch, step), the same on every rank and after every resume.

An epoch is a random permutation of the utterances. It is never listed as a whole, but processed in shuffle
windows of a hundred thousand utterances. The utterances of a window are cut into pieces of at most
`crop_frames`, from a new random offset every epoch. The pieces are shuffled within buckets of similar length. The
resulting list is cut into batches of equal frames, which are shuffled. Memory usage is that of two windows and one
number per utterance, for a corpus of any size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from codecssl.pretrain.data.hashed_random import hashed, permuted, uniform
from codecssl.tokenize.common.errors import UserError

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SHUFFLE_WINDOW = 1 << 17
"""Number of utterances of a shuffle window."""
_CHUNK = 1 << 17

_ORDER, _OFFSET, _BATCHES, _COPIES, _SHUFFLE, _HOLD = range(100, 106)  # streams of random numbers; masking has its own


@dataclass(frozen=True)
class Pieces:
    """Pieces of utterances, as parallel arrays [n]: frames start .. start + frames of each utterance."""

    utterance: Ints
    start: Ints
    frames: Ints

    def __len__(self) -> int:
        return len(self.utterance)

    def __getitem__(self, part: slice | Ints) -> "Pieces":
        return Pieces(self.utterance[part], self.start[part], self.frames[part])


class UtterancePool:
    """The utterances of an epoch, as places 0 .. size - 1, some of which may be empty.

    frames:     [N] frames per utterance, of the whole corpus (may be a memory map).
    first:      [F + 1] first utterance of each of the F folders, and N.
    weights:    [F] passes over each folder in one epoch; () is one pass each.
    min_frames: shorter utterances are skipped.
    held_out:   fraction of the utterances held out for validation, chosen by their index in the folder alone.
    """

    def __init__(
        self,
        frames: npt.NDArray[Any],
        *,
        first: Sequence[int] | None = None,
        weights: Sequence[float] = (),
        min_frames: int = 1,
        held_out: float = 0.0,
    ) -> None:
        self.frames = frames
        self.first = np.asarray([0, len(frames)] if first is None else first, dtype=np.int64)
        self.weights = np.asarray(weights or [1.0] * (len(self.first) - 1), dtype=np.float64)
        self.min_frames, self.held_out = min_frames, held_out
        self._copies = np.ceil(self.weights).astype(np.int64)  # number of places of an utterance of the folder
        self._bounds = np.concatenate([[0], np.cumsum(np.diff(self.first) * self._copies)])

    @property
    def size(self) -> int:
        return int(self._bounds[-1])

    def utterances(self, places: Ints, *keys: int) -> tuple[Ints, Ints]:
        """Return (places that are not empty, the utterance at each). `keys` select the fractional copies."""
        folder = np.searchsorted(self._bounds, places, side="right") - 1
        within, copies = places - self._bounds[folder], self._copies[folder]
        utterance = self.first[folder] + within // copies
        part = self.weights[folder] - within % copies  # weight of this copy: 1 or more is a whole copy
        there = self.usable(utterance, folder) & ((part >= 1.0) | (uniform(*keys, _COPIES, places) < part))
        return places[there], utterance[there]

    def name(self, utterances: Ints) -> Ints:
        """Return the corpus indices of utterances of this pool."""
        return utterances

    def usable(self, utterance: Ints, folder: Ints) -> Bools:
        """Return a mask of the utterances that training may use, given their folders."""
        long_enough: Bools = self.frames[utterance] >= self.min_frames
        if not self.held_out:
            return long_enough
        return long_enough & ~is_held_out(utterance - self.first[folder], self.held_out)

    def totals(self, crop_frames: int) -> tuple[int, int]:
        """Return (pieces, frames) of an epoch; averages if weights are fractional."""
        pieces = frames = 0.0
        for folder, (begin, end) in enumerate(pairwise(self.first.tolist())):
            for start in range(begin, end, _CHUNK):
                utterance = np.arange(start, min(start + _CHUNK, end))
                usable = self.usable(utterance, np.full(len(utterance), folder))
                lengths = self.frames[utterance[usable]].astype(np.int64)
                counts = np.maximum(lengths // crop_frames, 1)
                pieces += self.weights[folder] * int(counts.sum())
                frames += self.weights[folder] * int((counts * np.minimum(lengths, crop_frames)).sum())
        return round(pieces), round(frames)


def is_held_out(number: npt.ArrayLike, fraction: float) -> Bools:
    """Return a mask of held-out utterances, given their indices in their folders.

    Appending data to a folder does not change the result for existing utterances.
    """
    held: Bools = uniform(_HOLD, number) < fraction
    return held


class Plan:
    """Map a step to the pieces of its global batch. `cut` divides the batch among ranks.

    batch_frames: bound on the frames of a global batch. An epoch has ceil(its frames / batch_frames) steps, rounded up
                  to the same number per window. The batches of a window differ by at most one piece.
    parts:        number of shares into which every batch must be divisible (ranks x accumulation).
    window:       number of utterances of a shuffle window.
    """

    def __init__(
        self, pool: UtterancePool, *, seed: int, batch_frames: int, crop_frames: int, bucket_ratio: float,
        parts: int = 1, window: int = SHUFFLE_WINDOW,
    ) -> None:  # fmt: skip
        self.pool, self._seed, self._crop, self._ratio = pool, seed, crop_frames, bucket_ratio
        self.pieces_per_epoch, self.frames_per_epoch = pool.totals(crop_frames)
        if not self.pieces_per_epoch:
            raise UserError("data: no utterance is left to use; lower data.min_frames or give more data")
        self.windows = max(1, round(pool.size / window))
        self.steps_per_window = -(-self.frames_per_epoch // (batch_frames * self.windows))
        self.steps_per_epoch = self.steps_per_window * self.windows
        longest = min(int(pool.frames.max()), crop_frames)
        if self.frames_per_epoch < longest * self.steps_per_epoch * parts:
            raise UserError(
                f"data: {self.frames_per_epoch} frames in {self.steps_per_epoch} batches do not fill"
                f" {parts} part(s) with pieces of up to {longest} frames; use fewer parts (ranks x"
                " engine.accumulation), a smaller data.crop_frames or a larger data.batch_frames"
            )
        self._windows: dict[tuple[int, int], tuple[Pieces, Ints, Ints]] = {}
        self._lock = Lock()  # several threads may request the first batch of a window at once

    def epoch(self, step: int) -> int:
        """Return the epoch of a step (0, 1, ...)."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Pieces:
        """Return the global batch of a step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        window, index = divmod(index, self.steps_per_window)
        with self._lock:
            if (epoch, window) not in self._windows:
                newest = list(self._windows.items())[-1:]
                self._windows = {**dict(newest), (epoch, window): self._window(epoch, window)}
            pieces, bounds, turns = self._windows[epoch, window]
        turn = int(turns[index])
        return pieces[slice(int(bounds[turn]), int(bounds[turn + 1]))]

    def _window(self, epoch: int, window: int) -> tuple[Pieces, Ints, Ints]:
        """Return a window's pieces, shuffled in buckets, the bounds [steps + 1] of its batches, and their order."""
        begin, end = (self.pool.size * c // self.windows for c in (window, window + 1))
        places = permuted(np.arange(begin, end), self.pool.size, self._seed, _ORDER, epoch)
        places, utterances = self.pool.utterances(places, self._seed, epoch)
        owner, pieces = self._pieces(epoch, places, utterances)
        bucket = np.floor(np.log(pieces.frames) / np.log(self._ratio)).astype(np.int32)
        order = np.lexsort((hashed(self._seed, _SHUFFLE, epoch, places[owner], pieces.start), bucket))
        pieces = pieces[order]
        steps = np.arange(self.steps_per_window)
        turns = np.argsort(hashed(self._seed, _BATCHES, epoch, window, steps))
        return pieces, equal_cuts(pieces.frames, self.steps_per_window), turns

    def _pieces(self, epoch: int, places: Ints, utterances: Ints) -> tuple[Ints, Pieces]:
        """Return (index into `utterances` of each piece, the pieces)."""
        lengths = self.pool.frames[utterances].astype(np.int64)
        counts, frames = np.maximum(lengths // self._crop, 1), np.minimum(lengths, self._crop)
        slack = lengths - counts * frames  # frames that this epoch skips
        offset = np.floor(uniform(self._seed, _OFFSET, epoch, places) * (slack + 1)).astype(np.int64)
        owner = np.repeat(np.arange(len(utterances)), counts)
        turn = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        return owner, Pieces(self.pool.name(utterances)[owner], offset[owner] + turn * frames[owner], frames[owner])


def cut(batch: Pieces, parts: int) -> list[Pieces]:
    """Divide a global batch into `parts` consecutive shares of equal frames (within one piece)."""
    bounds = equal_cuts(batch.frames, parts)
    return [batch[int(a) : int(b)] for a, b in pairwise(bounds)]


def equal_cuts(frames: Ints, parts: int) -> Ints:
    """Return bounds [parts + 1]: part p holds the items whose first frame lies in its equal share of all frames."""
    starts = np.cumsum(frames) - frames
    total = int(frames.sum())
    shares = -(-np.arange(parts + 1, dtype=np.int64) * total // parts)
    return np.searchsorted(starts, shares, side="left").astype(np.int64)
