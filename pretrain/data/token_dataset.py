"""Batches of token shards for other trainers, as a torch `IterableDataset`.

dataset = TokenDataset(["shards"], batch_frames=20_000, seed=1, rank=rank, world_size=world_size)
loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
for batch in loader:                                   # the same batches in the same order for any num_workers
    loss = model(batch["codes"], batch["frames"])
    ...
    torch.save({"data": dataset.state_dict(batch), ...}, "state.pt")
dataset.load_state_dict(torch.load("state.pt")["data"])        # the next batch is the one after `batch`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from codecssl.pretrain.bounds import at_least
from codecssl.pretrain.data.corpus import TokenCorpus
from codecssl.pretrain.data.plan import Pieces, Plan, UtterancePool, cut
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError

TokenBatch = dict[str, Any]
"""codes int64 [B, R, T] (zero in the padding); frames, utterance and start int64 [B]; step and epoch int; with_mel: mel
uint8 [B, bands, T]; with label folders: labels int64 [B, S, T]."""


class TokenDataset(IterableDataset[TokenBatch]):
    """Batches of pieces of similar length, in the order of `codecssl-pretrain run`: a function of seed and step.

    All ranks and workers need the same arguments, apart from `rank`. A step's global batch of `batch_frames` frames is
    divided among `world_size` ranks; its utterances do not depend on their number. Worker w of W of a DataLoader
    (batch_size=None) reads steps w, w + W, ...: the loader yields every step once, in order. Iteration starts at the
    step of the loaded state, 0 at first, and ends after `steps` steps in total, or never.

    dirs: shard folders or URLs of one codec. labels: label folders, one for each. with_mel: read the log-mel plane too.
    Raises UserError for unusable folders and for values out of range.
    """

    def __init__(
        self,
        dirs: Sequence[str | Path],
        *,
        batch_frames: int,
        crop_frames: int = 780,
        min_frames: int = 20,
        bucket_ratio: float = 1.04,
        seed: int = 1,
        rank: int = 0,
        world_size: int = 1,
        steps: int | None = None,
        num_codebooks: int | None = None,
        labels: Sequence[str | Path] = (),
        with_mel: bool = False,
        retry_seconds: float = 120.0,
    ) -> None:
        for name, value in (("batch_frames", batch_frames), ("crop_frames", crop_frames), ("min_frames", min_frames)):
            at_least(name, value, 1)
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank}: must be from 0 to world_size - 1, which is {world_size - 1}")
        if bucket_ratio <= 1.0:
            raise UserError(f"bucket_ratio: {bucket_ratio}, must be above 1")
        self._corpus = {"dirs": dirs, "num_codebooks": num_codebooks, "labels": labels, "retry_seconds": retry_seconds}
        self._plan = {"seed": seed, "batch_frames": batch_frames, "crop_frames": crop_frames, "parts": world_size,
                      "bucket_ratio": bucket_ratio}  # fmt: skip
        self._min_frames, self._rank, self._world_size = min_frames, rank, world_size
        self._last, self._with_mel = steps, with_mel
        self._first, self._own = 0, False  # the next step; of this worker alone, if its own state was loaded
        self._open()

    def _open(self) -> None:
        self.corpus = TokenCorpus(**self._corpus)  # type: ignore[arg-type]
        if self._with_mel:
            self.corpus.require_mel("both")
        first = self.corpus.first.tolist()
        pool = UtterancePool(self.corpus.frames, first=first, min_frames=self._min_frames)
        self.plan = Plan(pool, **self._plan)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:  # a worker process opens the shards itself
        return {key: value for key, value in vars(self).items() if key not in ("corpus", "plan")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    @property
    def card(self) -> CodecCard:
        """Card of the shards' codec."""
        return self.corpus.card

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def __iter__(self) -> Iterator[TokenBatch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        step = self._first if self._own else self._first + number
        self._own = worker is not None
        while self._last is None or step < self._last:
            batch = self.batch(step)
            self._first = step = step + count
            yield batch

    def batch(self, step: int) -> TokenBatch:
        """Return this rank's batch of a step."""
        pieces = cut(self.plan.batch(step), self._world_size)[self._rank]
        corpus, streams = self.corpus, len(self.corpus.label_sizes)
        batch: TokenBatch = {
            "codes": padded(corpus.codes, corpus.card.num_rows, pieces),
            "frames": torch.from_numpy(pieces.frames.copy()),
            "utterance": torch.from_numpy(pieces.utterance.copy()),
            "start": torch.from_numpy(pieces.start.copy()),
            "step": step,
            "epoch": self.plan.epoch(step),
        }
        if streams:
            batch["labels"] = padded(corpus.labels, streams, pieces)
        if self._with_mel and corpus.mel_spec is not None:
            batch["mel"] = padded(corpus.mel, corpus.mel_spec.bands, pieces, np.uint8)
        return batch

    def state_dict(self, batch: TokenBatch | None = None) -> dict[str, Any]:
        """Return the position after `batch`, or after the last batch that this process has read.

        A DataLoader with workers reads ahead: give the last batch that was trained on. In a worker process the
        position is that worker's own.
        """
        step = self._first if batch is None else int(batch["step"]) + 1
        return {"step": step, "data": self._data(), "worker": get_worker_info() is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after a saved position, with any number of ranks and, unless it is a worker's own, of workers.

        Raises UserError for a position in other data, or in another order of it.
        """
        if state["data"] != self._data():
            wrong = [key for key, value in self._data().items() if state["data"].get(key) != value]
            raise UserError(f"state: saved with another {', '.join(wrong)}; use the shards and settings of that run")
        self._first, self._own = int(state["step"]), bool(state["worker"])

    def _data(self) -> dict[str, Any]:
        """Return the values on which the order of data depends."""
        order = {key: value for key, value in self._plan.items() if key != "parts"}
        return {"shards": list(self.corpus.fingerprints), "min_frames": self._min_frames, **order}


def padded(read: Callable[[int, int, int], Any], rows: int, pieces: Pieces, dtype: Any = np.int64) -> torch.Tensor:
    """Return a tensor [B, rows, T] of `dtype` with the piece that `read` returns for each item, zero in the padding."""
    padded = np.zeros((len(pieces), rows, int(pieces.frames.max())), dtype=dtype)
    for item, (utterance, start, frames) in enumerate(
        zip(pieces.utterance.tolist(), pieces.start.tolist(), pieces.frames.tolist(), strict=True)
    ):
        padded[item, :, :frames] = read(utterance, start, frames)
    return torch.from_numpy(padded)
