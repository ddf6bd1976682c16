"""X-codec (Ye et al. 2024, Codec Does Matter): an acoustic encoder and HuBERT, their outputs in one residual quantizer.

HuBERT normalizes over its whole input and attends to all of it, so any padding or cut changes codes. A wave of up to
`WHOLE_SECONDS` is encoded whole and alone, as `XcodecModel.encode` does. A longer wave is cut into segments of
`SEGMENT_SECONDS` while more than `WHOLE_SECONDS` remain, and each segment is encoded independently. The last segment
is therefore never short; HuBERT works poorly on short inputs.

Waves are zero-padded to a whole frame, as by the model's feature extractor. Both encoders then return one vector per
frame. The model adds 160 samples at either end, so even one frame exceeds HuBERT's minimum of 400 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.backends.parts.segments import SegmentStream, chunk_policy
from codecssl.tokenize.backends.parts.weights import load_pretrained, state_sha256
from codecssl.tokenize.codec import CodecCard, Encoded, encode_each, keep_codebooks
from codecssl.tokenize.common.errors import UserError

WHOLE_SECONDS, SEGMENT_SECONDS = 30, 20
RATIOS = [8, 5, 4, 2]
"""Strides of the acoustic encoder's convolutions."""

PIECE_STEPS, FRONT_CONTEXT, FRONT_HOP = 400, 10, 40
"""Step of the acoustic encoder's first two blocks on a CPU: 1 s, so that activations stay near the cache.
One output step of these blocks, 40 samples, depends on 382 samples to either side.
"""


class XcodecCodec:
    """A `transformers.XcodecModel` as a `Codec`."""

    def __init__(self, model: Any, card: CodecCard, device: str = "cpu") -> None:
        self.model, self.card, self.device = model.to(device).eval(), card, torch.device(device)
        self.dtype: torch.dtype = model.dtype
        encoder = model.acoustic_encoder
        self.front = nn.Sequential(encoder.conv1, *encoder.block[:2])
        self.back = nn.Sequential(*encoder.block[2:], encoder.snake1, encoder.conv2)
        self.quantizers = list(model.quantizer.quantizers)[: card.num_codebooks]

    def stream(self) -> SegmentStream:
        return SegmentStream(self, WHOLE_SECONDS, SEGMENT_SECONDS)

    def encode(self, waves: Sequence[Tensor]) -> list[Encoded]:
        return encode_each(self, waves)

    def encode_segment(self, wave: Tensor) -> Tensor:
        """Encode one segment or a whole wave [n] to codes [K, T]."""
        padded = F.pad(wave.to(self.device, self.dtype), (0, -len(wave) % self.card.hop_length))
        with full_precision():
            return self._quantize(self._latents(padded[None]))

    def encode_reference(self, wave: Tensor) -> Tensor:
        """Encode the whole wave, zero-padded to a whole frame, with `XcodecModel.encode`."""
        padded = F.pad(wave.to(self.device, self.dtype), (0, -len(wave) % self.card.hop_length))
        with full_precision():
            codes: Tensor = self.model.encode(padded[None, None]).audio_codes[0]
        return codes[: self.card.num_codebooks]

    def _latents(self, audio: Tensor) -> Tensor:
        """Compute the quantizer's input [1, D, T] for audio [1, n], n a multiple of the hop."""
        model = self.model
        padded = F.pad(audio, (model.pad, model.pad))
        hidden = model.semantic_model(padded, output_hidden_states=True).hidden_states
        semantic = model.encoder_semantic(torch.stack(hidden, dim=1).mean(dim=1).transpose(1, 2))
        both = torch.cat([self.back(self._front(audio)), semantic], dim=1)
        latents: Tensor = model.fc(both.transpose(1, 2))
        return latents.transpose(1, 2)

    def _front(self, audio: Tensor) -> Tensor:
        """Run the acoustic encoder's first blocks: [1, n] to [1, C, n / FRONT_HOP]."""
        steps = audio.shape[1] // FRONT_HOP
        size = PIECE_STEPS if self.device.type == "cpu" else steps
        parts = []
        for first in range(0, steps, size):
            start, end = max(0, first - FRONT_CONTEXT), first + size
            found = self.front(audio[:, None, start * FRONT_HOP : (end + FRONT_CONTEXT) * FRONT_HOP])
            parts.append(found[..., first - start : end - start])
        return torch.cat(parts, dim=-1)

    def _quantize(self, latents: Tensor) -> Tensor:
        codes = []
        for quantizer in self.quantizers:
            index = quantizer.encode(latents)
            latents = latents - quantizer.decode(index)
            codes.append(index[0])
        return torch.stack(codes)

    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """Decode the whole utterance at once: memory grows with its length."""
        if codes.shape[1] == 0:
            return torch.zeros(0, device=self.device)
        with full_precision():
            wave: Tensor = self.model.decode(codes[None].to(self.device)).audio_values
        return wave[0, 0]

    def embeddings(self) -> list[Tensor]:
        return [quantizer.codebook.embed.detach().cpu().clone() for quantizer in self.quantizers]

    def latents(self, codes: Tensor) -> Tensor:
        with full_precision():
            found: Tensor = self.model.quantizer.decode(codes[:, None].to(self.device))
        return found[0]


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> XcodecCodec:
    """Load `xcodec` from a folder in the hub's format or the hub's cache (`Codec` loader; see `load_codec`)."""
    source = weights or "hf-audio/xcodec-hubert-librispeech"
    model = load_pretrained(name, _Model, source)
    config = model.config
    ratios = list(config.acoustic_model_config.downsampling_ratios)
    if config.sample_rate != 16_000 or ratios != RATIOS:
        raise UserError(f"{source}: X-codec at {config.sample_rate} Hz, ratios {ratios}, {name} has 16000 Hz, {RATIOS}")
    kept = keep_codebooks(name, num_codebooks, config.num_quantizers, config.num_quantizers)
    return XcodecCodec(model, make_card(name, weights or name, model, kept, device), device)


class _Model:
    """`XcodecModel` that does not query the hub for the semantic model named in its configuration."""

    @staticmethod
    def from_pretrained(source: str, **options: Any) -> Any:
        values, _ = transformers.XcodecConfig.get_config_dict(
            source, local_files_only=options.get("local_files_only", False)
        )
        semantic = values.get("semantic_model_config")
        if isinstance(semantic, dict) and "model_type" in semantic:
            fields = {key: value for key, value in semantic.items() if key not in ("_name_or_path", "model_type")}
            values["semantic_model_config"] = transformers.AutoConfig.for_model(semantic["model_type"], **fields)
        config = transformers.XcodecConfig.from_dict(values)
        return transformers.XcodecModel.from_pretrained(source, config=config, **options)


def make_card(name: str, weights: str, model: Any, num_codebooks: int, device: str) -> CodecCard:
    """Build the card of an XcodecModel."""
    config = model.config
    return CodecCard(
        name=name,
        weights=weights,
        weights_sha256=state_sha256(model),
        sample_rate=config.sample_rate,
        hop_length=config.hop_length,
        codebook_sizes=(config.codebook_size,) * num_codebooks,
        codes_per_frame=(1,) * num_codebooks,
        latent_dim=config.codebook_dim,
        policies=policies(
            chunk_policy(WHOLE_SECONDS, SEGMENT_SECONDS),
            device,
            loudness="none",
        ),
        versions=versions("torch", "transformers", "soxr"),
    )
