"""HiFi-Codec (Yang et al. 2023, arXiv 2305.02765): residual quantization in groups of channels.

The encoder mirrors HiFi-GAN's generator (Kong et al. 2020): strided convolutions, each followed by residual blocks of
several kernel sizes whose outputs are added and normalized. The normalization covers all frames, so waves are encoded
as in `parts/segments.py`, zero-padded to a whole frame.

The latent is divided into 2 groups of channels, each with a residual quantizer of 2 layers (section 3.2). Rows of the
codes: the first layer of each group, then the second ones.

A checkpoint determines all sizes but the strides and dilations, which are the published ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.residual_vq import ResidualQuantizer
from codecssl.tokenize.backends.parts.segments import SegmentCodec, chunk_policy
from codecssl.tokenize.backends.parts.weights import (
    fill_part,
    find_weights,
    fold_weight_norm,
    read_tensors,
    state_sha256,
)
from codecssl.tokenize.codec import CodecCard, keep_codebooks
from codecssl.tokenize.common.errors import UserError

REPOSITORY = "Dongchao/AcademiCodec"
NETWORKS = {"hificodec_16khz": (16_000, "HiFi-Codec-16k-320d"), "hificodec_24khz": (24_000, "HiFi-Codec-24k-320d")}
"""Sample rate in Hz and file on the hub. A checkpoint does not hold its sample rate."""
STRIDES, DILATIONS = (2, 4, 5, 8), (1, 3, 5)
"""Strides of the encoder in order; the decoder has them reversed."""
HOP = math.prod(STRIDES)
SLOPE = 0.1
"""Slope of the leaky ReLU for negative inputs."""


class ResidualBlock(nn.Module):
    """Three pairs of convolutions, the first one of each dilated, each with a residual connection."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.convs1, self.convs2 = (
            nn.ModuleList(
                _normed(nn.Conv1d(channels, channels, kernel, dilation=d, padding=(kernel - 1) * d // 2))
                for d in dilations
            )
            for dilations in (DILATIONS, (1, 1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.convs1, self.convs2):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


class HiFiCodecEncoder(nn.Module):
    """Waves [B, 1, T * hop] to latents [B, D, T]."""

    def __init__(self, channels: int, kernels: Iterable[int], block_kernels: list[int], latent_dim: int) -> None:
        super().__init__()
        self.blocks_per_stage = len(block_kernels)
        self.conv_pre = _normed(nn.Conv1d(1, channels, 7, padding=3))
        self.ups, self.resblocks, self.normalize = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stride, kernel in zip(STRIDES, kernels):
            strided = nn.Conv1d(channels, 2 * channels, kernel, stride, padding=(kernel - stride) // 2)
            channels *= 2
            self.ups.append(_normed(strided))
            self.resblocks.extend(ResidualBlock(channels, size) for size in block_kernels)
            self.normalize.extend(nn.GroupNorm(channels // 16, channels, eps=1e-6) for _ in block_kernels)
        self.conv_post = nn.Conv1d(channels, latent_dim, 3, padding=1)

    def forward(self, waves: Tensor) -> Tensor:
        x: Tensor = self.conv_pre(waves)
        for stage, strided in enumerate(self.ups):
            x, summed = strided(F.leaky_relu(x, SLOPE)), None
            for i in range(stage * self.blocks_per_stage, (stage + 1) * self.blocks_per_stage):
                found = self.resblocks[i](x)
                summed = self.normalize[i](found if summed is None else summed + found)
            assert summed is not None
            x = summed / self.blocks_per_stage
        last: Tensor = self.conv_post(F.leaky_relu(x))
        return last


class Generator(nn.Module):
    """Latents [B, D, T] to waves [B, 1, T * hop]: HiFi-GAN's generator."""

    def __init__(self, latent_dim: int, channels: int, kernels: Iterable[int], block_kernels: list[int]) -> None:
        super().__init__()
        self.blocks_per_stage = len(block_kernels)
        self.conv_pre = _normed(nn.Conv1d(latent_dim, channels, 7, padding=3))
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for stride, kernel in zip(reversed(STRIDES), kernels):
            strided = nn.ConvTranspose1d(channels, channels // 2, kernel, stride, padding=(kernel - stride) // 2)
            channels //= 2
            self.ups.append(_normed(strided))
            self.resblocks.extend(ResidualBlock(channels, size) for size in block_kernels)
        self.conv_post = _normed(nn.Conv1d(channels, 1, 7, padding=3))

    def forward(self, latents: Tensor) -> Tensor:
        x: Tensor = self.conv_pre(latents)
        for stage, strided in enumerate(self.ups):
            x = strided(F.leaky_relu(x, SLOPE))
            blocks = self.resblocks[stage * self.blocks_per_stage : (stage + 1) * self.blocks_per_stage]
            x = torch.stack([block(x) for block in blocks]).sum(0) / self.blocks_per_stage
        return torch.tanh(self.conv_post(F.leaky_relu(x, SLOPE)))


class HificodecNetwork(nn.Module):
    """Encoder and generator with the sizes of a checkpoint. Raises KeyError if a tensor is missing."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        latent_dim = len(state["encoder.conv_post.weight"])
        shapes = {}
        for part in ("encoder", "generator"):
            kernels = [state[f"{part}.ups.{i}.weight_v"].shape[2] for i in range(len(STRIDES))]
            blocks: list[int] = []
            first = f"{part}.resblocks.{{}}.convs1.0.weight_v"
            while first.format(len(blocks)) in state:
                blocks.append(state[first.format(len(blocks))].shape[2])
            shapes[part] = {"kernels": kernels, "block_kernels": blocks[: len(blocks) // len(STRIDES)]}
        self.encoder = HiFiCodecEncoder(len(state["encoder.conv_pre.bias"]), latent_dim=latent_dim, **shapes["encoder"])
        self.generator = Generator(latent_dim, len(state["generator.conv_pre.bias"]), **shapes["generator"])


class HifiCodec(SegmentCodec):
    """HiFi-Codec as a `Codec`."""

    network: HificodecNetwork
    quantizer: ResidualQuantizer

    def encode_latents(self, audio: Tensor) -> Tensor:
        found: Tensor = self.network.encoder(F.pad(audio, (0, -len(audio) % HOP))[None, None])
        return found[0]

    def decode_latents(self, latents: Tensor) -> Tensor:
        wave: Tensor = self.network.generator(latents[None])
        return wave[0, 0]

    def entries(self) -> list[Tensor]:
        return [table.cpu().clone() for table in self.quantizer.tables]


def _normed(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():  # weight_norm is deprecated, but the checkpoints store its tensors
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> HifiCodec:
    """Load `hificodec_16khz` or `hificodec_24khz` from a checkpoint or the hub's cache (`Codec` loader)."""
    sample_rate, file = NETWORKS[name]
    path = find_weights(name, weights, REPOSITORY, file, "HiFi-Codec-*")
    state = read_tensors(path, name)
    try:
        network = HificodecNetwork(state)
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not the weights of {name} ({type(error).__name__}: {error})") from error
    fill_part(network.encoder, state, "encoder.", path, name)
    fill_part(network.generator, state, "generator.", path, name)
    tables, groups = grouped_codebooks(state, len(state["encoder.conv_post.weight"]), path, name)
    kept = keep_codebooks(name, num_codebooks, len(tables), len(tables))
    card = CodecCard(
        name=name,
        weights=weights or name,
        weights_sha256=state_sha256(network, tables),
        sample_rate=sample_rate,
        hop_length=HOP,
        codebook_sizes=(tables.shape[1],) * kept,
        codes_per_frame=(1,) * kept,
        latent_dim=groups * tables.shape[2],
        policies=policies(chunk_policy(), device, loudness="none"),
        versions=versions("torch", "soxr"),
    )
    fold_weight_norm(network)
    return HifiCodec(network, ResidualQuantizer(tables[:kept].to(device), groups), card, device)


def grouped_codebooks(state: dict[str, Tensor], latent_dim: int, path: Path, name: str) -> tuple[Tensor, int]:
    """Return a checkpoint's codebooks [2 * groups, V, D / groups], the first layers first, and the number of groups."""
    layers = []
    for modules in ("quantizer_modules", "quantizer_modules2"):
        keys = sorted(key for key in state if key.startswith(f"quantizer.{modules}."))
        layers.append([state[key].float() for key in keys])
    groups = len(layers[0])
    shapes = {table.shape for layer in layers for table in layer}
    if not groups or len(layers[1]) != groups or len(shapes) > 1 or groups * layers[0][0].shape[1] != latent_dim:
        raise UserError(f"{path}: not the weights of {name} (its codebooks are not 2 layers of groups of channels)")
    return torch.stack([table for layer in layers for table in layer]), groups
