"""SNAC (Siuzdak et al. 2024, Multi-Scale Neural Audio Codec): codebooks at several rates, a convolutional encoder.

A frame is one step of the coarsest codebook: `snac_24khz` has 1, 2 and 4 codes in a frame of 2048 samples, 7 rows.

The encoder runs on a wave piece by piece (parts/streaming_conv.py). The result is exact and memory is bounded
(tests/tokenize/backends/test_snac.py).

The decoder adds noise, as in training. Here the noise comes from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from codecssl.tokenize.backends.parts.weights import fill, hub_file, missing, state_sha256
from codecssl.tokenize.codec import CodecCard, Encoded, encode_each, keep_codebooks
from codecssl.tokenize.common.errors import UserError, one_line

CPU_PACE, GPU_PACE = Pace(2, 48), Pace(480, 480)
FRONT_BLOCKS = 3
"""Number of encoder blocks in the first layers."""
NOISE_SEED = 0
"""Seed of the decoder's noise: `torch.manual_seed` before each utterance."""


def encoder_layers(encoder: Any) -> tuple[list[Layer], list[Layer]]:
    """Split the layers of a `snac` Encoder without attention: the first ones, and those after FRONT_BLOCKS."""
    first, *blocks, last = encoder.block
    front: list[Layer] = [StreamingConvolution(first)]
    back: list[Layer] = []
    for i, block in enumerate(blocks):
        *units, snake, strided = block.block
        layers = front if i < FRONT_BLOCKS else back
        layers += [*(ResidualUnit(*unit.block) for unit in units), StreamingConvolution(strided, Snake(snake))]
    return front, [*back, StreamingConvolution(last)]


# ---------------------------------------------------------------- the codec


