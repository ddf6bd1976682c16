"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): channels are rounded to a few levels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-3
"""Margin by which the bounded values exceed the outermost levels, as in the paper's appendix."""


def bound_twice(values: Tensor, levels: int = 4) -> Tensor:
    """Squash values to the numbers of an even count of levels, -levels / 2 to levels / 2 - 1, and do so again.

    So does `vector-quantize-pytorch`'s ResidualFSQ with one layer, with which X-codec2 was trained.
    """
    half = (levels - 1) * (1 + EPSILON) / 2
    for _ in range(2):
        values = (values + math.atanh(0.5 / half)).tanh() * half - 0.5
    return values


class FiniteScalarQuantizer:
    """A single codebook: the digits of a code in base `levels` are the levels of the channels, the first least.

    The latent has the channels' levels: whole numbers around 0, divided by levels // 2.
    """

    def __init__(
        self,
        channels: int,
        levels: int,
        device: str | torch.device = "cpu",
        bound: Callable[[Tensor], Tensor] = bound_twice,
    ) -> None:
        """bound: maps values to the range of the levels' numbers, -(levels // 2) and up, before they are rounded."""
        self.channels, self.levels, self.device, self.bound = channels, levels, torch.device(device), bound
        self.basis = levels ** torch.arange(channels, device=self.device)

    @property
    def size(self) -> int:
        """Number of codes."""
        return int(self.levels**self.channels)

    def quantize(self, latents: Tensor) -> Tensor:
        """Quantize latents [channels, T] to codes [1, T]."""
        digits = self.bound(latents).round() + self.levels // 2
        return (digits.long() * self.basis[:, None]).sum(0, keepdim=True)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Convert codes [1, T] to levels [channels, T], float32."""
        digits = codes.to(self.device) // self.basis[:, None] % self.levels
        return digits / (self.levels // 2) - 1.0

    def embeddings(self) -> list[Tensor]:
        """Return the table [size, channels] of all codes' levels."""
        return [self.dequantize(torch.arange(self.size, device=self.device)[None]).t().cpu()]
