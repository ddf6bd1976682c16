"""Mimi (Defossez et al. 2024, "Moshi"): causal convolutions, a Transformer with a sliding window, a split quantizer.

A wave is cut into chunks of `CHUNK_FRAMES`. Each convolution keeps the inputs that its kernel still needs. Each
attention layer keeps the keys and values of its window. Nothing is computed twice. The result is exact and memory is
bounded (tests/tokenize/backends/test_mimi.py).

The window is the one that the model was trained with (section 3.3.1; `config.sliding_window`). transformers 4.57
omits it: beyond 250 positions (10 s) its `MimiModel.encode` attends to everything, and its memory grows with the
square of the length. Later versions and the authors' own package apply the window, and so does `encode_reference`.

On a CPU, memory traffic of long activations dominates the time. The first layers therefore run on pieces that fit the
cache, and all convolutions are matrix products on [T, C], one per tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mimi.modeling_mimi import apply_rotary_pos_emb, repeat_kv

from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.chunked_stream import ChunkedStream
from codecssl.tokenize.backends.parts.functional import causal_window, elu
from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.backends.parts.weights import load_pretrained, state_sha256
from codecssl.tokenize.codec import CodecCard, Encoded, keep_codebooks
from codecssl.tokenize.common.errors import UserError

DEFAULT_CODEBOOKS = 8
CHUNK_FRAMES = 64
"""Frames per step of the deep layers. It amortizes reading their weights."""
PIECE_FRAMES = 1
"""Frames per step of the first layers on a CPU. Their activations fit its second-level cache."""
SHALLOW_DOWNSAMPLINGS = 2
"""Number of strided convolutions in the first layers."""
FEW_INPUTS = 16
"""Limit of a convolution's inputs, times its stride, up to which its windows are materialized."""
CUDA_LANES = 16
"""Waves per GPU batch, encoded in lockstep. The shape is fixed, so a wave's codes do not depend on the others'."""

Layer = Callable[[Tensor, "Past"], Tensor]
"""A function of the next samples or frames [L, T, C] and the carried state. It returns [L, T', C']."""


class Past(dict[Any, Any]):
    """The state that one encoder or decoder carries from chunk to chunk, by layer."""

    position = 0
    """Position of the next chunk in the Transformer's sequence."""


