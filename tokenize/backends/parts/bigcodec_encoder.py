"""BigCodec's convolutional encoder (Xin et al. 2024, arXiv 2409.05377), as in X-codec2 and NeuCodec.

Activations are periodic and computed at twice the rate, between two low-pass filters, against aliasing (Lee et al.
2023, BigVGAN, section 3.2). Modules have the names under which checkpoints store their weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TAPS = 12
"""Length of the low-pass filters at the doubled rate."""


def low_pass() -> Tensor:
    """Kaiser-windowed sinc filter [1, 1, TAPS] with cutoff 1/4 of the doubled rate and a transition of 0.6 of it."""
    width = 4 * 0.3
    attenuation = 2.285 * (TAPS // 2 - 1) * math.pi * width + 7.95
    beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)  # Kaiser's formula for 21 to 50 dB
    times = torch.arange(-(TAPS // 2), TAPS // 2) + 0.5
    taps = torch.kaiser_window(TAPS, beta=beta, periodic=False) * torch.sinc(times / 2) / 2
    return (taps / taps.sum()).view(1, 1, TAPS)


class Filter(nn.Module):
    """Holder of a low-pass filter."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", low_pass())


class SnakeBeta(nn.Module):
    """x + sin(exp(alpha) x)^2 / exp(bias), both per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.bias = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + (x * self.alpha.exp()[:, None]).sin().square() / (self.bias.exp() + 1e-9)[:, None]


class Activation(nn.Module):
    """A SnakeBeta at twice the rate, over [B, C, T]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act, self.upsample, self.downsample = SnakeBeta(channels), Filter(), nn.Module()
        self.downsample.lowpass = Filter()

    def forward(self, x: Tensor) -> Tensor:
        channels, margin = x.shape[1], TAPS // 2 - 1
        padded = F.pad(x, (margin, margin), mode="replicate")
        kernel = self.upsample.filter.expand(channels, -1, -1)
        doubled = 2 * F.conv_transpose1d(padded, kernel, stride=2, groups=channels)
        cut = 2 * margin + (TAPS - 2) // 2
        active = F.pad(self.act(doubled[..., cut:-cut]), (margin, margin + 1), mode="replicate")
        kernel = self.downsample.lowpass.filter.expand(channels, -1, -1)  # type: ignore[union-attr, operator]
        return F.conv1d(active, kernel, stride=2, groups=channels)


class BigCodecUnit(nn.Module):
    """x + conv(activation(dilated conv(activation(x))))."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            Activation(channels),
            normed(nn.Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation)),
            Activation(channels),
            normed(nn.Conv1d(channels, channels, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.block(x)
        return found


class EncoderBlock(nn.Module):
    """Three residual units and a strided convolution that doubles the channels."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        padding = stride // 2 + stride % 2
        self.block = nn.Sequential(
            *(BigCodecUnit(channels, dilation) for dilation in (1, 3, 9)),
            Activation(channels),
            normed(nn.Conv1d(channels, 2 * channels, 2 * stride, stride, padding=padding)),
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.block(x)
        return found


class BigCodecEncoder(nn.Module):
    """Waves [B, 1, T * hop] to latents [B, D, T]."""

    def __init__(self, channels: int, strides: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = [normed(nn.Conv1d(1, channels, 7, padding=3))]
        for stride in strides:
            blocks.append(EncoderBlock(channels, stride))
            channels *= 2
        self.conv_blocks = nn.Sequential(*blocks)
        self.conv_final_block = nn.Sequential(
            Activation(channels), normed(nn.Conv1d(channels, latent_dim, 3, padding=1))
        )

    def forward(self, waves: Tensor) -> Tensor:
        found: Tensor = self.conv_final_block(self.conv_blocks(waves))
        return found


def normed(layer: nn.Module) -> nn.Module:
    """Add weight norm as the checkpoints have it."""
    with warnings.catch_warnings():  # torch deprecates it
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)
