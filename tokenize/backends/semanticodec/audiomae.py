"""AudioMAE (Huang et al. 2022, arXiv 2207.06405): a ViT-B over patches of 16 x 16 of a log-mel spectrogram.

The module names are those of the published checkpoint. Its decoder, which is used in pretraining only, is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEL_FRAMES, MEL_BANDS, PATCH = 1024, 128, 16
"""Size of the input, 10.24 s, and of a patch: 64 columns x 8 bands of patches."""
COLUMNS, BANDS = MEL_FRAMES // PATCH, MEL_BANDS // PATCH
HEAD_WIDTH = 64
FIRST_AVERAGED = 9
"""First block, counted from 0, whose output is part of the mean. A ViT-B has 12 blocks."""
EPSILON = 1e-6
"""Epsilon of the layer norms."""
MEL_MEAN, MEL_DEVIATION = -4.2677393, 4.5689974
"""Mean and standard deviation of the log-mel energies of AudioSet, as published."""
SAMPLE_RATE, FRAME, HOP = 16_000, 400, 160
"""Sample rate in Hz; length and hop of a mel frame in samples."""


def log_mel(audio: Tensor) -> Tensor:
    """Compute Kaldi's log-mel energies of a wave [n] at 16 kHz, standardized and halved: float32 [MEL_FRAMES, 128].

    Frames after the end of the wave are zero before they are standardized. Kaldi subtracts each frame's mean, so the
    mean of the wave, which the published code subtracts before, makes no difference.
    """
    from torchaudio.compliance import kaldi

    energies = torch.zeros(0, MEL_BANDS)
    if len(audio) >= FRAME:
        energies = kaldi.fbank(
            audio[None].float().cpu(),
            htk_compat=True,
            sample_frequency=SAMPLE_RATE,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=MEL_BANDS,
            dither=0.0,
            frame_shift=1000 * HOP / SAMPLE_RATE,
        )[:MEL_FRAMES]
    energies = F.pad(energies, (0, 0, 0, MEL_FRAMES - len(energies)))
    return (energies - MEL_MEAN) / (2 * MEL_DEVIATION)


class Attention(nn.Module):
    """Multi-head self-attention of [B, N, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)  # each [B, H, N, 64]
        found = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(found.transpose(1, 2).flatten(2))
        return out


class Perceptron(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and a perceptron, each after a layer norm and with a residual connection (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPSILON), nn.LayerNorm(width, eps=EPSILON)
        self.attn, self.mlp = Attention(width), Perceptron(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbedding(nn.Module):
    """Project the patches of [B, 1, MEL_FRAMES, MEL_BANDS] to [B, W, COLUMNS, BANDS]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, PATCH, PATCH)

    def forward(self, mels: Tensor) -> Tensor:
        patches: Tensor = self.proj(mels)
        return patches


class AudioMAE(nn.Module):
    """Spectrograms [B, MEL_FRAMES, MEL_BANDS] to patches [B, COLUMNS, BANDS, W].

    The output is the mean over the last blocks of their layer-normed outputs, without the class token, as SemantiCodec
    uses it.
    """

    def __init__(self, width: int, depth: int) -> None:
        """width: a multiple of HEAD_WIDTH. depth: more than FIRST_AVERAGED. Raises ValueError otherwise."""
        super().__init__()
        if width % HEAD_WIDTH or depth <= FIRST_AVERAGED:
            raise ValueError(f"{depth} blocks of width {width}")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + COLUMNS * BANDS, width))
        self.patch_embed = PatchEmbedding(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPSILON)

    def forward(self, mels: Tensor) -> Tensor:
        patches = self.patch_embed(mels[:, None]).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(mels), -1, -1), patches], dim=1) + self.pos_embed
        averaged = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number >= FIRST_AVERAGED:
                averaged.append(self.norm(x))
        return torch.stack(averaged).mean(0)[:, 1:].unflatten(1, (COLUMNS, BANDS))
