"""EnCodec at 48 kHz (Defossez et al. 2022): stereo, not causal, in segments of 1 s that overlap by 480 samples.

Each segment is divided by its own volume and encoded independently. The last segments are shorter. They are never
padded, because every layer normalizes over the segment. A wave's codes are the concatenated codes of its segments.

On a CPU, memory traffic and reading the LSTM's weights at each step dominate the time. The layers before the LSTM
therefore process one segment in blocks that fit the cache (encodec_48khz_layers.py). The LSTM processes several
segments of a wave at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from encodec.model import EncodecModel
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.encodec_48khz_layers import Layers, layers_of
from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.chunked_stream import ChunkedStream
from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.backends.parts.weights import fill, load_pretrained, state_sha256, th_file
from codecssl.tokenize.codec import CodecCard, Encoded, keep_codebooks
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.hashing import file_sha256

DEFAULT_CODEBOOKS = 8
"""Default number of codebooks: 12 kbps."""
GROUP = 8
"""Segments of a wave per LSTM batch on a CPU."""
CUDA_GROUP = 32
"""Segments, from any waves, per GPU batch. The shape is fixed, so no segment depends on the others."""

Scaled = tuple[Tensor, Tensor]
"""Codes [K, t] and scale [1] float32 of a segment."""


@dataclass(frozen=True, kw_only=True)
class Net48:
    """The required parts of an EnCodec network, independent of the library that built it."""

    layers: Sequence[Any]
    """Layers of the encoder, in order."""
    codebooks: Tensor
    """Codebooks [K, V, D] float32."""
    decoder: nn.Module
    encode_segment: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    """The library's own encoder: a segment [1, 2, n] and K to codes [1, K, t] and scale [1, 1]."""
    sample_rate: int
    hop_length: int
    segment_samples: int
    segment_stride: int


