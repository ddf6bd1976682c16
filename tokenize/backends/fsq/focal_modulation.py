"""Focal modulation (Yang et al. 2022, arXiv 2203.11926) over time, as in FocalCodec (arXiv 2502.04465, section 3).

A frame is multiplied by a modulator: a gated sum of its context at several scales, the last one the whole sequence. The
module names are those of FocalCodec's checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.fsq.wavlm import Perceptron


@dataclass(frozen=True, kw_only=True)
class FocalConfig:
    """Sizes, named as in FocalCodec's config.json. `factors` are its downscale_factors or upscale_factors."""

    input_dim: int
    output_dim: int
    hidden_dims: Sequence[int] = (1024, 1024, 1024)
    factors: Sequence[int] = (1, 1, 1)
    focal_window: int = 14
    """Kernel size of the first context."""
    focal_level: int = 2
    """Number of contexts below the whole sequence."""
    focal_factor: int = 4
    """Difference in width between a kernel and the one before."""
    use_post_norm: bool = False
    use_layerscale: bool = False
    normalize_modulator: bool = False


class FocalModulation(nn.Module):
    """query * modulator over [B, T, D]."""

    def __init__(self, dim: int, config: FocalConfig) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(dim, 2 * dim + config.focal_level + 1)
        kernels = [config.focal_window + config.focal_factor * level for level in range(config.focal_level)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv1d(dim, dim, kernel, padding="same", groups=dim), nn.GELU()) for kernel in kernels
        )
        self.context_proj, self.out_proj = nn.Conv1d(dim, dim, 1), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim) if config.use_post_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        levels = self.config.focal_level
        query, context, gates = self.in_proj(x).transpose(1, 2).split([x.shape[2], x.shape[2], levels + 1], dim=1)
        modulator = torch.zeros_like(context)
        for level, layer in enumerate(self.layers):
            context = layer(context)
            modulator = modulator + context * gates[:, level : level + 1]
        modulator = modulator + F.gelu(context.mean(2, keepdim=True)) * gates[:, levels:]
        if self.config.normalize_modulator:
            modulator = modulator / (levels + 1)
        found: Tensor = self.out_proj(self.norm((query * self.context_proj(modulator)).transpose(1, 2)))
        return found


class FocalBlock(nn.Module):
    """Focal modulation and a perceptron, with norms and residual connections, [B, T, D]."""

    def __init__(self, dim: int, config: FocalConfig) -> None:
        super().__init__()
        self.post_norm = config.use_post_norm
        self.modulation_norm, self.modulation = nn.LayerNorm(dim), FocalModulation(dim, config)
        self.feed_forward_norm, self.feed_forward = nn.LayerNorm(dim), Perceptron(dim, 4 * dim)
        self.modulation_gamma = self.feed_forward_gamma = None
        if config.use_layerscale:
            self.modulation_gamma, self.feed_forward_gamma = (nn.Parameter(torch.ones(dim)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm, gamma in (
            (self.modulation, self.modulation_norm, self.modulation_gamma),
            (self.feed_forward, self.feed_forward_norm, self.feed_forward_gamma),
        ):
            found = norm(layer(x)) if self.post_norm else layer(norm(x))
            x = x + (found if gamma is None else found * gamma)
        return x


class Snake(nn.Module):
    """x + sin(a x)^2 / a over [B, T, D], one a for each channel (Liu et al. 2020)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha.t()
        return x + (alpha + 1e-9).reciprocal() * (alpha * x).sin() ** 2


class Downscale(nn.Module):
    """Join `factor` frames into one: [B, factor * T, C] to [B, T, D]."""

    def __init__(self, inputs: int, outputs: int, factor: int) -> None:
        super().__init__()
        self.downscale, self.activation = nn.Conv1d(inputs, outputs, factor, factor), Snake(outputs)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.activation(self.downscale(x.transpose(1, 2)).transpose(1, 2))
        return found


class Upscale(nn.Module):
    """Split a frame into `factor`: [B, T, C] to [B, factor * T, D]."""

    def __init__(self, inputs: int, outputs: int, factor: int) -> None:
        super().__init__()
        self.activation, self.upscale = Snake(inputs), nn.ConvTranspose1d(inputs, outputs, factor, factor)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.upscale(self.activation(x).transpose(1, 2)).transpose(1, 2)
        return found


class FocalDownscale(nn.Module):
    """A layer of the compressor."""

    def __init__(self, inputs: int, outputs: int, factor: int, config: FocalConfig) -> None:
        super().__init__()
        self.downscale, self.focal_block = Downscale(inputs, outputs, factor), FocalBlock(outputs, config)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.focal_block(self.downscale(x))
        return found


class FocalUpscale(nn.Module):
    """A layer of the decompressor."""

    def __init__(self, inputs: int, outputs: int, factor: int, config: FocalConfig) -> None:
        super().__init__()
        self.focal_block, self.upscale = FocalBlock(inputs, config), Upscale(inputs, outputs, factor)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.upscale(self.focal_block(x))
        return found


class Compressor(nn.Module):
    """Features [B, T * factors, input_dim] to latents [B, T, output_dim]."""

    def __init__(self, config: FocalConfig) -> None:
        super().__init__()
        widths = (config.input_dim, *config.hidden_dims)
        sizes = zip(widths, config.hidden_dims, config.factors, strict=False)
        self.layers = nn.Sequential(*(FocalDownscale(*size, config) for size in sizes))
        self.out_proj = nn.Linear(widths[-1], config.output_dim)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out_proj(self.layers(x))
        return found


class Decompressor(nn.Module):
    """Quantized latents [B, T, input_dim] to features [B, T * factors, output_dim]."""

    def __init__(self, config: FocalConfig) -> None:
        super().__init__()
        widths = (*config.hidden_dims, config.output_dim)
        self.in_proj = nn.Linear(config.input_dim, widths[0])
        sizes = zip(widths, widths[1:], config.factors, strict=False)
        self.layers = nn.Sequential(*(FocalUpscale(*size, config) for size in sizes))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(self.in_proj(x))
        return found
