"""DAC (Kumar et al. 2023, High-Fidelity Audio Compression with Improved RVQGAN): a convolutional encoder, not causal.

The encoder runs on a wave piece by piece (parts/streaming_conv.py). The result is exact and memory is bounded
(tests/tokenize/backends/test_dac.py). On a CPU the widest activations are computed in pieces that fit the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.backends.parts.streaming_conv import (
    Layer,
    Pace,
    ResidualUnit,
    RowStream,
    Snake,
    StreamingConvolution,
)
from codecssl.tokenize.backends.parts.weights import load_pretrained, state_sha256
from codecssl.tokenize.codec import CodecCard, Encoded, encode_each, keep_codebooks
from codecssl.tokenize.common.errors import UserError

NETWORKS = {"dac_16khz": (16_000, 320), "dac_24khz": (24_000, 320), "dac_44khz": (44_100, 512)}
"""Sample rate in Hz and samples per frame of each network."""

DECODE_FRAMES, DECODE_CONTEXT = 256, 12
"""Frames per decoder window. The decoder's receptive field is less than 11 frames to either side."""


PACES = {"cpu": Pace(chunk=192, piece=6)}
"""Paces by device type."""
OTHER_PACE = Pace(chunk=2400, piece=2400)
"""Pace on a GPU, one wave at a time. A few seconds fill a GPU, and a wave encoded alone does not depend on a batch."""


def encoder_layers(encoder: Any) -> tuple[list[Layer], list[Layer]]:
    """Split the layers of a `transformers` DacEncoder: those up to the end of the second block, and the rest."""
    layers: list[Layer] = [StreamingConvolution(encoder.conv1)]
    for block in encoder.block:
        for unit in (block.res_unit1, block.res_unit2, block.res_unit3):
            layers.append(ResidualUnit(unit.snake1, unit.conv1, unit.snake2, unit.conv2))
        layers.append(StreamingConvolution(block.conv1, Snake(block.snake1)))
    layers.append(StreamingConvolution(encoder.conv2, Snake(encoder.snake1)))
    return layers[:9], layers[9:]