class MimiCodec:
    """A `transformers.MimiModel` as a `Codec`."""

    def __init__(self, model: Any, card: CodecCard, device: str = "cpu", lanes: int = 1) -> None:
        self.model, self.card, self.device = model.to(device), card, torch.device(device)
        self.lanes = lanes
        layers = list(model.encoder.layers)
        strided = [i for i, layer in enumerate(layers) if getattr(layer, "stride", 1) > 1]
        split = strided[SHALLOW_DOWNSAMPLINGS - 1] + 1
        self.shallow, self.deep = _chain(layers[:split]), _chain(layers[split:])
        self.transformer = Transformer(model.encoder_transformer)
        self.decoder_transformer = None if model.decoder is None else Transformer(model.decoder_transformer)
        self.downsample = MimiConvolution(model.downsample)
        self.quantizers = list(_quantizers(model.quantizer, card.num_codebooks))

    def stream(self) -> MimiStream:
        return MimiStream(self)

    @full_precision()
    def encode(self, waves: Sequence[Tensor]) -> list[Encoded]:
        codes: list[Tensor] = [torch.empty(0)] * len(waves)
        order = sorted(range(len(waves)), key=lambda i: len(waves[i]))
        for at in range(0, len(order), self.lanes):
            group = order[at : at + self.lanes]
            for index, found in zip(group, self._together([waves[i] for i in group])):
                codes[index] = found
        return [Encoded(found) for found in codes]

    def _together(self, waves: Sequence[Tensor]) -> list[Tensor]:
        samples = max(len(wave) for wave in waves)
        audio = torch.zeros(self.lanes, samples + -samples % self.quantum, device=self.device)
        for row, wave in zip(audio, waves):
            row[: len(wave)] = wave
        past = Past()
        codes = torch.cat([self.advance(chunk, past) for chunk in audio.split(self.chunk, dim=1)], dim=2)
        return [row[:, : self.card.frames_of(len(wave))] for row, wave in zip(codes, waves)]

    @property
    def chunk(self) -> int:
        """Samples per encoded chunk."""
        return CHUNK_FRAMES * self.card.hop_length

    @property
    def quantum(self) -> int:
        """Waves are zero-padded to a multiple of this many samples."""
        return self.card.hop_length if self.lanes == 1 else self.chunk

    def advance(self, audio: Tensor, past: Past) -> Tensor:
        """Encode the next whole frames of `lanes` waves [L, n] to codes [L, K, t]."""
        return self.quantize(self.latents_of(audio, past))

    def latents_of(self, audio: Tensor, past: Past) -> Tensor:
        """Compute the quantizer's input [L, t, D] for the next whole frames of waves [L, n]."""
        piece = PIECE_FRAMES * self.card.hop_length if self.device.type == "cpu" else audio.shape[1]
        hidden = torch.cat([self.shallow(part[..., None], past) for part in audio.split(piece, dim=1)], dim=1)
        return self.downsample(self.transformer(self.deep(hidden, past), past), past)

    def quantize(self, latents: Tensor) -> Tensor:
        """Quantize latents [L, t, D] to codes [L, K, t].

        Each codebook takes the nearest entry to the residual of those before it.
        """
        codes = []
        for project, tables in self.quantizers:
            residual = project(latents.flatten(0, 1))
            for table, squared in tables:
                index = torch.addmm(squared, residual, table.t(), alpha=-2).argmin(dim=1)
                residual = residual - F.embedding(index, table)
                codes.append(index.view(latents.shape[:2]))
        return torch.stack(codes, dim=1)

    @full_precision()
    def encode_reference(self, wave: Tensor) -> Tensor:
        """Encode the whole wave with transformers' own modules, with the attention window that they omit."""
        audio = F.pad(wave.to(self.device), (0, -len(wave) % self.card.hop_length))[None, None]
        model, count = self.model, self.card.num_codebooks
        hidden = model.encoder(audio).transpose(1, 2)
        length, window = hidden.shape[1], model.config.sliding_window
        mask = None
        if length > window:
            seen = causal_window(length, length, window, self.device)[None, None]
            mask = torch.zeros(seen.shape).to(hidden).masked_fill(~seen, float("-inf"))
        latents = model.downsample(model.encoder_transformer(hidden, attention_mask=mask)[0].transpose(1, 2))
        codes: Tensor = model.quantizer.encode(latents, count)
        return codes[:, 0]

    @full_precision()
    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """Decode the whole utterance at once: memory grows with its length. Raises UserError without a decoder."""
        if self.decoder_transformer is None:
            raise UserError(f"codec {self.card.name}: encodes only; decode its codes with the package of its authors")
        hidden, past = self.model.upsample(self.latents(codes)[None]).transpose(1, 2), Past()
        parts = hidden.split(CHUNK_FRAMES * 2, dim=1)
        hidden = torch.cat([self.decoder_transformer(part, past) for part in parts], dim=1)
        wave: Tensor = self.model.decoder(hidden.transpose(1, 2))
        return wave[0, 0]

    @torch.inference_mode()
    def embeddings(self) -> list[Tensor]:
        tables = [
            (entries if projection is None else entries @ projection.weight[..., 0].t()).cpu()
            for entries, projection in self._entries()
        ]
        return tables[: self.card.num_codebooks]

    def entries(self) -> list[Tensor]:
        return [entries.cpu().clone() for entries, _ in self._entries()][: self.card.num_codebooks]

    def _entries(self) -> Iterator[tuple[Tensor, Any]]:
        """Yield each codebook's entries and the projection after them, if any."""
        split = self.model.quantizer
        for part in (split.semantic_residual_vector_quantizer, split.acoustic_residual_vector_quantizer):
            for layer in part.layers:
                yield layer.codebook.embed, part.output_proj

    @torch.inference_mode()
    def latents(self, codes: Tensor) -> Tensor:
        decoded: Tensor = self.model.quantizer.decode(codes.to(self.device)[None])
        return decoded[0]


