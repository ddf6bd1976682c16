"""The first layers of WavLM (Chen et al. 2022, arXiv 2110.13900), with the module names of FocalCodec's checkpoints.

Pre-norm layers whose attention adds a relative position bias, gated by the query's frame (section III-C). There is no
normalization after the last layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class WavLMConfig:
    """Sizes, named as in FocalCodec's config.json. The defaults are WavLM large."""

    hidden_dims: Sequence[int] = (512,) * 7
    """Channels of the convolutions that read the wave."""
    kernel_sizes: Sequence[int] = (10, 3, 3, 3, 3, 2, 2)
    strides: Sequence[int] = (5, 2, 2, 2, 2, 2, 2)
    num_layers: int = 6
    dim: int = 1024
    ffn_dim: int = 4096
    num_heads: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    conv_pos: int = 128
    """Kernel size of the convolution that encodes positions."""
    conv_pos_groups: int = 16

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.strides)

    @property
    def lookahead(self) -> int:
        """Samples that the last frame needs after its hop."""
        needed = 1
        for kernel, stride in zip(reversed(self.kernel_sizes), reversed(self.strides)):
            needed = (needed - 1) * stride + kernel
        return needed - self.hop_length


class ConvolutionLayer(nn.Module):
    """A strided convolution, a layer norm over the channels and a GELU, [B, T, C]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(inputs, outputs, kernel, stride, bias=False), nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2)))


class FeatureExtractor(nn.Module):
    """Waves [B, n, 1] to [B, T, C]."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        channels = (1, *config.hidden_dims)
        self.layers = nn.ModuleList(
            ConvolutionLayer(*sizes)
            for sizes in zip(channels, config.hidden_dims, config.kernel_sizes, config.strides, strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Perceptron(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out_proj(F.gelu(self.in_proj(x)))
        return found


class GatedAttention(nn.Module):
    """Self-attention of [B, T, D] with gated relative positions (equations 5 and 6)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.gru_rel_pos_linear = nn.Linear(dim // heads, 8)
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """bias: of relative positions, [H, T, T]."""
        query, key, value = self.qkv_proj(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, W]
        frames = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        update, reset = self.gru_rel_pos_linear(frames).unflatten(3, (2, 4)).sum(4).sigmoid().split(1, dim=3)
        gate = update * (reset * self.gru_rel_pos_const - 1.0) + 2.0
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=gate * bias)
        out: Tensor = self.out_proj(found.transpose(1, 2).flatten(2))
        return out


class WavLMLayer(nn.Module):
    """Attention and a perceptron, each after a layer norm and with a residual connection."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attention = GatedAttention(config.dim, config.num_heads)
        self.feed_forward = Perceptron(config.dim, config.ffn_dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), bias)
        found: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return found


class PositionalConvolution(nn.Module):
    """The convolution over [B, T, D] whose output is added as positions."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        kernel = config.conv_pos
        self.conv = nn.Conv1d(config.dim, config.dim, kernel, padding=kernel // 2, groups=config.conv_pos_groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))


class WavLMLayers(nn.Module):
    """Positions and Transformer layers, [B, T, D]."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        self.config = config
        self.positional_embedding = PositionalConvolution(config)
        self.relative_embedding = nn.Embedding(config.num_buckets, config.num_heads)
        self.layers = nn.ModuleList(WavLMLayer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positional_embedding(x)
        bias = self.relative_embedding(self.buckets(x.shape[1], x.device)).permute(2, 0, 1)
        for layer in self.layers:
            x = layer(x, bias)
        return x

    def buckets(self, frames: int, device: torch.device) -> Tensor:
        """Return the bucket of each pair of frames, int64 [T, T] (query, key), as in T5 (Raffel et al. 2020).

        Half of the buckets are for keys after the query. Of these, half are single distances, the others logarithmic.
        """
        half = self.config.num_buckets // 2
        exact = half // 2
        place = torch.arange(frames, device=device)
        distance = place[None, :] - place[:, None]
        far = (distance.abs().clamp(min=1).float() / exact).log() / math.log(self.config.max_distance / exact)
        logarithmic = (exact + (half - exact) * far).long().clamp(max=half - 1)
        return (distance > 0) * half + torch.where(distance.abs() < exact, distance.abs(), logarithmic)


class WavLM(nn.Module):
    """Waves [B, n] to [B, T, D]."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_extractor = FeatureExtractor(config)
        self.norm = nn.LayerNorm(config.hidden_dims[-1])
        self.feature_proj = nn.Linear(config.hidden_dims[-1], config.dim)
        self.encoder = WavLMLayers(config)

    def forward(self, waves: Tensor) -> Tensor:
        found: Tensor = self.encoder(self.feature_proj(self.norm(self.feature_extractor(waves[:, :, None]))))
        return found
