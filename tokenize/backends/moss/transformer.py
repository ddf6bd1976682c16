"""The causal Transformers of MOSS-Audio-Tokenizer, which run on a sequence piece by piece.

Pre-norm layers without biases, whose updates are scaled per channel (Touvron et al. 2021, LayerScale). Positions are
rotations of neighbouring pairs of channels (Su et al. 2021, RoPE). A position attends to itself and the window - 1
positions before it. Each layer keeps the keys and values of its window.

Module names are those of the published checkpoint. Sequences are [T, D].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.parts.functional import causal_window


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes, named as in config.json."""

    input_dimension: int
    output_dimension: int
    d_model: int
    num_heads: int
    num_layers: int
    dim_feedforward: int
    max_period: float = 10_000.0
    """Longest wavelength of the rotations, over 2 pi positions."""


class Past:
    """State that one encoder or decoder carries from piece to piece."""

    def __init__(self) -> None:
        self.positions: dict[nn.Module, int] = {}
        """Position of the next piece in each Transformer's sequence."""
        self.kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        """Keys and values [H, K, W] of each attention layer's window."""


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.in_projs = nn.ModuleList([nn.Linear(channels, 3 * channels, bias=False)])
        self.out_projs = nn.ModuleList([nn.Linear(channels, channels, bias=False)])

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor, past: Past) -> Tensor:
        """rotation: complex [T, W / 2]. mask [T, keys]: True where a position attends."""
        query, key, value = self.in_projs[0](x).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)  # [H, T, W]
        query, key = rotated(query, rotation), rotated(key, rotation)
        if self in past.kept:
            key, value = (torch.cat(pair, dim=1) for pair in zip(past.kept[self], (key, value)))
        first = max(0, key.shape[1] - self.window + 1)
        past.kept[self] = key[:, first:].clone(), value[:, first:].clone()
        found = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask)[0]
        out: Tensor = self.out_projs[0](found.transpose(0, 1).flatten(1))
        return out


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the channels of [H, T, W] by complex [T, W / 2]."""
    pairs = torch.view_as_complex(x.unflatten(2, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(2)


class TransformerLayer(nn.Module):
    """Attention and a perceptron, each after a layer norm, scaled, with a residual connection."""

    def __init__(self, config: TransformerConfig, window: int) -> None:
        super().__init__()
        channels = config.d_model
        self.self_attn = Attention(channels, config.num_heads, window)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, config.dim_feedforward, bias=False)
        self.linear2 = nn.Linear(config.dim_feedforward, channels, bias=False)
        self.layer_scale_1, self.layer_scale_2 = LayerScale(channels), LayerScale(channels)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor, past: Past) -> Tensor:
        x = x + self.layer_scale_1(self.self_attn(self.norm1(x), rotation, mask, past))
        found: Tensor = x + self.layer_scale_2(self.linear2(F.gelu(self.linear1(self.norm2(x)))))
        return found


class CausalTransformer(nn.Module):
    """Layers between two projections, which a checkpoint has only where the widths differ."""

    def __init__(self, config: TransformerConfig, window: int) -> None:
        """window: positions that each position sees, itself included."""
        super().__init__()
        self.config, self.window = config, window
        inputs, width, outputs = config.input_dimension, config.d_model, config.output_dimension
        self.input_proj = nn.Identity() if inputs == width else nn.Linear(inputs, width, bias=False)
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(TransformerLayer(config, window) for _ in range(config.num_layers))
        self.output_proj = nn.Identity() if outputs == width else nn.Linear(width, outputs, bias=False)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Compute the next [T, D]."""
        start, length = past.positions.get(self, 0), len(x)
        past.positions[self] = start + length
        rotation = self.rotation(start, length, x.device)
        mask = causal_window(length, min(start, self.window - 1) + length, self.window, x.device)
        x = self.input_proj(x)
        for layer in self.transformer.layers:  # type: ignore[union-attr]
            x = layer(x, rotation, mask, past)
        found: Tensor = self.output_proj(x)
        return found

    def rotation(self, start: int, length: int, device: torch.device) -> Tensor:
        """Return the rotations of `length` positions from `start`, complex [length, W / 2]."""
        pairs = self.config.d_model // self.config.num_heads // 2
        speeds = torch.exp(torch.arange(pairs, device=device) * (-math.log(self.config.max_period) / pairs))
        angles = torch.arange(start, start + length, device=device)[:, None] * speeds
        return torch.polar(torch.ones_like(angles), angles)


class Patches(nn.Module):
    """Join the channels of `size` neighbouring steps, or split them: feature c * size + i is channel c of step i."""

    def __init__(self, size: int, joins: bool) -> None:
        super().__init__()
        self.size, self.joins = size, joins

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """Convert [T * size, D] to [T, D * size] or back."""
        if self.joins:
            return x.unflatten(0, (-1, self.size)).transpose(1, 2).flatten(1)
        return x.unflatten(1, (-1, self.size)).transpose(1, 2).flatten(0, 1)