class SnacCodec:
    """A `snac.SNAC` without attention as a `Codec`."""

    def __init__(self, net: Any, card: CodecCard, device: str = "cpu") -> None:
        self.net, self.card, self.device = net.to(device).eval(), card, torch.device(device)
        self.dtype: torch.dtype = next(net.parameters()).dtype
        self.front, self.back = encoder_layers(net.encoder)
        self.quantizers = list(net.quantizer.quantizers)[: card.num_codebooks]
        self.steps: int = net.vq_strides[0]
        """Steps of the encoder per frame."""
        self.pace = _pace(device)

    def stream(self) -> SnacStream:
        return SnacStream(self)

    def encode(self, waves: Sequence[Tensor]) -> list[Encoded]:
        return encode_each(self, waves)

    def quantize(self, latents: Tensor) -> Tensor:
        """Quantize latents [D, steps * T] to codes [R, T] with the package's own layers."""
        residual, rows = latents[None], []
        for quantizer, count in zip(self.quantizers, self.card.codes_per_frame):
            found, codes = quantizer(residual)
            residual = residual - found
            rows.append(codes.view(-1, count).t())
        return torch.cat(rows)

    def encode_reference(self, wave: Tensor) -> Tensor:
        """Encode the whole wave with `SNAC.encode`."""
        with full_precision():
            found = self.net.encode(wave.to(self.device, self.dtype)[None, None])
        kept = zip(found, self.card.codes_per_frame)  # the codebooks that are kept
        return torch.cat([codes.view(-1, count).t() for codes, count in kept])

    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """Decode the whole utterance at once: memory grows with its length."""
        if codes.shape[1] == 0:
            return torch.zeros(0, device=self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with full_precision(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(NOISE_SEED)
            wave: Tensor = self.net.decoder(self._fine(codes))
        return wave[0, 0]

    def embeddings(self) -> list[Tensor]:
        """Embedding tables, one per row of codes.

        Row j of a codebook with n codes per frame fills the j-th n-th of the frame's steps. All other steps are zero.
        """
        tables = []
        with full_precision():
            for quantizer, count in zip(self.quantizers, self.card.codes_per_frame):
                entries = quantizer.out_proj(quantizer.codebook.weight.t()[None])[0].t().cpu()  # [V, D]
                for j in range(count):
                    table = torch.zeros(len(entries), self.steps, entries.shape[1])
                    table[:, j * quantizer.stride : (j + 1) * quantizer.stride] = entries[:, None]
                    tables.append(table.flatten(1))
        return tables

    def entries(self) -> list[Tensor]:
        counts = zip(self.quantizers, self.card.codes_per_frame)
        return [quantizer.codebook.weight.detach().cpu().clone() for quantizer, count in counts for _ in range(count)]

    def latents(self, codes: Tensor) -> Tensor:
        """Convert codes [R, T] to latents [steps * D, T]: the steps of a frame are stacked."""
        with full_precision():
            fine = self._fine(codes)[0]
            return fine.unflatten(1, (codes.shape[1], self.steps)).permute(2, 0, 1).flatten(0, 1)

    def _fine(self, codes: Tensor) -> Tensor:
        """Dequantize codes [R, T] to latents at the encoder's own rate, [1, D, steps * T]."""
        summed: Tensor | float = 0.0
        parts = codes.to(self.device).split(self.card.codes_per_frame)
        for quantizer, part in zip(self.quantizers, parts):
            entries = quantizer.out_proj(quantizer.decode_code(part.t().reshape(1, -1)))
            summed = summed + entries.repeat_interleave(quantizer.stride, dim=-1)
        assert isinstance(summed, Tensor)
        return summed


class SnacStream(RowStream):
    """Streaming encoder of one wave. It keeps the latents of the incomplete frame."""

    codec: SnacCodec

    def quantize(self, latents: Tensor) -> Tensor:
        latents = torch.cat([self.kept[self], latents]) if self in self.kept else latents
        whole = len(latents) // self.codec.steps * self.codec.steps
        self.kept[self] = latents[whole:].clone()
        return self.codec.quantize(latents[:whole].t())


def _pace(device: str) -> Pace:
    return CPU_PACE if torch.device(device).type == "cpu" else GPU_PACE


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> SnacCodec:
    """Load `snac_24khz` from a folder in the hub's format or the hub's cache (`Codec` loader; see `load_codec`)."""
    try:
        from snac import SNAC
    except ImportError as error:
        raise UserError(f"codec {name}: needs the snac package; pip install snac") from error
    source = weights or "hubertsiuzdak/snac_24khz"
    config, state = _files(name, source)
    try:
        net = SNAC.from_config(str(config))
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{config}: not the configuration of {name} ({one_line(error)})") from error
    fill(net, state, name)
    if net.sampling_rate != 24_000 or net.attn_window_size is not None:
        attention = "no attention" if net.attn_window_size is None else "attention"
        raise UserError(f"{source}: SNAC at {net.sampling_rate} Hz with {attention}, {name} has none, at 24000 Hz")
    net = net.float().eval().requires_grad_(False)
    kept = keep_codebooks(name, num_codebooks, net.n_codebooks, net.n_codebooks)
    return SnacCodec(net, make_card(name, weights or name, net, kept, device), device)


def _files(name: str, source: str) -> tuple[Path, Path]:
    """Find config.json and pytorch_model.bin. Raises UserError if they are missing."""
    if Path(source).is_dir():
        config, state = (Path(source) / file for file in ("config.json", "pytorch_model.bin"))
        if config.exists() and state.exists():
            return config, state
        raise missing(name, source)
    return hub_file(name, source, "config.json"), hub_file(name, source, "pytorch_model.bin")


def make_card(name: str, weights: str, net: Any, num_codebooks: int, device: str) -> CodecCard:
    """Build the card of a SNAC network."""
    strides, pace = net.vq_strides, _pace(device)
    return CodecCard(
        name=name,
        weights=weights,
        weights_sha256=state_sha256(net),
        sample_rate=net.sampling_rate,
        hop_length=int(net.hop_length) * strides[0],
        codebook_sizes=(net.codebook_size,) * num_codebooks,
        codes_per_frame=tuple(strides[0] // stride for stride in strides[:num_codebooks]),
        latent_dim=strides[0] * net.latent_dim,
        policies=policies(
            f"{pace.chunk} frames in pieces of {pace.piece}, carried layer inputs", device, loudness="none"
        ),
        versions=versions("torch", "snac", "soxr"),
    )
