"""Exact piecewise computation of non-causal convolutional encoders (DAC, SNAC) in bounded memory.

Each layer keeps the inputs that its next outputs need and returns the outputs that are final. It pads with zeros only
where the wave begins and ends, as each layer of the reference does. No frame is computed twice, and no wave depends on
another's padding.

Activations are rows [n, C] in time order. A depthwise convolution is a sum of shifted rows; any other convolution is a
few matrix products of them. On one CPU thread, both are faster than torch's convolutions if a piece fits the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from codecssl.tokenize.backends.parts.chunked_stream import ChunkedStream
from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.codec import CodecCard

ConvState = dict[Any, Tensor]
"""State that each layer keeps of a wave between two pieces."""


class Snake:
    """x + sin(a x)^2 / a, a per channel (Ziyin et al. 2020)."""

    def __init__(self, module: Any) -> None:
        self.alpha = module.alpha.detach().flatten()
        self.inverse = (self.alpha + 1e-9).reciprocal()

    def __call__(self, rows: Tensor, out: Tensor) -> Tensor:
        sine = torch.mul(rows, self.alpha).sin_()
        return torch.addcmul(rows, sine.mul_(sine), self.inverse, out=out)


class StreamingConvolution:
    """A Conv1d, depthwise or not, optionally after a Snake. The stride must divide the kernel."""

    def __init__(self, module: Any, snake: Snake | None = None) -> None:
        self.snake, self.bias = snake, module.bias.detach()
        weight = module.weight.detach()  # [O, I, k]
        self.stride, self.dilation, self.left = module.stride[0], module.dilation[0], module.padding[0]
        self.span = (weight.shape[2] - 1) * self.dilation + 1
        self.right = self.span - self.stride - self.left
        self.depthwise = module.groups > 1
        self.width = weight.shape[2] if module.in_channels == 1 else self.stride
        """Samples per tap: the whole kernel for one channel, else a stride."""
        taps = weight.unflatten(2, (-1, 1 if self.depthwise else self.width))
        self.taps = taps.permute(2, 3, 1, 0).flatten(1, 2).contiguous()  # [taps, width * I, O]

    def push(self, rows: Tensor, kept: ConvState, last: bool) -> Tensor:
        """Append inputs and return the outputs that are now final. `last`: the wave ends with these inputs."""
        before = kept[self] if self in kept else rows.new_zeros(self.left, rows.shape[1])
        start, end = len(before), len(before) + len(rows)
        inputs = rows.new_empty(end + self.right * last, rows.shape[1])
        inputs[:start] = before
        if self.snake is None:
            inputs[start:end] = rows
        else:
            self.snake(rows, out=inputs[start:end])
        inputs[end:] = 0
        count = max(0, (len(inputs) - self.span) // self.stride + 1)
        kept[self] = inputs[count * self.stride :].clone()
        return self._depthwise(inputs, count) if self.depthwise else self._product(inputs, count)

    def _depthwise(self, inputs: Tensor, count: int) -> Tensor:
        outputs = torch.addcmul(self.bias, inputs[:count], self.taps[0])
        for i, tap in enumerate(self.taps[1:], start=1):
            outputs.addcmul_(inputs[i * self.dilation : i * self.dilation + count], tap)
        return outputs

    def _product(self, inputs: Tensor, count: int) -> Tensor:
        if inputs.shape[1] == 1:
            groups = inputs.flatten().unfold(0, self.width, self.stride).contiguous()
        else:
            whole = len(inputs) // self.stride
            groups = inputs[: whole * self.stride].view(whole, self.stride * inputs.shape[1])
        outputs = torch.addmm(self.bias, groups[:count], self.taps[0])
        for i, tap in enumerate(self.taps[1:], start=1):
            outputs.addmm_(groups[i * self.dilation : i * self.dilation + count], tap)
        return outputs


class ResidualUnit:
    """A residual unit: rows plus Snake, convolution, Snake, convolution of width 1."""

    def __init__(self, first: Any, wide: Any, second: Any, narrow: Any) -> None:
        self.wide, self.snake = StreamingConvolution(wide, Snake(first)), Snake(second)
        self.weight, self.bias = narrow.weight.detach()[..., 0].t().contiguous(), narrow.bias.detach()

    def push(self, rows: Tensor, kept: ConvState, last: bool) -> Tensor:
        hidden = self.wide.push(rows, kept, last)
        self.snake(hidden, out=hidden)
        before = kept.get(self, rows[:0])  # pending inputs, bias included, until their `hidden` is final
        inputs = rows.new_empty(len(before) + len(rows), rows.shape[1])
        inputs[: len(before)] = before
        torch.add(rows, self.bias, out=inputs[len(before) :])
        kept[self] = inputs[len(hidden) :].clone()
        return inputs[: len(hidden)].addmm_(hidden, self.weight)


Layer = StreamingConvolution | ResidualUnit


# ---------------------------------------------------------------- a wave


class Pace(NamedTuple):
    """Numbers of frames that pass the network at once."""

    piece: int
    """Frames per step of the first layers, where activations are large."""
    chunk: int
    """Frames per step of the last layers, where weights are large."""


class RowEncoder(Protocol):
    """An encoder of layers of this module."""

    card: CodecCard
    front: list[Layer]
    back: list[Layer]
    pace: Pace


class RowCodec(RowEncoder, Protocol):
    """A codec whose encoder consists of layers of this module."""

    device: torch.device
    dtype: torch.dtype

    def quantize(self, latents: Tensor) -> Tensor: ...


class RowStream(ChunkedStream):
    """Streaming encoder of one wave, a chunk at a time. The last chunk, whole or not, is left for `finish`."""

    codec: RowCodec

    def __init__(self, codec: RowCodec) -> None:
        chunk = codec.pace.chunk * codec.card.hop_length
        super().__init__(codec, chunk=chunk, needed=chunk + 1)
        self.kept: ConvState = {}

    def quantize(self, latents: Tensor) -> Tensor:
        """Quantize the next latents [n, D] to codes [R, T]."""
        return self.codec.quantize(latents)

    @full_precision()
    def encode_chunk(self, audio: Tensor, last: bool) -> Tensor:
        codes = self.quantize(encode_rows(self.codec, audio, self.kept, last))
        if last:
            self.kept = {}
        return codes


def encode_rows(encoder: RowEncoder, audio: Tensor, kept: ConvState, last: bool) -> Tensor:
    """Compute the latents [T, D] that the next samples [n] complete, zero-padded to whole frames."""
    hop = encoder.card.hop_length
    *pieces, end = F.pad(audio, (0, -len(audio) % hop))[:, None].split(encoder.pace.piece * hop)
    fronts = [_through(encoder.front, piece, kept, False) for piece in pieces]
    fronts.append(_through(encoder.front, end, kept, last))
    return _through(encoder.back, torch.cat(fronts), kept, last)


def _through(layers: Sequence[Layer], rows: Tensor, kept: ConvState, last: bool) -> Tensor:
    for layer in layers:
        rows = layer.push(rows, kept, last)
    return rows
