"""FocalCodec (Della Libera et al. 2025, arXiv 2502.04465): a single codebook of 8,192 binary spherical codes.

The first six layers of WavLM, focal modulation that compresses them to 13 channels at 50, 25 or 12.5 Hz, and the signs
of these as the bits of a code. Both networks see the whole wave: waves are encoded as in `parts/segments.py`. They are
zero-padded to a whole frame and to the samples that WavLM's last frame needs, so that T frames have T codes; the
authors' code, without padding, drops the last one.

The latent is the point on the sphere, +-1 / sqrt(13) in each channel. Only the networks that are not causal are here.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.fsq.focal_modulation import Compressor, Decompressor, FocalConfig
from codecssl.tokenize.backends.fsq.wavlm import WavLM, WavLMConfig
from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.segments import SegmentCodec, chunk_policy
from codecssl.tokenize.backends.parts.vocos import inverse_stft
from codecssl.tokenize.backends.parts.weights import fill_part, hub_file, missing, read_tensors, state_sha256
from codecssl.tokenize.codec import CodecCard, keep_codebooks
from codecssl.tokenize.common.errors import UserError

REPOSITORY, CONFIG, WEIGHTS = "lucadellalib/focalcodec_50hz", "config.json", "model.safetensors"
SAMPLE_RATE = 16_000
PARTS = ("encoder", "compressor", "decompressor", "decoder")
C = TypeVar("C")


class BinarySphericalQuantizer:
    """Signs of D channels as the bits of a code, the first channel the most significant (Zhao et al. 2024)."""

    def __init__(self, channels: int, device: str | torch.device = "cpu") -> None:
        self.channels = channels
        self.bits = 2 ** torch.arange(channels - 1, -1, -1, device=torch.device(device))

    def quantize(self, latents: Tensor) -> Tensor:
        """Quantize latents [D, T] to codes [1, T]."""
        return ((latents > 0) * self.bits[:, None]).sum(0, keepdim=True)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Convert codes [1, T] to points [D, T] on the unit sphere, float32."""
        signs = codes.to(self.bits.device) // self.bits[:, None] % 2
        return (2.0 * signs - 1.0) * self.channels**-0.5

    def embeddings(self) -> list[Tensor]:
        """Return the table [2 ** D, D] of all points."""
        return [self.dequantize(torch.arange(2**self.channels, device=self.bits.device)[None]).t().cpu()]


