"""EnCodec and similar codecs: causal SEANet encoders with an LSTM and a residual vector quantizer.

Every wave is encoded in short pieces of the same size, and each layer carries its state from piece to piece
(parts/seanet.py). The result is exact for any number of waves at once, and memory is bounded
(tests/tokenize/backends/test_encodec.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.chunked_stream import ChunkedStream
from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.backends.parts.seanet import SeanetDecoder, SeanetEncoder
from codecssl.tokenize.backends.parts.seanet_layers import Lane
from codecssl.tokenize.backends.parts.seanet_short import MAX_FRAMES, ShortEncoder
from codecssl.tokenize.backends.parts.weights import fill, load_pretrained, state_sha256, th_file
from codecssl.tokenize.codec import CodecCard, Encoded, keep_codebooks
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.hashing import file_sha256

DEFAULT_CODEBOOKS = 8
"""Default number of codebooks: 6 kbps."""
FINE_FRAMES = {"cpu": 16, "cuda": 128}
"""Frames per step of the first layers, which run at high rates: they fit a CPU's cache. A GPU takes more."""
PIECE_FRAMES = {"cpu": 32, "cuda": 128}
"""Frames per step of all other layers, a multiple of the above. It amortizes reading their weights."""
SHARED_SECONDS = 30
"""Seconds after which a wave's LSTM runs alone. Such a wave is a long file that is encoded by itself."""
QUANTIZER_ROWS = {"cpu": 32, "cuda": 1024}
"""Frames per quantizer product. The size is fixed, so no frame's code depends on other frames."""


@dataclass(frozen=True, kw_only=True)
class Seanet:
    """The required parts of an EnCodec network, independent of the library that built it."""

    encoder: Sequence[nn.Module]
    """The encoder's layers in order."""
    decoder: Sequence[nn.Module]
    quantizer: nn.Module
    quantize_reference: Callable[[Tensor, int], Tensor]
    """Function that quantizes latents [1, D, T] with K codebooks to codes [K, 1, T]."""
    codebooks: Tensor
    """Codebooks [K, V, D] float32."""
    sample_rate: int
    hop_length: int


