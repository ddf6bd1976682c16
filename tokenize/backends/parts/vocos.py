"""Vocos (Siuzdak 2023, arXiv 2306.00814): ConvNeXt blocks at the frame rate and an inverse Fourier transform.

Also the parts that WavTokenizer puts before the blocks (Ji et al. 2024, arXiv 2408.16532, section 3.3): residual
convolutions and an attention over all frames. Modules have the names under which checkpoints store their weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalization over all frames, in groups of channels."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ConvolutionBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))) over [B, C, T]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels), group_norm(channels)
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


class AttentionBlock(nn.Module):
    """x + attention of one head over all frames of norm(x), [B, C, T]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv1d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        query, key, value = (layer(hidden).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (query @ key.transpose(1, 2) * x.shape[1] ** -0.5).softmax(dim=-1)
        return x + self.proj_out((weights @ value).transpose(1, 2))


class AdaptiveNorm(nn.Module):
    """Layer normalization of [B, T, C] with one of several learned scales and shifts, here always the first one."""

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Embedding(count, channels), nn.Embedding(count, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.scale.weight[0], self.shift.weight[0], eps=1e-6)


class ConvNextBlock(nn.Module):
    """A depthwise convolution and a pointwise perceptron, with a residual connection, [B, C, T]."""

    def __init__(self, channels: int, hidden: int, norms: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = AdaptiveNorm(norms, channels)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.dwconv(x).transpose(1, 2))
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(hidden)))).transpose(1, 2)


class VocosBackbone(nn.Module):
    """WavTokenizer's decoder up to the spectrum: latents [B, D, T] to [B, T, C]."""

    def __init__(self, inputs: int, channels: int, hidden: int, blocks: int, norms: int) -> None:
        super().__init__()
        self.embed = nn.Conv1d(inputs, channels, 7, padding=3)
        self.pos_net = nn.Sequential(
            ConvolutionBlock(channels),
            ConvolutionBlock(channels),
            AttentionBlock(channels),
            ConvolutionBlock(channels),
            ConvolutionBlock(channels),
            group_norm(channels),
        )
        self.norm = AdaptiveNorm(norms, channels)
        self.convnext = nn.ModuleList(ConvNextBlock(channels, hidden, norms) for _ in range(blocks))
        self.final_layer_norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.pos_net(self.embed(latents))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        for block in self.convnext:
            x = block(x)
        found: Tensor = self.final_layer_norm(x.transpose(1, 2))
        return found


class FourierHead(nn.Module):
    """Magnitudes and phases of a short-time spectrum, and its inverse: [B, T, C] to waves [B, T * hop]."""

    def __init__(self, channels: int, n_fft: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.out = nn.Linear(channels, n_fft + 2)

    def forward(self, x: Tensor) -> Tensor:
        magnitude, phase = self.out(x).transpose(1, 2).chunk(2, dim=1)
        return inverse_stft(torch.polar(magnitude.exp().clamp(max=100), phase), self.n_fft, self.hop_length)


def inverse_stft(spectrum: Tensor, n_fft: int, hop_length: int) -> Tensor:
    """Invert a short-time spectrum [B, n_fft / 2 + 1, T] with a Hann window to waves [B, T * hop].

    Frame t is centred on the samples t * hop to (t + 1) * hop, which `torch.istft` does not offer.
    """
    window = torch.hann_window(n_fft, dtype=spectrum.real.dtype, device=spectrum.device)
    frames = torch.fft.irfft(spectrum, n_fft, dim=1) * window[:, None]
    count = spectrum.shape[2]
    weights = window.square()[None, :, None].expand(1, n_fft, count)
    size = {"output_size": (1, (count - 1) * hop_length + n_fft)}
    shape = {"kernel_size": (1, n_fft), "stride": (1, hop_length)}
    summed, weight = (F.fold(x, **size, **shape)[:, 0, 0] for x in (frames, weights))
    margin = (n_fft - hop_length) // 2
    end = margin + count * hop_length
    return summed[:, margin:end] / weight[:, margin:end]