class VocosBlock(nn.Module):
    """A depthwise convolution and a pointwise perceptron with a residual connection, [B, T, C]."""

    def __init__(self, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(channels, channels, kernel, padding="same", groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.dwconv(x.transpose(1, 2)).transpose(1, 2))
        return x + self.gamma * self.pwconv2(F.gelu(self.pwconv1(hidden)))


class VocosBlocks(nn.Module):
    """Features [B, T, D] to [B, T, C]."""

    def __init__(self, inputs: int, channels: int, hidden: int, layers: int, kernel: int) -> None:
        super().__init__()
        self.embedding = nn.Conv1d(inputs, channels, kernel, padding="same")
        self.input_norm, self.output_norm = (nn.LayerNorm(channels, eps=1e-6) for _ in range(2))
        self.layers = nn.Sequential(*(VocosBlock(channels, hidden, kernel) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_norm(self.embedding(x.transpose(1, 2)).transpose(1, 2))
        found: Tensor = self.output_norm(self.layers(x))
        return found


class SpectrumHead(nn.Module):
    """Magnitudes and phases of a short-time spectrum, and its inverse: [B, T, C] to waves [B, T * hop]."""

    def __init__(self, channels: int, n_fft: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.proj = nn.Linear(channels, n_fft + 2)

    def forward(self, x: Tensor) -> Tensor:
        magnitude, phase = self.proj(x).transpose(1, 2).chunk(2, dim=1)
        return inverse_stft(torch.polar(magnitude.exp().clamp(max=100), phase), self.n_fft, self.hop_length)


class Vocos(nn.Module):
    """Vocos (Siuzdak 2023, arXiv 2306.00814): features [B, T, D] to waves [B, T * hop]."""

    def __init__(
        self,
        input_dim: int = 1024,
        num_layers: int = 8,
        dim: int = 512,
        ffn_dim: int = 1536,
        kernel_size: int = 7,
        n_fft: int = 1024,
        hop_length: int = 320,
    ) -> None:
        super().__init__()
        self.backbone = VocosBlocks(input_dim, dim, ffn_dim, num_layers, kernel_size)
        self.head = SpectrumHead(dim, n_fft, hop_length)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.backbone(x))
        return found


class FocalNetwork(nn.Module):
    """All layers, with the sizes of a config.json. Raises UserError for a network that is not implemented."""

    def __init__(self, config: dict[str, Any], path: Path, name: str) -> None:
        super().__init__()
        kinds = {"encoder": "WavLM", "compressor": "FocalEncoder", "decompressor": "FocalDecoder", "decoder": "Vocos"}
        kinds["quantizer"] = "BinarySphericalQuantizer"
        sections = {part: config.get(f"{part}_config") or {} for part in kinds}
        for part, kind in kinds.items():
            if config.get(f"{part}_name", kind) != kind or sections[part].get("causal"):
                what = "causal" if sections[part].get("causal") else config[f"{part}_name"]
                raise UserError(f"{path}: a {what} {part}; {name} has a {kind} that is not causal")
        self.channels = int(math.log2(sections["quantizer"].get("codebook_size", 4096)))
        focal = {"input_dim": 1024, "output_dim": self.channels}, {"input_dim": self.channels, "output_dim": 1024}
        self.encoder = WavLM(_known(WavLMConfig, sections["encoder"]))
        compressor = _known(FocalConfig, focal[0] | sections["compressor"], factors="downscale_factors")
        self.factor = math.prod(compressor.factors)
        self.compressor = Compressor(compressor)
        self.decompressor = Decompressor(
            _known(FocalConfig, focal[1] | sections["decompressor"], factors="upscale_factors")
        )
        sizes = ("input_dim", "num_layers", "dim", "ffn_dim", "kernel_size", "n_fft", "hop_length")
        self.decoder = Vocos(**{key: value for key, value in sections["decoder"].items() if key in sizes})

    @property
    def hop_length(self) -> int:
        """Samples per code."""
        return self.encoder.config.hop_length * self.factor


def _known(kind: type[C], section: dict[str, Any], **renamed: str) -> C:
    """Build a config from the values of a section that it has; the others change nothing in evaluation."""
    names = {renamed.get(field.name, field.name): field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{names[key]: value for key, value in section.items() if key in names})


class FocalCodec(SegmentCodec):
    """FocalCodec as a `Codec`."""

    network: FocalNetwork

    def encode_latents(self, audio: Tensor) -> Tensor:
        hop = self.network.hop_length
        padded = F.pad(audio, (0, -len(audio) % hop + self.network.encoder.config.lookahead))
        found: Tensor = self.network.compressor(self.network.encoder(padded[None]))
        return found[0].t()

    def decode_latents(self, latents: Tensor) -> Tensor:
        wave: Tensor = self.network.decoder(self.network.decompressor(latents.t()[None]))
        return wave[0]


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> FocalCodec:
    """Load `focalcodec` from a folder in the hub's format or the hub's cache (`Codec` loader)."""
    if weights is None:
        config_path, path = hub_file(name, REPOSITORY, CONFIG), hub_file(name, REPOSITORY, WEIGHTS)
    else:
        config_path, path = (Path(weights) / file for file in (CONFIG, WEIGHTS))
        if not config_path.is_file() or not path.is_file():
            raise missing(name, weights)
    try:
        config = dict(json.loads(config_path.read_text()))
        network = FocalNetwork(config, config_path, name)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{config_path}: not the configuration of {name} ({error})") from error
    state = current_names(read_tensors(path, name), network)
    for part in PARTS:
        fill_part(getattr(network, part), state, f"{part}.", path, name)
    kept = keep_codebooks(name, num_codebooks, 1, 1)
    card = CodecCard(
        name=name,
        weights=weights or name,
        weights_sha256=state_sha256(network),
        sample_rate=SAMPLE_RATE,
        hop_length=network.hop_length,
        codebook_sizes=(2**network.channels,) * kept,
        codes_per_frame=(1,) * kept,
        latent_dim=network.channels,
        policies=policies(chunk_policy(), device, padding="zeros to more than a whole frame", loudness="none"),
        versions=versions("torch", "soxr"),
    )
    return FocalCodec(network, BinarySphericalQuantizer(network.channels, device), card, device)


def current_names(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return a checkpoint's tensors under the names of this module.

    Checkpoints of the first release have separate projections of queries, keys and values, and other names in the
    compressor and the decompressor, which have the same alphabetical order as the current ones.
    """
    if not any(".q_proj." in key for key in state):
        return state
    renamed = {key: value for key, value in state.items() if key.startswith(("encoder.", "decoder."))}
    for key in [key for key in renamed if ".q_proj." in key]:
        joined = [renamed.pop(key.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        renamed[key.replace(".q_proj.", ".qkv_proj.")] = torch.cat(joined)
    for part in ("compressor.", "decompressor."):
        ours = sorted(key for key in network.state_dict() if key.startswith(part))
        renamed |= dict(zip(ours, (state[key] for key in sorted(state) if key.startswith(part)), strict=False))
    return renamed
