"""Data loader: read, pack and mask the pieces of each step of the plan, several steps in advance."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codecssl.pretrain.config import MaskConfig, ObjectiveConfig
from codecssl.pretrain.data.corpus import TokenCorpus
from codecssl.pretrain.data.hashed_random import hashed
from codecssl.pretrain.data.masking import kept_codebooks, span_mask
from codecssl.pretrain.data.plan import Bools, Ints, Pieces, Plan, cut
from codecssl.pretrain.model.fairseq2_parts import NATIVE_DATA, DataPipelineError, read_sequence


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, packed: its N frames are those of all items, one item after the other."""

    codes: Tensor
    """int64 [R, N]. R is K, or more if codebooks have several codes per frame."""
    frames: list[int]
    """Frames of each item, N in all."""
    mask: Tensor
    """bool [N], true at the frames to predict."""
    kept: Tensor
    """bool [R, N], true for the codes that the input keeps."""
    masked: Tensor
    """int64 [M], indices of the masked frames. Computed in advance to avoid a device synchronisation."""
    visible: Tensor
    """int64 [V], indices of the unmasked frames."""
    visible_frames: list[int]
    """Number of unmasked frames of each item."""
    masked_total: int
    """Masked frames of the whole global batch: the denominator of the loss, on every rank."""
    visible_total: int
    """Unmasked frames of the whole global batch."""
    labels: Tensor | None = None
    """int64 [S, N] from label folders."""
    mel: Tensor | None = None
    """uint8 [bands, N], the stored log-mel plane; only for models that read it."""

    @classmethod
    def of(
        cls, codes: Tensor, frames: list[int], mask: Tensor, kept: Tensor, masked_total: int, visible_total: int,
        labels: Tensor | None = None, mel: Tensor | None = None,
    ) -> "Batch":  # fmt: skip
        """Build a batch with this mask."""
        masked, visible = (where.nonzero().flatten() for where in (mask, ~mask))
        counts = [int(item.sum()) for item in (~mask).split(frames)]
        return cls(codes, frames, mask, kept, masked, visible, counts, masked_total, visible_total, labels, mel)

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class Loader:
    """Pure function from a step to the micro-batches of this rank. `steps` prepares them in background threads.

    fixed_masks: use the masks of step 0 in every step. Validation needs the same mask for an utterance every time.
    """

    def __init__(
        self, corpus: TokenCorpus, plan: Plan, mask: MaskConfig, objective: ObjectiveConfig, *,
        seed: int, rank: int = 0, world_size: int = 1, accumulation: int = 1, fixed_masks: bool = False,
        with_mel: bool = False,
    ) -> None:  # fmt: skip
        self.corpus, self.plan, self._mask, self._objective = corpus, plan, mask, objective
        self._seed, self._fixed, self._with_mel = seed, fixed_masks, with_mel
        self._rank, self._world_size, self._accumulation = rank, world_size, accumulation

    def step(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step for this rank, in the order in which their gradients are accumulated."""
        shares = cut(self.plan.batch(step), self._world_size * self._accumulation)
        masks = [packed_mask(self._mask, self._keys(step, share), share.frames) for share in shares]
        masked = sum(int(mask.sum()) for mask in masks)
        visible = sum(int(share.frames.sum()) for share in shares) - masked
        mine = range(self._rank, len(shares), self._world_size)
        return [self._read(step, shares[i], masks[i], masked, visible) for i in mine]

    def steps(self, first: int, last: int, *, workers: int, prefetch: int) -> Iterator[list[Batch]]:
        """Yield `step(first)` .. `step(last - 1)`, read by `workers` threads, `prefetch` steps in advance."""
        if not NATIVE_DATA:
            yield from map(self.step, range(first, last))
            return
        pipeline = read_sequence(range(first, last)).map(self.step, num_parallel_calls=workers).prefetch(prefetch)
        yield from _reraised(pipeline.and_return)

    def _keys(self, step: int, pieces: Pieces) -> Any:
        return hashed(self._seed, 0 if self._fixed else step, pieces.utterance, pieces.start)

    def _read(self, step: int, pieces: Pieces, mask: Any, masked_total: int, visible_total: int) -> Batch:
        corpus, card = self.corpus, self.corpus.card
        streams = len(corpus.label_sizes)
        kept = kept_codebooks(self._objective, self._keys(step, pieces), card.num_codebooks)
        return Batch.of(
            packed(corpus.codes, card.num_rows, pieces), pieces.frames.tolist(), torch.from_numpy(mask),
            kept_codes(kept, card.codes_per_frame, pieces.frames), masked_total, visible_total,
            packed(corpus.labels, streams, pieces) if streams else None,
            packed(corpus.mel, self._bands, pieces, np.uint8) if self._with_mel else None,
        )  # fmt: skip

    @property
    def _bands(self) -> int:
        assert self.corpus.mel_spec is not None, "TokenCorpus.require_mel checks it"
        return self.corpus.mel_spec.bands


def packed(read: Callable[[int, int, int], Any], rows: int, pieces: Pieces, dtype: Any = np.int64) -> Tensor:
    """Return a tensor [rows, N] of `dtype` with the pieces that `read` returns, one after the other."""
    ends = np.cumsum(pieces.frames).tolist()
    whole = np.empty((rows, ends[-1]), dtype=dtype)
    for utterance, start, frames, end in zip(
        pieces.utterance.tolist(), pieces.start.tolist(), pieces.frames.tolist(), ends, strict=True
    ):
        whole[:, end - frames : end] = read(utterance, start, frames)
    return torch.from_numpy(whole)


def packed_mask(config: MaskConfig, keys: Any, frames: Ints) -> Bools:
    """Return the masks of `span_mask` of all items, one after the other, bool [N]."""
    mask = span_mask(config, keys, frames)
    masked: Bools = mask[np.arange(mask.shape[1]) < frames[:, None]]
    return masked


def kept_codes(kept: Bools, codes_per_frame: Sequence[int], frames: Ints) -> Tensor:
    """Kept codebooks [B, K] of items with these frames -> kept codes bool [R, N]."""
    return torch.from_numpy(np.repeat(np.repeat(kept, codes_per_frame, axis=1), frames, axis=0).T.copy())


def _reraised(open_pipeline: Callable[[], Any]) -> Iterator[list[Batch]]:
    """Yield the items of a fairseq2 pipeline. Raise the reader's own error instead of the pipeline's wrapper."""
    try:
        yield from open_pipeline()
    except DataPipelineError as error:
        raise (error.__cause__ or error) from None
