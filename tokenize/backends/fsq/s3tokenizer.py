"""S3Tokenizer v2 of CosyVoice 2 (Du et al. 2024, arXiv 2412.10117, section 2.2): 25 codes of 6,561 per second.

An ASR encoder up to its sixth layer, whose output is rounded to 8 channels of 3 levels. Its spectrogram is normalized
over the wave and its attention sees all of it: waves are encoded as in `parts/segments.py`, zero-padded to a whole
frame. There is no decoder. A code's latent is the 8 levels.

Weights are the state dict of the `s3tokenizer` package, which converts the published ONNX file.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.fsq import FiniteScalarQuantizer
from codecssl.tokenize.backends.parts.segments import SegmentCodec, chunk_policy
from codecssl.tokenize.backends.parts.weights import fill_part, find_weights, missing, read_tensors, state_sha256
from codecssl.tokenize.codec import CodecCard, keep_codebooks
from codecssl.tokenize.common.errors import UserError

SAMPLE_RATE, HOP = 16_000, 640
CHANNELS, LEVELS = 8, 3
BOUND = 0.9990000128746033
"""Factor of the squashed values before they are rounded, the float32 constant of the published network."""
HEAD_WIDTH = 64
WINDOW, STEP = 400, 160
"""Window and hop of the spectrogram in samples."""


class MemoryAttention(nn.Module):
    """Attention with rotary positions, and a depthwise convolution of the values as a memory (FSMN), [B, T, C]."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)
        self.fsmn_block = nn.Conv1d(width, width, kernel, padding=(kernel - 1) // 2, groups=width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        values = self.value(x)
        query, key, value = (
            part.unflatten(2, (-1, HEAD_WIDTH)).transpose(1, 2) for part in (self.query(x), self.key(x), values)
        )
        weights = (_rotate(query) @ _rotate(key).transpose(2, 3) * HEAD_WIDTH**-0.5).softmax(dim=-1)
        found = self.out((weights @ value).transpose(1, 2).flatten(2))
        memory: Tensor = found + values + self.fsmn_block(values.transpose(1, 2)).transpose(1, 2)
        return memory


def _rotate(heads: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of [B, H, T, D] by angles that grow with time (Su et al. 2021)."""
    half = heads.shape[3] // 2
    rates = 10_000.0 ** (-torch.arange(half, device=heads.device) / half)
    angles = torch.arange(heads.shape[2], device=heads.device)[:, None] * rates
    first, second = heads.split(half, dim=3)
    cos, sin = angles.cos().to(heads), angles.sin().to(heads)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)


class Block(nn.Module):
    """Attention and a perceptron, each after a layer norm and with a residual connection."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.attn, self.attn_ln, self.mlp_ln = MemoryAttention(width, kernel), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_ln(x))
        found: Tensor = x + self.mlp(self.mlp_ln(x))
        return found


class S3Encoder(nn.Module):
    """Log-mel spectrograms [B, M, 4 T] to [B, T, C]."""

    def __init__(self, mels: int, width: int, layers: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(mels, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(width, kernel) for _ in range(layers))

    def forward(self, mel: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


class S3Network(nn.Module):
    """Encoder and projection with the sizes of a checkpoint. Raises KeyError if a tensor is missing."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        width, self.mels = state["encoder.conv1.weight"].shape[:2]
        layers = sum(key.endswith(".attn.fsmn_block.weight") for key in state)
        kernel = state["encoder.blocks.0.attn.fsmn_block.weight"].shape[2]
        self.encoder = S3Encoder(self.mels, width, layers, kernel)
        self.project_down = nn.Linear(width, CHANNELS)


class S3TokenizerCodec(SegmentCodec):
    """S3Tokenizer v2 as a `Codec`."""

    network: S3Network

    @cached_property
    def filters(self) -> Tensor:
        """Slaney mel filters [M, WINDOW / 2 + 1], as Whisper's."""
        import librosa

        bank: Any = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=WINDOW, n_mels=self.network.mels)
        return torch.from_numpy(bank).to(self.device, self.dtype)

    def encode_latents(self, audio: Tensor) -> Tensor:
        padded = F.pad(audio, (0, -len(audio) % HOP))
        window = torch.hann_window(WINDOW, device=self.device, dtype=self.dtype)
        power = torch.stft(padded, WINDOW, STEP, window=window, return_complex=True)[:, :-1].abs().square()
        logs = (self.filters @ power).clamp(min=1e-10).log10()
        mel = (torch.maximum(logs, logs.max() - 8.0) + 4.0) / 4.0
        found: Tensor = self.network.project_down(self.network.encoder(mel[None]))
        return found[0].t()

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Raise UserError: the model has no decoder."""
        raise UserError(f"codec {self.card.name}: encodes only; CosyVoice 2 synthesises speech from its codes")


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> S3TokenizerCodec:
    """Load `s3tokenizer_v2` from a state dict of the package or a folder with one (`Codec` loader)."""
    if weights is None:
        raise missing(name, "the hub")
    path = find_weights(name, weights, "", "", "speech_tokenizer_v2*.pt")
    state = read_tensors(path, name)
    try:
        network = S3Network(state)
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: not the weights of {name} ({type(error).__name__}: {error})") from error
    fill_part(network.encoder, state, "encoder.", path, name)
    fill_part(network.project_down, state, "quantizer._codebook.project_down.", path, name)
    kept = keep_codebooks(name, num_codebooks, 1, 1)
    card = CodecCard(
        name=name,
        weights=weights,
        weights_sha256=state_sha256(network),
        sample_rate=SAMPLE_RATE,
        hop_length=HOP,
        codebook_sizes=(LEVELS**CHANNELS,) * kept,
        codes_per_frame=(1,) * kept,
        latent_dim=CHANNELS,
        policies=policies(chunk_policy(), device, loudness="none"),
        versions=versions("torch", "librosa", "soxr"),
    )
    quantizer = FiniteScalarQuantizer(CHANNELS, LEVELS, device, bound=lambda values: values.tanh() * BOUND)
    return S3TokenizerCodec(network, quantizer, card, device)
