"""EnCodec's encoder for many waves shorter than a piece, several per matrix product.

`seanet.SeanetEncoder` runs its convolutions on one wave at a time, in pieces of a fixed size. A wave of a few frames
then costs as much as a whole piece. Here, waves of equal length lie behind each other in one buffer, each with room for
its padding. A convolution over the whole buffer also computes rows between two waves, which are ignored.

The results are the same bits wherever the order of a product's sums does not depend on its number of rows. That order
does not depend on the values either, so it is tested once per length, on noise (`ShortEncoder.runs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.backends.parts.seanet import SeanetEncoder
from codecssl.tokenize.backends.parts.seanet_layers import MAX_TERMS, Kernel, Lane, elu, folded_weight, innermost

MAX_FRAMES = 16
"""Maximum length of these waves. Longer ones fill at least half a piece."""
FINE_FRAMES = 32
"""Frames of all waves in one product of the layers up to the first stride, so that activations stay in a CPU's cache.

The other layers take COARSE_FRAMES: they have fewer rows a frame and more weights, which one product reads once.
"""
COARSE_FRAMES = 160
LEAST_FRAMES = 7
"""Minimum number of frames in the last convolution, which has a padding of 6."""


class ShortEncoder:
    """The layers of a `SeanetEncoder` for waves of at most MAX_FRAMES frames."""

    def __init__(self, layers: Sequence[Any], encoder: SeanetEncoder, hop_length: int) -> None:
        *before, _, _, last = layers
        self.encoder, self.hop_length = encoder, hop_length
        self.stages = [
            Residual(layer, encoder.piece) if hasattr(layer, "block") else Convolution(layer, encoder.piece, previous)
            for previous, layer in zip([None, *before], before)
            if not isinstance(layer, nn.ELU)
        ]
        strided = [i for i, stage in enumerate(self.stages) if isinstance(stage, Convolution) and stage.strides]
        self.fine = strided[0] + 1 if strided else 0
        """Number of stages at the first rates."""
        self.last = Convolution(last, encoder.hidden, nn.ELU())
        self._exact: dict[int, bool] = {}

    def __call__(self, waves: Sequence[Tensor], frames: int) -> Tensor:
        """Encode waves that all have this number of frames, [n] each, to latents [W, frames, D]."""
        x = self.encoder.piece.new_zeros(len(waves), frames * self.hop_length, 1)
        for row, wave in zip(x, waves):
            row[: len(wave), 0] = wave
        x = self._grouped(self.stages[: self.fine], x, FINE_FRAMES // frames)
        features = self._grouped(self.stages[self.fine :], x, COARSE_FRAMES // frames)
        lanes = [Lane(frames) for _ in waves]
        hidden = self.encoder.recur(features.transpose(0, 1).contiguous(), lanes).transpose(0, 1)
        return self.last(F.pad(hidden, (0, 0, 0, max(0, LEAST_FRAMES - frames))), frames)[:, :frames]

    def _grouped(self, stages: Sequence[Any], x: Tensor, count: int) -> Tensor:
        """Run stages on `count` waves of x [W, n, C] at a time, at least one."""
        parts = []
        for part in x.split(max(1, count)):
            for stage in stages:
                part = stage(part)
            parts.append(part)
        return torch.cat(parts)

    def runs(self, frames: int) -> bool:
        """Return whether waves of this length give the bits that the encoder gives to each alone."""
        if frames not in self._exact:
            self._exact[frames] = self._is_exact(frames)
        return self._exact[frames]

    @full_precision()
    def _is_exact(self, frames: int) -> bool:
        generator = torch.Generator().manual_seed(frames)
        waves = [torch.randn(frames * self.hop_length - cut, generator=generator) * 0.1 for cut in (0, 11, 22)]
        waves = [wave.to(self.encoder.piece) for wave in waves]
        alone = torch.stack([self.encoder([Lane(frames)], [wave])[0, :frames] for wave in waves])
        largest = self.encoder.widths[-1]
        try:  # the values do not matter, so a few waves stand for any number
            return all(
                torch.equal(self([waves[i % 3] for i in range(count)], frames), alone[torch.arange(count) % 3])
                for count in (1, 2, 7, largest)
                if count <= largest
            )
        except TooShort:
            return False


class TooShort(Exception):  # noqa: N818  (not an error)
    """A wave has fewer samples than a layer's padding mirrors."""


class Convolution:
    """`seanet_layers.CausalConvolution` for the beginnings of several waves, [W, n, C] to [W, n', C']."""

    def __init__(self, layer: Any, like: Tensor, previous: Any) -> None:
        self.kernel = kernel = Kernel(layer, like)
        self.activate = isinstance(previous, nn.ELU)
        self.strides = kernel.stride > kernel.upsample
        self.pad = (len(kernel.taps) - 1) * kernel.dilation * kernel.stride
        self.factors = [
            (i * kernel.dilation, first, weight.contiguous())
            for i, tap in enumerate(kernel.taps)
            for first, weight in zip(range(0, len(tap), MAX_TERMS), tap.split(MAX_TERMS))
        ]

    def __call__(self, x: Tensor, frames: int | None = None) -> Tensor:
        """frames: number of rows of each wave that belong to it; None for all."""
        count, length, channels = x.shape
        if length <= self.pad:
            raise TooShort
        samples = x.new_empty(count, self.pad + length, channels)
        body = samples[:, self.pad :]
        if self.activate:
            elu(x, body)
        else:
            body.copy_(x)
        if self.pad:
            samples[:, : self.pad] = body[:, 1 : self.pad + 1].flip(1)
            samples[:, : max(0, self.pad + 1 - (frames or length))] = 0
        rows = samples.view(-1, self.kernel.stride * channels)
        last = (len(self.kernel.taps) - 1) * self.kernel.dilation
        out = x.new_empty(len(rows), self.kernel.taps.shape[2])
        product = out[: len(rows) - last]
        for number, (shift, first, weight) in enumerate(self.factors):
            part = rows[shift : shift + len(product), first : first + len(weight)]
            if number:
                product.addmm_(part, weight)
            else:
                torch.addmm(self.kernel.bias, part, weight, out=product)
        whole = out.view(count, -1, out.shape[1])[:, : length // self.kernel.stride]
        return whole.reshape(count, -1, out.shape[1] // self.kernel.upsample)


class Residual:
    """`seanet_layers.SeanetResidual` for several waves, [W, n, C] to [W, n, C]."""

    def __init__(self, layer: Any, like: Tensor) -> None:
        self.narrow = Convolution(layer.block[1], like, nn.ELU())
        pointwise, shortcut = innermost(layer.block[3]), innermost(layer.shortcut)
        self.widen = folded_weight(pointwise)[..., 0].t().contiguous()
        self.shortcut = folded_weight(shortcut)[..., 0].t().contiguous()
        self.bias = (pointwise.bias + shortcut.bias).detach()

    def __call__(self, x: Tensor) -> Tensor:
        hidden = activated(self.narrow(x))
        out = torch.addmm(self.bias, x.flatten(0, 1), self.shortcut)
        return out.addmm_(hidden.flatten(0, 1), self.widen).view(x.shape)


def activated(x: Tensor) -> Tensor:
    """ELU of `x`, as a new tensor."""
    out = torch.empty_like(x)
    elu(x, out)
    return out