class MimiStream(ChunkedStream):
    """Streaming encoder of one wave, a chunk at a time. The last chunk, whole or not, is left for `finish`."""

    codec: MimiCodec

    def __init__(self, codec: MimiCodec) -> None:
        super().__init__(codec, chunk=codec.chunk, needed=codec.chunk + 1)
        self.past = Past()

    @full_precision()
    def encode_chunk(self, audio: Tensor, last: bool) -> Tensor:
        padded = F.pad(audio, (0, -len(audio) % self.codec.quantum))
        lanes = F.pad(padded[None], (0, 0, 0, self.codec.lanes - 1))
        return self.codec.advance(lanes, self.past)[0, :, : self.codec.card.frames_of(len(audio))]


# ---------------------------------------------------------------- layers


class Taps:
    """A convolution over [L, n, C] as matrix products, one per tap.

    Rows of `stride` samples are concatenated, so a kernel has few taps. Its length must be a multiple of the stride.
    """

    def __init__(self, convolution: nn.Conv1d) -> None:
        self.stride, self.dilation = convolution.stride[0], convolution.dilation[0]
        self.outputs, self.inputs, kernel = convolution.weight.shape
        self.span = (kernel - 1) * self.dilation + 1
        weight = convolution.weight.detach().permute(2, 1, 0)  # [kernel, C, C']
        self.taps = weight.reshape(kernel // self.stride, -1, self.outputs).contiguous()
        bias = convolution.bias
        self.bias = weight.new_zeros(self.outputs) if bias is None else bias.detach()

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """Convolve x [L, n, C], which holds every input of the kernel, and write the result to `out` [L, T, C']."""
        rows, length = x.reshape(len(x), -1, self.stride * self.inputs), out.shape[1]
        out.copy_(self.bias)
        if (
            rows.shape[2] <= FEW_INPUTS and self.dilation == 1
        ):  # a product for each tap would mostly read and write `out`
            windows = rows.flatten(1).unfold(1, len(self.taps) * rows.shape[2], rows.shape[2])
            return out.add_(windows @ self.taps.flatten(0, 1))
        for tap, weight in enumerate(self.taps):
            at = tap * self.dilation
            out.baddbmm_(rows[:, at : at + length], weight.expand(len(x), -1, -1))
        return out


class MimiConvolution:
    """A causal `MimiConv1d` over the next [L, T, C], optionally after an ELU. T is a multiple of its stride."""

    def __init__(self, layer: Any, activated: bool = False) -> None:
        self.taps, self.activated, self.replicate = Taps(layer.conv), activated, layer.pad_mode == "replicate"
        self.context = self.taps.span - self.taps.stride

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        out = x.new_empty(len(x), x.shape[1] // self.taps.stride, self.taps.outputs)
        if self.activated:
            x = elu(x)
        return self.taps(self._with_context(x, past) if self.context else x, out)

    def _with_context(self, x: Tensor, past: Past) -> Tensor:
        before = past.get(self)
        if before is None:  # the start of the wave
            before = x[:, :1] if self.replicate else x.new_zeros(1, 1, 1)
            before = before.expand(len(x), self.context, x.shape[2])
        x = torch.cat([before, x], dim=1)
        past[self] = x[:, -self.context :].clone()
        return x


class Transformer:
    """A `MimiTransformerModel` over the next [L, T, D]. Each layer keeps the keys and values of its window."""

    def __init__(self, model: Any) -> None:
        self.layers, self.window = list(model.layers), int(model.config.sliding_window)

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        length = x.shape[1]
        positions = torch.arange(past.position, past.position + length, device=x.device)
        angles = self.layers[0].self_attn.rotary_emb(x, positions[None])
        mask = causal_window(length, min(past.position, self.window - 1) + length, self.window, x.device)
        past.position += length
        for layer in self.layers:
            x = x + layer.self_attn_layer_scale(
                self._attend(layer.self_attn, layer.input_layernorm(x), angles, mask, past)
            )
            x = x + layer.mlp_layer_scale(layer.mlp(layer.post_attention_layernorm(x)))
        return x

    def _attend(self, layer: Any, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, past: Past) -> Tensor:
        query, key, value = (
            project(x).unflatten(2, (-1, layer.head_dim)).transpose(1, 2)
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *angles)
        if before := past.get(layer):
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        past[layer] = tuple(kept[:, :, -self.window + 1 :].clone() for kept in (key, value))
        key, value = (repeat_kv(x, layer.num_key_value_groups) for x in (key, value))
        weights = (query @ key.transpose(2, 3) * layer.scaling).masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return layer.o_proj((weights @ value).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _chain(layers: Sequence[Any]) -> Layer:
    """Chain the layers of a MimiEncoder. An ELU is merged into the convolution that follows it."""
    steps: list[Layer] = []
    for before, layer in zip([None, *layers], layers):
        if hasattr(layer, "block"):
            steps.append(_residual(layer))
        elif not isinstance(layer, nn.ELU):
            steps.append(MimiConvolution(layer, activated=isinstance(before, nn.ELU)))

    def run(x: Tensor, past: Past) -> Tensor:
        for step in steps:
            x = step(x, past)
        return x

    return run


def _residual(layer: Any) -> Layer:
    block = _chain(list(layer.block))
    shortcut = None if isinstance(layer.shortcut, nn.Identity) else MimiConvolution(layer.shortcut)
    return lambda x, past: (shortcut(x, past) if shortcut else x) + block(x, past)


def _quantizers(split: Any, count: int) -> Iterator[tuple[Callable[[Tensor], Tensor], list[tuple[Tensor, Tensor]]]]:
    """Yield the two residual quantizers: a projection of [N, D] and the first `count` tables with squared norms."""
    for part in (split.semantic_residual_vector_quantizer, split.acoustic_residual_vector_quantizer):
        tables = [layer.codebook.embed for layer in part.layers[:count]]
        count -= len(tables)
        projection = None if part.input_proj is None else part.input_proj.weight.detach()[..., 0].t().contiguous()
        yield partial(_project, projection), [(table, table.pow(2).sum(1)) for table in tables]


def _project(projection: Tensor | None, latents: Tensor) -> Tensor:
    return latents if projection is None else latents @ projection


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> MimiCodec:
    """Load `mimi` from a folder in the hub's format or the hub's cache (`Codec` loader; see `load_codec`)."""
    source = weights or "kyutai/mimi"
    model = load_pretrained(name, transformers.MimiModel, source)
    config = model.config
    if config.sampling_rate != 24_000 or not config.use_causal_conv or config.audio_channels != 1:
        raise UserError(f"{source}: {config.sampling_rate} Hz Mimi, {name} is causal, mono, at 24000 Hz")
    kept = keep_codebooks(name, num_codebooks, DEFAULT_CODEBOOKS, config.num_quantizers)
    card = make_card(name, weights or name, model, kept, device)
    return MimiCodec(model, card, device, lanes=CUDA_LANES if torch.device(device).type == "cuda" else 1)


def make_card(name: str, weights: str, model: Any, num_codebooks: int, device: str) -> CodecCard:
    """Build the card of a MimiModel."""
    config = model.config
    return CodecCard(
        name=name,
        weights=weights,
        weights_sha256=state_sha256(model),
        sample_rate=config.sampling_rate,
        hop_length=config.frame_size,
        codebook_sizes=(config.codebook_size,) * num_codebooks,
        codes_per_frame=(1,) * num_codebooks,
        latent_dim=config.hidden_size,
        policies=policies(
            f"{CHUNK_FRAMES} frames, carried convolution inputs, keys and values",
            device,
            attention=f"{config.sliding_window} positions",
            loudness="none",
        ),
        versions=versions("torch", "transformers", "soxr"),
    )
