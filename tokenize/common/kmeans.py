"""K-means, in two forms: `fit_centroids` for Euclidean clusterings, and `lloyd` for codebooks with other distances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MINIBATCH = 10_000
"""Frames of a k-means minibatch, as in HuBERT."""


def fit_centroids(
    frames: NDArray[np.float32], clusters: int, *, seed: int, minibatches: bool = False
) -> NDArray[np.float32]:
    """Fit centroids [clusters, D] to frames [N, D] by squared Euclidean distance, with scikit-learn. N >= clusters.

    Without minibatches: at most 30 iterations of Lloyd's algorithm from one k-means++ start. With minibatches, for
    large N: the settings of HuBERT (Hsu et al. 2021), k-means++ with 20 starts.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if minibatches:
        fitted = MiniBatchKMeans(
            clusters, batch_size=MINIBATCH, n_init=20, max_no_improvement=100, reassignment_ratio=0.0, random_state=seed
        )
    else:
        fitted = KMeans(clusters, n_init=1, max_iter=30, random_state=seed)
    return np.asarray(fitted.fit(frames).cluster_centers_, dtype=np.float32)


def lloyd(
    frames: Tensor,
    entries: Tensor,
    iterations: int,
    nearest: Callable[[Tensor, Tensor], Tensor],
    refill: Callable[[int], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit entries [V, W] to frames [N, W] by Lloyd's algorithm (1982), from given entries and by any distance.

    Return the entries and the number of frames of each one, int64 [V].

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