class Encodec48Codec:
    """EnCodec 48 kHz as a `Codec`. Its waves have shape [2, n]."""

    def __init__(self, net: Net48, card: CodecCard, device: str = "cpu", *, pooled: bool = False) -> None:
        self.net, self.card, self.device = net, card, torch.device(device)
        self.pooled, self.group = pooled, CUDA_GROUP if pooled else GROUP
        for layer in net.layers:
            layer.to(device)
        split = next(i for i, layer in enumerate(net.layers) if hasattr(layer, "lstm"))
        self.before, self.after = layers_of(net.layers[:split]), layers_of(net.layers[split + 1 :])
        self.lstm: nn.LSTM = net.layers[split].lstm
        self.decoder = net.decoder.to(device)
        self.codebooks = net.codebooks[: card.num_codebooks].to(device)
        self.squared_norms = self.codebooks.pow(2).sum(2)

    def stream(self) -> Encodec48Stream:
        return Encodec48Stream(self)

    @full_precision()
    def encode(self, waves: Sequence[Tensor]) -> list[Encoded]:
        """See `Codec`. Each result also holds one scale per segment."""
        cut = [self.segments_of(wave.to(self.device)) for wave in waves]
        if not self.pooled:
            return [joined(self.encode_segments(segments)) for segments in cut]
        found = iter(self.encode_segments([segment for segments in cut for segment in segments]))
        return [joined([next(found) for _ in segments]) for segments in cut]

    def segments_of(self, wave: Tensor) -> list[Tensor]:
        """Split a wave [2, n] into segments. Segments at the end are shorter."""
        return [wave[:, start:stop] for start, stop in self._bounds(wave.shape[1])]

    def _bounds(self, samples: int) -> list[tuple[int, int]]:
        starts = range(0, samples, self.net.segment_stride)
        return [(start, min(start + self.net.segment_samples, samples)) for start in starts]

    def encode_segments(self, segments: Sequence[Tensor]) -> list[Scaled]:
        """Encode segments [2, n]. Return the codes [K, t] and the scale [1] of each."""
        found = []
        for at in range(0, len(segments), self.group):
            found += self._encode_group(segments[at : at + self.group])
        return found

    def _encode_group(self, segments: Sequence[Tensor]) -> list[Scaled]:
        scales = [1e-8 + segment.mean(0).square().mean().sqrt() for segment in segments]
        latents = self.latents_of([segment / scale for segment, scale in zip(segments, scales)])
        return [(self.quantize(z), scale[None]) for z, scale in zip(latents, scales)]

    def latents_of(self, segments: Sequence[Tensor]) -> list[Tensor]:
        """Compute the quantizer's input [t, D] for up to `group` segments [2, n] of unit volume."""
        inputs = [segment.t().contiguous() for segment in segments]
        hidden = self._recur(self._each(self.before, inputs, self.net.segment_samples))
        return self._each(self.after, hidden, self.segment_frames)

    def _each(self, layers: Layers, inputs: Sequence[Tensor], whole: int) -> list[Tensor]:
        """Apply layers to each [T, C] alone. If pooled, those of length `whole` form one batch of fixed size."""
        pooled = [i for i, x in enumerate(inputs) if self.pooled and len(x) == whole]
        outputs: dict[int, Tensor] = {}
        if pooled:
            batch = F.pad(torch.stack([inputs[i] for i in pooled]), (0, 0, 0, 0, 0, self.group - len(pooled)))
            outputs = dict(zip(pooled, layers(batch)))
        return [outputs[i] if i in outputs else layers(x[None])[0] for i, x in enumerate(inputs)]

    def _recur(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Run the LSTM over segments [t, C] together. It is causal, so zeros after a shorter segment change nothing."""
        steps = self.segment_frames if self.pooled else max(len(h) for h in hidden)
        inputs = hidden[0].new_zeros(steps, self.group if self.pooled else len(hidden), hidden[0].shape[1])
        for row, h in enumerate(hidden):
            inputs[: len(h), row] = h
        outputs = self.lstm(inputs)[0].add_(inputs)
        return [outputs[: len(h), row] for row, h in enumerate(hidden)]

    def quantize(self, latents: Tensor) -> Tensor:
        """Quantize latents [T, D] to codes [K, T]: each codebook's nearest entry to the residual of those before it."""
        residual, codes = latents, []
        for table, squared in zip(self.codebooks, self.squared_norms):
            index = torch.addmm(squared, residual, table.t(), alpha=-2).argmin(dim=1)
            residual = residual - F.embedding(index, table)
            codes.append(index)
        return torch.stack(codes)

    @full_precision()
    def encode_reference(self, wave: Tensor) -> Tensor:
        """Encode the segments one after another with the library's own encoder."""
        segments = self.segments_of(wave.to(self.device))
        found = [self.net.encode_segment(segment[None], self.card.num_codebooks)[0][0] for segment in segments]
        return torch.cat(found, dim=1)

    @full_precision()
    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """Decode codes [K, T] and segment scales [S] to a wave [2, n], with linear fades where segments overlap.

        n is (S - 1) * stride + the last segment's frames * hop. Without scales, each segment has unit volume.
        Raises UserError if no wave has T frames, or if the number of scales differs from the number of segments.
        """
        lengths = self._segment_frames_of(codes.shape[1])
        factors = [1.0] * len(lengths) if scales is None else scales.to(self.device)
        if len(factors) != len(lengths):
            raise UserError(f"{len(factors)} scales for {codes.shape[1]} frames, which are {len(lengths)} segments")
        latents = self.latents(codes).split(lengths, dim=1)
        waves = [self.decoder(z[None])[0] * factor for z, factor in zip(latents, factors)]
        return overlap_add(waves, self.net.segment_stride)

    @property
    def segment_frames(self) -> int:
        """Frames of a whole segment."""
        return -(-self.net.segment_samples // self.net.hop_length)

    def _segment_frames_of(self, frames: int) -> list[int]:
        """Frames of each segment of a wave with `frames` frames in all. The total determines the split."""
        lengths = range(1, frames * self.net.hop_length + 1)
        at = bisect_left(lengths, frames, key=self.card.frames_of)
        if at == len(lengths) or self.card.frames_of(lengths[at]) != frames:
            raise UserError(f"{frames} frames: no wave has that many; give the codes of a whole wave")
        return [-(-(stop - start) // self.net.hop_length) for start, stop in self._bounds(lengths[at])]

    def embeddings(self) -> list[Tensor]:
        return [table.cpu().clone() for table in self.codebooks]

    @torch.inference_mode()
    def latents(self, codes: Tensor) -> Tensor:
        rows = [F.embedding(c, table) for c, table in zip(codes.to(self.device), self.codebooks)]
        return reduce(torch.add, rows).t()


class Encodec48Stream(ChunkedStream):
    """Streaming encoder of one wave [2, n]. It encodes a group of whole segments at a time."""

    codec: Encodec48Codec

    def __init__(self, codec: Encodec48Codec) -> None:
        stride = codec.net.segment_stride
        super().__init__(codec, chunk=codec.group * stride, size=(codec.group - 1) * stride + codec.net.segment_samples)
        self._scales: list[Tensor] = []

    @full_precision()
    def encode_chunk(self, audio: Tensor, last: bool) -> Tensor:
        segments = self.codec.segments_of(audio)
        found = self.codec.encode_segments(segments if last else segments[: self.codec.group])
        self._scales += [scale for _, scale in found]
        return torch.cat([codes for codes, _ in found], dim=1)

    @property
    def scales(self) -> Tensor:
        """Scales float32 [S], one per segment encoded so far."""
        return torch.cat(self._scales) if self._scales else torch.zeros(0, device=self.device)


def joined(found: Sequence[Scaled]) -> Encoded:
    """Join the codes and scales of a wave's segments."""
    return Encoded(torch.cat([codes for codes, _ in found], dim=1), torch.cat([scale for _, scale in found]))


def overlap_add(waves: Sequence[Tensor], stride: int) -> Tensor:
    """Overlap-add waves [C, n] that start `stride` apart. Return [C, N].

    Each wave is weighted by a triangle over the length of the first one. This is the sum of the encodec package, which
    fails where the last wave ends before the previous one.
    """
    place = torch.linspace(0, 1, waves[0].shape[1] + 2, dtype=waves[0].dtype, device=waves[0].device)[1:-1]
    triangle = 0.5 - (place - 0.5).abs()
    samples = max(i * stride + wave.shape[1] for i, wave in enumerate(waves))
    out, weight = waves[0].new_zeros(len(waves[0]), samples), waves[0].new_zeros(samples)
    for i, wave in enumerate(waves):
        span = slice(i * stride, i * stride + wave.shape[1])
        out[:, span] += triangle[: wave.shape[1]] * wave
        weight[span] += triangle[: wave.shape[1]]
    return out / weight


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> Encodec48Codec:
    """Load `encodec_48khz` (`Codec` loader; see `load_codec`)."""
    net, digest = _load(name, weights)
    kept = keep_codebooks(name, num_codebooks, DEFAULT_CODEBOOKS, len(net.codebooks))
    card = make_card(name, weights or name, digest, net, kept, device)
    return Encodec48Codec(net, card, device, pooled=torch.device(device).type == "cuda")


def make_card(name: str, weights: str, digest: str, net: Net48, num_codebooks: int, device: str) -> CodecCard:
    """Build the card of a segment-wise EnCodec network."""
    return CodecCard(
        name=name,
        weights=weights,
        weights_sha256=digest,
        sample_rate=net.sample_rate,
        hop_length=net.hop_length,
        codebook_sizes=(net.codebooks.shape[1],) * num_codebooks,
        codes_per_frame=(1,) * num_codebooks,
        latent_dim=net.codebooks.shape[2],
        channels=2,
        segment_samples=net.segment_samples,
        segment_stride=net.segment_stride,
        policies=policies(
            f"segments of {net.segment_samples} samples from each {net.segment_stride}th, each for itself",
            device,
            channels="stereo, mono twice",
            padding="none",
            loudness="each segment divided by its volume",
        ),
        versions=versions("torch", "encodec", "soxr"),
    )


def from_encodec(model: Any) -> Net48:
    """Take the parts of an `encodec.EncodecModel`."""

    def encode_segment(segment: Tensor, count: int) -> Scaled:
        # half a codebook more: the library rounds down
        model.bandwidth = (count + 0.5) * model.quantizer.get_bandwidth_per_quantizer(model.frame_rate)
        return model._encode_frame(segment)  # type: ignore[no-any-return]

    return Net48(
        layers=list(model.encoder.model),
        codebooks=torch.stack([layer.codebook for layer in model.quantizer.vq.layers]).detach(),
        decoder=model.decoder,
        encode_segment=encode_segment,
        sample_rate=model.sample_rate,
        hop_length=int(model.encoder.hop_length),
        segment_samples=model.segment_length,
        segment_stride=model.segment_stride,
    )


def from_transformers(model: Any) -> Net48:
    """Take the parts of a `transformers.EncodecModel`."""
    config = model.config

    def encode_segment(segment: Tensor, count: int) -> Scaled:
        bits = (config.codebook_size - 1).bit_length()
        bandwidth = (count + 0.5) * bits * config.frame_rate / 1000  # half a codebook more: the library rounds down
        return model._encode_frame(segment, bandwidth)  # type: ignore[no-any-return]

    return Net48(
        layers=list(model.encoder.layers),
        codebooks=torch.stack([layer.codebook.embed for layer in model.quantizer.layers]).detach(),
        decoder=model.decoder,
        encode_segment=encode_segment,
        sample_rate=config.sampling_rate,
        hop_length=int(config.hop_length),
        segment_samples=config.chunk_length,
        segment_stride=config.chunk_stride,
    )


def _load(name: str, weights: str | None) -> tuple[Net48, str]:
    """Load from a folder in the hub's format, from the package's .th file, or from their caches."""
    if path := th_file(weights, "encodec_48khz-7e698e3e.th"):
        return _load_th(path)
    import transformers

    source = weights or "facebook/encodec_48khz"
    model = load_pretrained(name, transformers.EncodecModel, source)
    config = model.config
    if config.sampling_rate != 48_000 or config.audio_channels != 2 or config.norm_type != "time_group_norm":
        raise UserError(
            f"{source}: {config.sampling_rate} Hz EnCodec with {config.audio_channels} channel(s), {name} is stereo at "
            "48000 Hz with group norm"
        )
    return from_transformers(model), state_sha256(model)


def _load_th(path: Path) -> tuple[Net48, str]:
    model = EncodecModel.encodec_model_48khz(pretrained=False)
    fill(model, path, "encodec_48khz")
    return from_encodec(model.requires_grad_(False)), file_sha256(path)