class CodebookLayers(nn.Module):
    """Layers of a factorized codebook of V entries, under the names of published checkpoints. `Codebook` reads them."""

    def __init__(self, channels: int, size: int, width: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Conv1d(channels, width, 1), nn.Conv1d(width, channels, 1)
        self.codebook = nn.Embedding(size, width)


class Codebook:
    """One level of the residual quantizer: nearest entry by direction, in a narrow projection (Kumar et al., 3.2)."""

    def __init__(self, module: Any) -> None:
        self.down, self.down_bias = module.in_proj.weight.detach()[..., 0].t(), module.in_proj.bias.detach()
        self.up, self.up_bias = module.out_proj.weight.detach()[..., 0].t(), module.out_proj.bias.detach()
        self.entries = module.codebook.weight.detach()  # [V, narrow]
        directions = F.normalize(self.entries)
        self.directions, self.squared_norms = directions.t(), directions.pow(2).sum(1)

    def table(self) -> Tensor:
        """Vectors [V, D] that the entries add to the latent."""
        return torch.addmm(self.up_bias, self.entries, self.up)

    def nearest(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes [T] of latents [T, D] and the vectors [T, D] of these codes."""
        narrow = torch.addmm(self.down_bias, latents, self.down)
        unit = F.normalize(narrow)
        # the reference's expression: ties and rounding agree with it
        nearness = -(unit.pow(2).sum(1, keepdim=True) - 2 * unit @ self.directions) + self.squared_norms
        index = nearness.max(1)[1]
        chosen = narrow + (F.embedding(index, self.entries) - narrow)  # rounding of its straight-through estimator
        return index, torch.addmm(self.up_bias, chosen, self.up)

    def quantize(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize a residual [T, D]. Return the codes [T] and the remaining residual [T, D]."""
        index, vectors = self.nearest(residual)
        return index, residual - vectors


# ---------------------------------------------------------------- the codec


class DacCodec:
    """A `transformers.DacModel` as a `Codec`."""

    def __init__(self, model: Any, card: CodecCard, device: str = "cpu") -> None:
        self.card, self.device = card, torch.device(device)
        self.model: nn.Module = model.to(self.device).eval()
        self.front, self.back = encoder_layers(model.encoder)
        self.codebooks = [Codebook(module) for module in model.quantizer.quantizers[: card.num_codebooks]]
        self.dtype: torch.dtype = model.dtype
        self.pace = PACES.get(self.device.type, OTHER_PACE)

    def stream(self) -> RowStream:
        return RowStream(self)

    def encode(self, waves: Sequence[Tensor]) -> list[Encoded]:
        return encode_each(self, waves)

    def encode_reference(self, wave: Tensor) -> Tensor:
        """Encode the whole wave, zero-padded to a whole frame, with `DacModel.encode`."""
        padded = F.pad(wave, (0, -len(wave) % self.card.hop_length)).to(self.device, self.dtype)
        with full_precision():
            codes: Tensor = self.model.encode(  # type: ignore[operator]
                padded[None, None], n_quantizers=self.card.num_codebooks
            ).audio_codes[0]
        return codes

    def quantize(self, latents: Tensor) -> Tensor:
        """Quantize latents [T, D] to codes [K, T]."""
        codes = []
        for codebook in self.codebooks:
            index, latents = codebook.quantize(latents)
            codes.append(index)
        return torch.stack(codes)

    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """Decode in windows of `DECODE_FRAMES`.

        The network returns a few samples less than T * hop where a stride is odd; zeros are appended.
        """
        hop, frames = self.card.hop_length, codes.shape[1]
        wave = torch.zeros(frames * hop, device=self.device)
        for start in range(0, frames, DECODE_FRAMES):
            first, end = max(0, start - DECODE_CONTEXT), min(frames, start + DECODE_FRAMES)
            latents = self.latents(codes[:, first : end + DECODE_CONTEXT])
            with full_precision():
                window = self.model.decoder(latents[None])[0, 0, (start - first) * hop :]  # type: ignore[operator]
            window = window[: (end - start) * hop]
            wave[start * hop : start * hop + len(window)] = window
        return wave

    def embeddings(self) -> list[Tensor]:
        with full_precision():
            return [codebook.table().cpu() for codebook in self.codebooks]

    def entries(self) -> list[Tensor]:
        return [codebook.entries.cpu().clone() for codebook in self.codebooks]

    def latents(self, codes: Tensor) -> Tensor:
        with full_precision():
            found: Tensor = self.model.quantizer.from_codes(codes[None].to(self.device))[0][0]  # type: ignore[operator, union-attr]
        return found


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> DacCodec:
    """Load `dac_16khz`, `dac_24khz` or `dac_44khz` (`Codec` loader; see `load_codec`); all codebooks by default."""
    import transformers

    source = weights or f"descript/{name}"
    model = load_pretrained(name, transformers.DacModel, source)
    # config.hop_length on the hub was once 512 for all three
    found = (model.config.sampling_rate, math.prod(model.config.downsampling_ratios))
    if found != NETWORKS[name]:
        raise UserError(
            "{}: a DAC of {} Hz and {} samples per frame, {} has {} Hz and {}; give its own weights".format(
                source, *found, name, *NETWORKS[name]
            )
        )
    available = len(model.quantizer.quantizers)
    kept = keep_codebooks(name, num_codebooks, available, available)
    return DacCodec(model, make_card(name, weights or name, model, kept, device), device)


def make_card(name: str, weights: str, model: Any, num_codebooks: int, device: str) -> CodecCard:
    """The card of a `transformers.DacModel`."""
    pace = PACES.get(torch.device(device).type, OTHER_PACE)
    return CodecCard(
        name=name,
        weights=weights,
        weights_sha256=state_sha256(model),
        sample_rate=model.config.sampling_rate,
        hop_length=math.prod(model.config.downsampling_ratios),
        codebook_sizes=(model.config.codebook_size,) * num_codebooks,
        codes_per_frame=(1,) * num_codebooks,
        latent_dim=model.encoder.conv2.out_channels,
        policies=policies(
            f"{pace.chunk} frames in pieces of {pace.piece}, carried layer inputs", device, loudness="none"
        ),
        versions=versions("torch", "transformers", "soxr"),
    )
