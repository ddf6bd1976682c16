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
TOGETHER_FRAMES = 32
"""Frames of all waves in one product of the convolutions, so that activations stay in a CPU's cache."""
LEAST_FRAMES = 7
"""Minimum number of frames in the layers from the LSTM on: the last convolution has a padding of 6."""


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
        self.last = Convolution(last, encoder.hidden, nn.ELU())
        self._exact: dict[int, bool] = {}

    def __call__(self, waves: Sequence[Tensor], frames: int) -> Tensor:
        """Encode waves that all have this number of frames, [n] each, to latents [W, frames, D]."""
        count = max(1, TOGETHER_FRAMES // frames)
        x = torch.stack([F.pad(wave, (0, frames * self.hop_length - len(wave))) for wave in waves])[..., None]
        parts = []
        for part in x.split(count):
            for stage in self.stages:
                part = stage(part)
            parts.append(part)
        features = F.pad(torch.cat(parts), (0, 0, 0, max(0, LEAST_FRAMES - frames))).transpose(0, 1).contiguous()
        lanes = [Lane(frames) for _ in waves]
        hidden = self.encoder.recur(features, lanes).transpose(0, 1).contiguous()
        return self.last(hidden, frames)[:, :frames]

    @full_precision()
    def runs(self, frames: int) -> bool:
        """Return whether waves of this length give the bits that the encoder gives to each alone."""
        if frames not in self._exact:
            generator = torch.Generator().manual_seed(frames)
            count = max(2, TOGETHER_FRAMES // frames)
            lengths = [frames * self.hop_length - 11 * i % self.hop_length for i in range(count)]
            waves = [torch.randn(length, generator=generator) * 0.1 for length in lengths]
            waves = [wave.to(self.encoder.piece) for wave in waves]
            alone = [self.encoder([Lane(frames)], [wave])[0, :frames] for wave in waves]
            try:
                self._exact[frames] = torch.equal(self(waves, frames), torch.stack(alone))
            except TooShort:
                self._exact[frames] = False
        return self._exact[frames]


class TooShort(Exception):  # noqa: N818  (not an error)
    """A wave has fewer samples than a layer's padding mirrors."""


class Convolution:
    """`seanet_layers.CausalConvolution` for the beginnings of several waves, [W, n, C] to [W, n', C']."""

    def __init__(self, layer: Any, like: Tensor, previous: Any) -> None:
        self.kernel = kernel = Kernel(layer, like)
        self.activate = isinstance(previous, nn.ELU)
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
            body.copy_(activated(x))
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
