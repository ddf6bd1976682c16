"""Packed batches: the frames of all items one after the other, without padding, and grids [B, T, ...] with it.

fairseq2's `BatchLayout` holds the boundaries of a packed batch. Everything that treats frames alone (embeddings,
projections, norms, feed-forward blocks, heads, losses) works on [N, D], N frames in all.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from codecssl.pretrain.model.fairseq2_parts import BatchLayout


def packed_layout(frames: Sequence[int], device: torch.device) -> BatchLayout:
    """Return the layout of a packed batch of items with these numbers of frames."""
    return BatchLayout((sum(frames),), list(frames), packed=True, device=device)


def to_grid(x: Tensor, layout: BatchLayout) -> Tensor:
    """Packed [N, ...] -> [B, T, ...], zero in the padding. T is the length of the longest item."""
    items, width = len(layout.seq_lens), layout.max_seq_len
    if layout.min_seq_len == width:
        return x.unflatten(0, (items, width))
    grid = x.new_zeros(items * width, *x.shape[1:]).index_copy(0, _places(layout, width), x)
    return grid.unflatten(0, (items, width))


def from_grid(grid: Tensor, layout: BatchLayout) -> Tensor:
    """[B, T, ...] -> packed [N, ...]. T is at least the length of the longest item."""
    if layout.min_seq_len == grid.shape[1]:
        return grid.flatten(0, 1)
    return grid.flatten(0, 1).index_select(0, _places(layout, grid.shape[1]))


def pack(x: Tensor, layout: BatchLayout) -> Tensor:
    """Items with padding [B, ..., T] -> packed [..., N], for codes and log-mels."""
    return from_grid(x.movedim(-1, 1), layout).movedim(0, -1)


def unpack(x: Tensor, layout: BatchLayout, width: int) -> Tensor:
    """Packed [N, D] -> [B, width, D], zero in the padding."""
    grid = to_grid(x, layout)
    return F.pad(grid, (0, 0, 0, width - grid.shape[1]))


def _places(layout: BatchLayout, width: int) -> Tensor:
    """Return int64 [N], the index b width + t of each packed frame in a flattened grid."""
    positions, lengths = layout.position_indices, layout.seq_lens_pt
    starts = torch.arange(len(lengths), device=positions.device) * width
    return positions + torch.repeat_interleave(starts, lengths, output_size=len(positions))