class EncodecCodec:
    """A causal EnCodec network as a `Codec`."""

    def __init__(self, net: Seanet, card: CodecCard, device: str = "cpu") -> None:
        self.net, self.card, self.device = net, card, torch.device(device)
        frames = PIECE_FRAMES[self.device.type]
        for layer in (*net.encoder, *net.decoder, net.quantizer):
            layer.to(self.device).eval()
        self.encoder = SeanetEncoder(
            net.encoder,
            net.hop_length,
            fine_frames=FINE_FRAMES[self.device.type],
            piece_frames=frames,
            shared_pieces=SHARED_SECONDS * net.sample_rate // (frames * net.hop_length),
        )
        self.short = ShortEncoder(net.encoder, self.encoder, net.hop_length) if self.device.type == "cpu" else None
        self.decoder = SeanetDecoder(net.decoder, net.codebooks.shape[2], frames)
        self.codebooks = net.codebooks[: card.num_codebooks].to(self.device)
        # |r - e|^2 / 2 = |r|^2 / 2 - (r e - |e|^2 / 2): the nearest entry has the largest score r e - |e|^2 / 2
        self._directions = self.codebooks.transpose(1, 2).contiguous()
        self._offsets = self.codebooks.pow(2).sum(2) / -2

    def stream(self) -> EncodecStream:
        return EncodecStream(self)

    @full_precision()
    def encode(self, waves: Sequence[Tensor]) -> list[Encoded]:
        """See `Codec`. Waves are encoded in parallel, the longest first. When one ends, the next takes its lane."""
        size = self.encoder.piece_samples
        codes = [[torch.zeros(self.card.num_codebooks, 0, dtype=torch.int64, device=self.device)] for _ in waves]
        short = self._encode_short(waves)
        for i, found in short.items():
            codes[i].append(found)
        waiting = [i for i, wave in enumerate(waves) if len(wave) and i not in short]
        waiting.sort(key=lambda i: len(waves[i]))
        longest = max((len(waves[i]) for i in waiting), default=0)
        # limit the lanes to those that end together with the longest wave: otherwise the last waves would run alone
        count = min(self.encoder.widths[-1], -(-sum(len(waves[i]) for i in waiting) // max(1, longest)))
        running: dict[int, tuple[Lane, list[Tensor]]] = {}
        while waiting or running:
            while waiting and len(running) < count:
                i = waiting.pop()
                pieces = list(waves[i].to(self.device).split(size))
                running[i] = self.first_lane(pieces[0]), pieces[::-1]
            pieces_now = [left.pop() for _, left in running.values()]
            for i, piece_codes in zip(running, self.advance([lane for lane, _ in running.values()], pieces_now)):
                codes[i].append(piece_codes)
            running = {i: (lane, left) for i, (lane, left) in running.items() if left}
        return [Encoded(torch.cat(found, 1)) for found in codes]

    def _encode_short(self, waves: Sequence[Tensor]) -> dict[int, Tensor]:
        """Encode the waves of few frames, by their position in `waves`. Waves of equal length run together."""
        lengths: dict[int, list[int]] = {}
        for i, wave in enumerate(waves):
            frames = -(-len(wave) // self.net.hop_length)
            if self.short is not None and 0 < frames <= MAX_FRAMES and self._rows_agree and self.short.runs(frames):
                lengths.setdefault(frames, []).append(i)
        latents: list[Tensor] = []
        order: list[tuple[int, int]] = []
        for frames, group in lengths.items():
            for start in range(0, len(group), width := self.encoder.widths[-1]):
                some = group[start : start + width]
                latents.append(self.short([waves[i].to(self.device) for i in some], frames).flatten(0, 1))  # type: ignore[misc]
                order += [(i, frames) for i in some]
        if not order:
            return {}
        codes = self.quantize(torch.cat(latents).t())
        return {i: part for (i, _), part in zip(order, codes.split([frames for _, frames in order], 1))}

    @cached_property
    def _rows_agree(self) -> bool:
        """True if a frame's product with a codebook has the same bits in every row of `quantize`."""
        frame = torch.randn(1, self.codebooks.shape[2], generator=torch.Generator().manual_seed(0))
        rows = frame.to(self.codebooks).repeat(QUANTIZER_ROWS[self.device.type], 1)
        scores = [torch.addmm(o, rows, d) for o, d in zip(self._offsets, self._directions)]
        return all(torch.equal(found, found[:1].expand_as(found)) for found in scores)

    def first_lane(self, piece: Tensor) -> Lane:
        """Return the initial state of a wave that begins with this piece [n]."""
        return Lane(-(-len(piece) // self.net.hop_length))

    def advance(self, lanes: Sequence[Lane], pieces: Sequence[Tensor]) -> list[Tensor]:
        """Encode the next piece of each lane's wave, up to [piece_samples], to codes [K, t] each."""
        latents = self.encoder(lanes, pieces)
        frames = [-(-len(piece) // self.net.hop_length) for piece in pieces]
        if self._rows_agree:  # then frames after the end of a wave need no row
            valid = torch.cat([rows[:count] for rows, count in zip(latents, frames)])
            return list(self.quantize(valid.t()).split(frames, 1))
        codes = self.quantize(latents.flatten(0, 1).t()).unflatten(1, (len(lanes), -1))
        return [codes[:, i, :count] for i, count in enumerate(frames)]

    @full_precision()
    def quantize(self, latents: Tensor) -> Tensor:
        """Quantize latents [D, T] to codes [K, T]: each codebook's nearest entry to the residual of those before it."""
        count, rows = latents.shape[1], QUANTIZER_ROWS[self.device.type]
        residual = F.pad(latents, (0, -count % rows)).t().contiguous()
        codes = torch.empty(len(self.codebooks), len(residual), dtype=torch.int64, device=self.device)
        scores = residual.new_empty(rows, self.codebooks.shape[1])
        for table, directions, offsets, row in zip(self.codebooks, self._directions, self._offsets, codes):
            for part, index in zip(residual.split(rows), row.split(rows)):
                torch.addmm(offsets, part, directions, out=scores)
                first_largest(scores, index)
            residual -= F.embedding(row, table)
        return codes[:, :count]

    @full_precision()
    def encode_reference(self, wave: Tensor) -> Tensor:
        """Encode the whole wave, zero-padded to whole frames, with the layers of the library that built the network."""
        padded = F.pad(wave, (0, -len(wave) % self.net.hop_length)).to(self.device)[None, None]
        for layer in self.net.encoder:
            padded = layer(padded)
        return self.net.quantize_reference(padded, self.card.num_codebooks)[:, 0]

    @full_precision()
    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """See `Codec`. Decoding is piecewise: only the output wave grows in memory."""
        size, count = self.decoder.piece_frames, codes.shape[1]
        lane = Lane(count)
        pieces = [
            self.decoder(F.pad(latents, (0, size - latents.shape[1])).t(), lane)
            for latents in (self.latents(part) for part in codes.split(size, 1))
        ]
        return torch.cat(pieces)[: count * self.net.hop_length]

    def embeddings(self) -> list[Tensor]:
        return [table.cpu().clone() for table in self.codebooks]

    @full_precision()
    def latents(self, codes: Tensor) -> Tensor:
        rows = [F.embedding(c, table) for c, table in zip(codes.to(self.device), self.codebooks)]
        return torch.stack(rows).sum(0).t()


def first_largest(scores: Tensor, index: Tensor) -> None:
    """Write the column of the largest value of each row [n, V] to `index` [n] int64, the first one of equal values."""
    if scores.device.type == "cpu":
        np.argmax(scores.numpy(), axis=1, out=index.numpy())  # torch's takes nine times as long
    else:
        torch.max(scores, 1, out=(torch.empty_like(scores[:, 0]), index))


class EncodecStream(ChunkedStream):
    """Streaming encoder of one wave. It uses the same pieces as `EncodecCodec.encode`."""

    codec: EncodecCodec

    def __init__(self, codec: EncodecCodec) -> None:
        super().__init__(codec, chunk=codec.encoder.piece_samples)
        self.lane: Lane | None = None

    @full_precision()
    def encode_chunk(self, audio: Tensor, last: bool) -> Tensor:
        self.lane = self.lane or self.codec.first_lane(audio)
        [codes] = self.codec.advance([self.lane], [audio])
        return codes


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> EncodecCodec:
    """Load `encodec_24khz` (`Codec` loader; see `load_codec`)."""
    net, digest = _load_24khz(weights)
    kept = keep_codebooks(name, num_codebooks, DEFAULT_CODEBOOKS, len(net.codebooks))
    return EncodecCodec(net, make_card(name, weights or name, digest, net, kept, device), device)


def make_card(name: str, weights: str, digest: str, net: Seanet, num_codebooks: int, device: str) -> CodecCard:
    """Build the card of a causal EnCodec network."""
    kind = torch.device(device).type
    return CodecCard(
        name=name,
        weights=weights,
        weights_sha256=digest,
        sample_rate=net.sample_rate,
        hop_length=net.hop_length,
        codebook_sizes=(net.codebooks.shape[1],) * num_codebooks,
        codes_per_frame=(1,) * num_codebooks,
        latent_dim=net.codebooks.shape[2],
        policies=policies(
            f"{PIECE_FRAMES[kind]} frames ({FINE_FRAMES[kind]} at the high rates), all state carried, "
            f"LSTM alone after {SHARED_SECONDS} s",
            device,
        ),
        versions=versions("torch", "encodec", "soxr"),
    )


def from_encodec(model: Any) -> Seanet:
    """Take the parts of an `encodec.EncodecModel`."""
    tables = torch.stack([layer.codebook for layer in model.quantizer.vq.layers])
    return Seanet(
        encoder=list(model.eval().encoder.model),
        decoder=list(model.decoder.model),
        codebooks=tables.detach(),
        quantizer=model.quantizer,
        quantize_reference=lambda latents, count: model.quantizer.vq.encode(latents, n_q=count),
        sample_rate=model.sample_rate,
        hop_length=int(model.encoder.hop_length),
    )


def from_transformers(model: Any) -> Seanet:
    """Take the parts of a `transformers.EncodecModel`."""
    tables = torch.stack([layer.codebook.embed for layer in model.quantizer.layers])
    return Seanet(
        encoder=list(model.eval().encoder.layers),
        decoder=list(model.decoder.layers),
        codebooks=tables.detach(),
        quantizer=model.quantizer,
        # transformers derives the number of codebooks from the rate in kbps, rounded down
        quantize_reference=lambda latents, count: model.quantizer.encode(
            latents, (count + 0.5) * log2(tables.shape[1]) * model.config.frame_rate / 1000
        ),
        sample_rate=model.config.sampling_rate,
        hop_length=int(model.config.hop_length),
    )


def _load_24khz(weights: str | None) -> tuple[Seanet, str]:
    """Load EnCodec 24 kHz from a folder in the hub's format, from the package's .th file, or from their caches."""
    if path := th_file(weights, "encodec_24khz-d7cc33bc.th"):
        return _load_th(path)
    import transformers

    source = weights or "facebook/encodec_24khz"
    model = load_pretrained("encodec_24khz", transformers.EncodecModel, source)
    if model.config.sampling_rate != 24_000 or not model.config.use_causal_conv:
        raise UserError(f"{source}: {model.config.sampling_rate} Hz EnCodec, encodec_24khz is causal at 24000 Hz")
    return from_transformers(model), state_sha256(model)


def _load_th(path: Path) -> tuple[Seanet, str]:
    from encodec.model import EncodecModel

    model = EncodecModel.encodec_model_24khz(pretrained=False)
    fill(model, path, "encodec_24khz")
    return from_encodec(model), file_sha256(path)
