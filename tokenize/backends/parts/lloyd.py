"""K-means by Lloyd's algorithm (Lloyd 1982), used to initialize codebooks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def lloyd(
    frames: Tensor,
    entries: Tensor,
    iterations: int,
    nearest: Callable[[Tensor, Tensor], Tensor],
    refill: Callable[[int], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit entries [V, W] to frames [N, W]. Return the entries and the number of frames of each one, int64 [V].

    nearest: assigns frames to entries, [N, W] and [V, W] to int64 [N]. refill: returns n new entries [n, W] to replace
    those without assigned frames; without it they stay unchanged.
    """
    counts = torch.zeros(len(entries), dtype=torch.int64, device=entries.device)
    for _ in range(iterations):
        assigned = nearest(frames, entries)
        counts = torch.bincount(assigned, minlength=len(entries))
        sums = torch.zeros_like(entries).index_add_(0, assigned, frames)
        entries = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], entries)
        if refill is not None and len(empty := torch.nonzero(counts == 0)[:, 0]):
            entries[empty] = refill(len(empty))
    return entries, counts
