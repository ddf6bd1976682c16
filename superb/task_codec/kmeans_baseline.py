"""Plain k-means in the place of a bottleneck's quantizer: what the same layer gives without training."""

from typing import Any

import torch
from torch import Tensor, nn

from codecssl.superb.task_codec.bottleneck import Bottleneck
from codecssl.superb.task_codec.rvq import RvqConfig

MOST_FRAMES = 10_000
"""That centres are fitted to."""


class Clusters(nn.Module):
    """Centres [V, D]: the nearest one stands for a frame. Has the methods of `Rvq` that inference needs."""

    centres: Tensor

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.config = RvqConfig(num_codebooks=1, codebook_size=size, codebook_dim=dim)
        self.register_buffer("centres", torch.zeros(size, dim))

    @torch.no_grad()
    def fit(self, frames: Tensor, generator: torch.Generator, wanted: Tensor | None = None) -> None:
        """Lloyd's algorithm from k-means++, scikit-learn's. Of few frames there are as many centres as frames;
        `wanted` is of no use.
        """
        from sklearn.cluster import KMeans

        picks = torch.randperm(len(frames), generator=generator)[:MOST_FRAMES]
        count = min(len(self.centres), len(picks))
        kmeans = KMeans(count, n_init=1, max_iter=30, random_state=generator.initial_seed() % 2**32)
        kmeans.fit(frames[picks.to(frames.device)].cpu().numpy())
        self.centres[:count] = torch.from_numpy(kmeans.cluster_centers_)
        self.centres[count:] = self.centres[0]  # never chosen: it stands first

    def encode(self, x: Tensor) -> Tensor:
        """[B, T, D] -> codes int64 [B, 1, T]."""
        return torch.cdist(x, self.centres.expand(len(x), -1, -1)).argmin(dim=-1)[:, None]

    def dequantise(self, codes: Tensor) -> Tensor:
        """Codes [B, 1, T] -> [B, T, D]."""
        return self.centres[codes[:, 0]]


def cluster_bottleneck(dim: int, pool: int, size: int) -> Bottleneck:
    """A bottleneck that k-means quantises; `fit` makes all of it."""
    bottleneck = Bottleneck(dim, pool, RvqConfig(codebook_dim=1, codebook_size=2))
    quantizer: Any = Clusters(dim, size)
    bottleneck.rvq = quantizer
    return bottleneck
