"""States of single utterances: of the unmodified model, after a bottleneck, and of the base codec's tables."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from codecssl.pretrain.model.model import CodecModel
from codecssl.superb.task_codec.bottleneck import Bottleneck, later_states
from codecssl.tokenize.shards import Shards

States = list[Tensor]
"""States of one utterance, each [T, D]."""
Source = Callable[[int], States]
"""Maps an utterance's number to its states."""
Batched = Callable[[Sequence[int]], tuple[States, list[int]]]
"""Maps utterances' numbers to their states [B, T, D] and frames. Values beyond the frames are arbitrary."""
CACHE_BYTES = 2 << 30
"""Largest size of the states kept in memory."""


class CachedStates:
    """A source that computes each utterance once and caches it within a memory limit."""

    def __init__(self, source: Source, most_bytes: int = CACHE_BYTES) -> None:
        self.source, self.left = source, most_bytes
        self.known: dict[int, States] = {}

    def __call__(self, index: int) -> States:
        if index in self.known:
            return self.known[index]
        states = self.source(index)
        size = sum(state.numel() * state.element_size() for state in states)
        if size <= self.left:
            self.left -= size
            self.known[index] = states
        return states


def batch(source: Source, indices: Sequence[int]) -> tuple[States, list[int]]:
    """States [B, T, D] of several utterances, zeros beyond each one's frames, and their frames."""
    rows = [source(index) for index in indices]
    padded = [nn.utils.rnn.pad_sequence(list(states), batch_first=True) for states in zip(*rows, strict=True)]
    return padded, [len(states[0]) for states in rows]


def base_codes(shards: Shards, index: int, device: str = "cpu") -> Tensor:
    """Codes of the base codec, int64 [R, T]."""
    return torch.from_numpy(shards.codes(index).astype(np.int64)).to(device)


def batched(source: Source) -> Batched:
    """Batched form of a source."""
    return lambda indices: batch(source, indices)


def after(source: Source, layer: int) -> Source:
    """Return the states L, L + 1, ... of a source of all states."""
    return lambda index: source(index)[layer:]


def whole_model(model: CodecModel, shards: Shards, device: str = "cpu") -> Source:
    """Return all states of the unmodified model."""

    @torch.no_grad()
    def states(index: int) -> States:
        codes = base_codes(shards, index, device)
        return [state[0] for state in model.extract(codes[None], [codes.shape[1]])]

    return states


def first_codebooks(model: CodecModel, shards: Shards, count: int, device: str = "cpu") -> Source:
    """Return all states given the first `count` codebooks of the base codec. Others are dropped as in pretraining."""

    @torch.no_grad()
    def states(index: int) -> States:
        codes = base_codes(shards, index, device)
        kept = (torch.arange(len(codes), device=device) < count)[:, None].expand_as(codes)
        frames = [codes.shape[1]]
        first, _ = model.front(codes, frames, None, kept, dropout=False)
        return [state[0] for state in later_states(model, first[None], frames, 0)]

    return states


def tables(embeddings: Sequence[Tensor], shards: Shards, count: int, device: str = "cpu") -> Source:
    """Return one state: the sum of the base codec's own embeddings of its first `count` codebooks."""
    kept = [table.to(device) for table in embeddings[:count]]

    def states(index: int) -> States:
        codes = base_codes(shards, index, device)
        return [torch.stack([table[row] for table, row in zip(kept, codes)]).sum(dim=0)]

    return states


def quantised(
    model: CodecModel, layer: int, bottleneck: Bottleneck, source: Source, count: int | None = None
) -> Batched:
    """States L, L + 1, ... after a bottleneck that keeps its first `count` codebooks. `source` gives state L first."""

    @torch.no_grad()
    def states(rows: Sequence[int]) -> tuple[States, list[int]]:
        whole, frames = batch(lambda index: source(index)[:1], rows)
        pooled, _ = bottleneck.pooled(whole[0], frames)
        state = bottleneck.restore(bottleneck.rvq.encode(pooled)[:, :count])
        lengths = [-(-n // bottleneck.pool) * bottleneck.pool for n in frames]
        return later_states(model, state, lengths, layer), lengths

    return states
