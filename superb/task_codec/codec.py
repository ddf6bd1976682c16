"""Task codec: the result of `codecssl-superb task-codec` behind the `Codec` protocol.

The base codec encodes a wave, the pretrained model turns its codes into the state of a layer, and a small residual
quantizer encodes that state below 200 bit/s. The codes hold what the model's later layers and the task's head need.
They cannot be decoded to audio.

Attention reads its whole input, and any padding or cut therefore changes codes. The policy is that of X-codec. A wave
of up to `WHOLE_SECONDS` is encoded whole and alone. From a longer wave, segments of `SEGMENT_SECONDS` are encoded
separately while more than `WHOLE_SECONDS` remain.

The package registers this codec with `codecssl.tokenize` through the entry point `machine` (`entry_point.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from codecssl.superb.task_codec.codec_folder import QuantisedModel
from codecssl.superb.task_codec.codec_folder import load as load_folder
from codecssl.tokenize.backends.parts.card_fields import versions
from codecssl.tokenize.backends.parts.chunked_stream import ChunkedStream
from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.codec import Codec, CodecCard, Encoded, keep_codebooks
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.hashing import file_sha256
from codecssl.tokenize.registry import load_codec_for

WHOLE_SECONDS, SEGMENT_SECONDS = 30, 20


class TaskCodec:
    """A base codec and a `QuantisedModel` as a `Codec`."""

    def __init__(self, base: Codec, quantised: QuantisedModel, card: CodecCard, device: str = "cpu") -> None:
        self.base, self.card, self.device = base, card, torch.device(device)
        self.quantised = quantised.to(device)
        frames = card.frame_rate  # of codes; segment bounds are whole frames of codes
        self.whole = int(WHOLE_SECONDS * frames) * quantised.pool
        self.segment = max(1, int(SEGMENT_SECONDS * frames)) * quantised.pool

    def encode(self, waves: Sequence[Tensor]) -> list[Encoded]:
        return [Encoded(torch.cat(list(self._pieces(base.codes)), dim=1)) for base in self.base.encode(waves)]

    def _pieces(self, base: Tensor) -> Iterator[Tensor]:
        """Base codes [R, T] of a whole wave -> codes [K, t] of each segment."""
        while base.shape[1] > self.whole:
            yield self.quantise(base[:, : self.segment])
            base = base[:, self.segment :]
        yield self.quantise(base)

    def quantise(self, base: Tensor) -> Tensor:
        """Base codes [R, T] of one segment -> codes [K, ceil(T / pool)]."""
        if base.shape[1] == 0:
            return torch.zeros(self.card.num_codebooks, 0, dtype=torch.int64, device=self.device)
        with full_precision():
            codes = self.quantised.codes(base.to(self.device))
        return codes[: self.card.num_codebooks]

    def stream(self) -> TaskCodecStream:
        return TaskCodecStream(self)

    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        raise UserError(
            f"{self.card.weights}: the codes of a task codec cannot be decoded to audio; decode the base codec's"
        )

    def embeddings(self) -> list[Tensor]:
        books = list(self.quantised.bottleneck.rvq.books)[: self.card.num_codebooks]
        return [book.up(book.entries).detach().cpu().clone() for book in books]

    def latents(self, codes: Tensor) -> Tensor:
        with full_precision():
            return self.quantised.bottleneck.rvq.dequantise(codes[None].to(self.device))[0].T


class TaskCodecStream(ChunkedStream):
    """Streaming encoder of one wave. It buffers the base codec's codes [R, T], not samples."""

    codec: TaskCodec

    def __init__(self, codec: TaskCodec) -> None:
        super().__init__(codec, chunk=codec.segment, needed=codec.whole + 1)
        self.base = codec.base.stream()

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64

    def push(self, wave: Tensor) -> Tensor:
        return super().push(self.base.push(wave))

    def finish(self) -> Tensor:
        return torch.cat([super().push(self.base.finish()), super().finish()], dim=1)

    def encode_chunk(self, audio: Tensor, last: bool) -> Tensor:
        return self.codec.quantise(audio)


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> TaskCodec:
    """Load `machine` from the folder that `codecssl-superb task-codec` wrote (`Codec` loader; see `load_codec`)."""
    if weights is None:
        raise UserError(
            f"codec {name}: has no weights of its own; give the folder that codecssl-superb task-codec wrote"
        )
    folder = Path(weights)
    quantised = load_folder(folder)
    base = load_codec_for(quantised.model.card, device=device)
    available = quantised.bottleneck.rvq.config.num_codebooks
    kept = keep_codebooks(name, num_codebooks, available, available)
    return TaskCodec(base, quantised, make_card(name, folder, quantised, kept, device), device)


def make_card(name: str, folder: Path, quantised: QuantisedModel, num_codebooks: int, device: str) -> CodecCard:
    """Codec card of a quantised model that keeps `num_codebooks` codebooks."""
    base: CodecCard = quantised.model.card
    config = quantised.bottleneck.rvq.config
    kept = {key: base.policies[key] for key in ("channels", "resample", "padding") if key in base.policies}
    return CodecCard(
        name=name,
        weights=str(folder.resolve()),
        weights_sha256=file_sha256(folder / "model.safetensors"),
        sample_rate=base.sample_rate,
        hop_length=base.hop_length * quantised.pool,
        codebook_sizes=(config.codebook_size,) * num_codebooks,
        codes_per_frame=(1,) * num_codebooks,
        latent_dim=quantised.model.config.dim,
        channels=base.channels,
        policies=kept
        | {
            "base": f"{base.name} {base.weights_sha256[:16]}, {base.num_codebooks} codebooks",
            "layer": str(quantised.layer),
            "chunk": f"up to {WHOLE_SECONDS} s whole; of more, segments of {SEGMENT_SECONDS} s, each for itself",
            "precision": "float32",
            "device": torch.device(device).type,
        },
        versions={**versions("torch"), **base.versions},
    )
