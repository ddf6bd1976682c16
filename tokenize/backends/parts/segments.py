"""Codecs whose network must see a wave at once: no padding and no cut leaves their codes unchanged.

Such a network attends to its whole input, normalizes over it, or reads it in both directions. A wave of up to
`whole_seconds` is encoded whole and alone. A longer wave is cut into segments of `segment_seconds` while more than
`whole_seconds` remain, and each segment is encoded independently. The last segment is therefore never short, memory is
bounded, and a wave's codes depend neither on its batch nor on how it is pushed into a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from codecssl.tokenize.backends.parts.chunked_stream import ChunkedStream
from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.codec import CodecCard, Encoded, encode_each

WHOLE_SECONDS, SEGMENT_SECONDS = 30, 20


def chunk_policy(whole_seconds: int = WHOLE_SECONDS, segment_seconds: int = SEGMENT_SECONDS) -> str:
    """Return the text of `CodecCard.policies["chunk"]`. It is part of a card's fingerprint: do not reword it."""
    return f"up to {whole_seconds} s whole; of more, segments of {segment_seconds} s, each for itself"


class SegmentStream(ChunkedStream):
    """Streaming encoder of one wave. It encodes a segment at a time while more than `whole_seconds` remain.

    The codec implements `encode_segment(audio [n]) -> codes [R, T]`.
    """

    def __init__(self, codec: Any, whole_seconds: int, segment_seconds: int) -> None:
        whole, segment = (seconds * codec.card.sample_rate for seconds in (whole_seconds, segment_seconds))
        super().__init__(codec, chunk=segment, needed=whole + 1)

    def encode_chunk(self, audio: Tensor, last: bool) -> Tensor:
        codes: Tensor = self.codec.encode_segment(audio)
        return codes


class Quantizer(Protocol):
    """Map latents to codes and back, see `parts/residual_vq.py`."""

    def quantize(self, latents: Tensor) -> Tensor:
        """Quantize latents [D, T] to codes [R, T]."""

    def dequantize(self, codes: Tensor) -> Tensor:
        """Convert codes [R, T] to latents [D, T]."""

    def embeddings(self) -> list[Tensor]:
        """See `Codec.embeddings`."""


class SegmentCodec:
    """Base class of codecs that encode a wave whole or in independent segments.

    Subclasses implement `encode_latents` and, if they decode, `decode_latents`.
    """

    whole_seconds, segment_seconds = WHOLE_SECONDS, SEGMENT_SECONDS

    def __init__(self, network: nn.Module, quantizer: Quantizer, card: CodecCard, device: str = "cpu") -> None:
        """network: all layers. quantizer: the codebooks that the card keeps, on `device`."""
        self.network = network.to(device).eval().requires_grad_(False)
        self.card, self.device = card, torch.device(device)
        self.dtype: torch.dtype = next(network.parameters()).dtype
        self.quantizer = quantizer

    def stream(self) -> SegmentStream:
        return SegmentStream(self, self.whole_seconds, self.segment_seconds)

    def encode(self, waves: Sequence[Tensor]) -> list[Encoded]:
        return encode_each(self, waves)

    def encode_latents(self, audio: Tensor) -> Tensor:
        """Compute the quantizer's input [D, T] for one segment or a whole wave [n]."""
        raise NotImplementedError

    @full_precision()
    def encode_segment(self, audio: Tensor) -> Tensor:
        """Encode one segment or a whole wave [n] to codes [R, T]."""
        return self.quantizer.quantize(self.encode_latents(audio.to(self.device, self.dtype)))

    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """Decode the whole utterance at once: memory grows with its length."""
        if codes.shape[1] == 0:
            return torch.zeros(0, device=self.device)
        with full_precision():
            return self.decode_latents(self.latents(codes))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents [D, T] to a wave [T * hop]."""
        raise NotImplementedError

    def embeddings(self) -> list[Tensor]:
        return self.quantizer.embeddings()

    def latents(self, codes: Tensor) -> Tensor:
        with full_precision():
            return self.quantizer.dequantize(codes.to(self.device))
