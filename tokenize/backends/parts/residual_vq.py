"""Residual vector quantizers (Zeghidour et al. 2021, section III-C), also in groups (Yang et al. 2023, HiFi-Codec)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class ResidualQuantizer:
    """Codebooks that each take the nearest entry to the residual that those before them leave.

    With groups the latent's channels are divided equally. Codebook r quantizes group r % groups, so the first `groups`
    codebooks are the first layer of each group, and the latent is the concatenation of the groups.
    """

    def __init__(self, tables: Tensor, groups: int = 1) -> None:
        """tables: codebooks [R, V, D / groups]."""
        self.tables, self.groups = tables, groups
        self._directions = tables.transpose(1, 2).contiguous()
        self._squared_norms = tables.pow(2).sum(2)

    def quantize(self, latents: Tensor) -> Tensor:
        """Quantize latents [D, T] to codes [R, T]."""
        residuals = [part.t().contiguous() for part in latents.chunk(self.groups)]
        codes = []
        for row, (table, directions, squared) in enumerate(zip(self.tables, self._directions, self._squared_norms)):
            group = row % self.groups
            # |r - e|^2 = |r|^2 - 2 r e + |e|^2, and |r|^2 is the same for all entries
            index = torch.addmm(squared, residuals[group], directions, alpha=-2).argmin(dim=1)
            residuals[group] = residuals[group] - F.embedding(index, table)
            codes.append(index)
        return torch.stack(codes)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Sum the entries of codes [R, T] to latents [D, T]. A group without a codebook is zero."""
        parts = self.tables.new_zeros(self.groups, codes.shape[1], self.tables.shape[2])
        for row, (indices, table) in enumerate(zip(codes, self.tables)):
            parts[row % self.groups] += F.embedding(indices, table)
        return parts.transpose(1, 2).flatten(0, 1)

    def embeddings(self) -> list[Tensor]:
        """Return R tables [V, D] whose entries sum to the latent: each is zero outside its group."""
        width = self.tables.shape[2]
        padded = []
        for row, table in enumerate(self.tables):
            before = row % self.groups
            padded.append(F.pad(table, (before * width, (self.groups - 1 - before) * width)).cpu())
        return padded
