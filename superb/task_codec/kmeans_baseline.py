"""Baseline without training: plain k-means in place of a bottleneck's quantizer."""

from typing import Any

import torch
from torch import Tensor, nn

from codecssl.superb.task_codec.bottleneck import Bottleneck
from codecssl.superb.task_codec.rvq import RvqConfig
from codecssl.tokenize.common.kmeans import fit_centroids

MOST_FRAMES = 10_000
"""Largest number of frames to which centres are fitted."""


class Clusters(nn.Module):
    """Centres [V, D], the nearest of which represents a frame. Has the methods of `Rvq` used in inference."""

    centres: Tensor

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.config = RvqConfig(num_codebooks=1, codebook_size=size, codebook_dim=dim)
        self.register_buffer("centres", torch.zeros(size, dim))

    @torch.no_grad()
    def fit(self, frames: Tensor, generator: torch.Generator, wanted: Tensor | None = None) -> None:
        """Fit the centres by k-means. Few frames give as many centres as frames. `wanted` is ignored."""
        picks = torch.randperm(len(frames), generator=generator)[:MOST_FRAMES]
        count = min(len(self.centres), len(picks))
        taken = frames[picks.to(frames.device)].cpu().numpy()
        self.centres[:count] = torch.from_numpy(fit_centroids(taken, count, seed=generator.initial_seed() % 2**32))
        self.centres[count:] = self.centres[0]  # never chosen: the first of equal centres wins

    def encode(self, x: Tensor) -> Tensor:
        """Frames [B, T, D] -> codes int64 [B, 1, T]."""
        return torch.cdist(x, self.centres.expand(len(x), -1, -1)).argmin(dim=-1)[:, None]

    def dequantise(self, codes: Tensor) -> Tensor:
        """Codes [B, 1, T] -> frames [B, T, D]."""
        return self.centres[codes[:, 0]]


def cluster_bottleneck(dim: int, pool: int, size: int) -> Bottleneck:
    """Make a bottleneck quantized by k-means. `fit` sets all of its weights."""
    bottleneck = Bottleneck(dim, pool, RvqConfig(codebook_dim=1, codebook_size=2))
    quantizer: Any = Clusters(dim, size)
    bottleneck.rvq = quantizer
    return bottleneck
