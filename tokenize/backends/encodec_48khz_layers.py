"""Convolutions of EnCodec at 48 kHz, each normalized over a whole segment, in blocks that fit a CPU's cache.

A layer stores the raw output of its convolution. The next layer applies the normalization when it reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from codecssl.tokenize.backends.mimi import Taps
from codecssl.tokenize.backends.parts.functional import elu

BLOCK_FLOATS = 1 << 16
"""Input values per block. The block and its output fit the second-level cache of a CPU."""
BLOCK_ROWS = 256
"""Minimum output rows per block. With fewer, reading the weights would dominate."""

Layers = Callable[[Tensor], Tensor]
"""[L, T, C] to [L, T', C']."""


@dataclass(frozen=True)
class Signal:
    """A lazily evaluated signal [L, T, C]: a sum of tensors times scales [L, 1, C], plus a shift [L, 1, C]."""

    parts: tuple[tuple[Tensor, Tensor], ...]
    shift: Tensor

    @property
    def length(self) -> int:
        return self.parts[0][0].shape[1]

    def __add__(self, other: Signal) -> Signal:
        return Signal(self.parts + other.parts, self.shift + other.shift)

    def rows(self, start: int, stop: int) -> Tensor:
        (first, scale), *others = self.parts
        out = torch.addcmul(self.shift, first[:, start:stop], scale)
        for part, scale in others:
            out.addcmul_(part[:, start:stop], scale)
        return out

    def padded_rows(self, start: int, stop: int, last: int, activated: bool) -> Tensor:
        """Compute rows of the signal, optionally after an ELU.

        The signal is reflected at 0 and at `last`; zeros fill the rows from its end to `last`.
        """
        low, high = max(0, min(start, 2 * last - stop + 1)), min(self.length, max(stop, 1 - start))
        out = elu(self.rows(low, high)) if activated else self.rows(low, high)
        if (low, high) == (start, stop):
            return out
        index = torch.arange(start, stop, device=out.device).abs()
        index = torch.where(index > last, 2 * last - index, index)
        out = out[:, (index - low).clamp(max=high - low - 1)]
        return out.masked_fill_((index >= self.length)[:, None], 0)


class NormedConvolution:
    """A convolution with its group norm (one group: over the whole segment), optionally after an ELU."""

    def __init__(self, layer: Any, activated: bool) -> None:
        # the encodec package wraps both in one module, transformers does not
        inner = layer.conv if hasattr(layer.conv, "norm") else layer
        self.taps, self.activated = Taps(inner.conv), activated
        self.norm: nn.GroupNorm = inner.norm

    def __call__(self, x: Signal) -> Signal:
        taps, frames = self.taps, -(-x.length // self.taps.stride)
        left, last = self._padding(x.length, frames)
        raw = x.shift.new_empty(len(x.shift), frames, taps.outputs)
        sums = []
        for start in range(0, frames, block := self._block(raw)):
            stop = min(start + block, frames)
            first, after = start * taps.stride - left, (stop - 1) * taps.stride + taps.span - left
            part = taps(x.padded_rows(first, after, last, self.activated), raw[:, start:stop]).flatten(1)
            sums.append(torch.stack([part.sum(1), torch.linalg.vecdot(part, part)]))
        return self._normalised(raw, torch.stack(sums).double().sum(0) / (frames * taps.outputs))

    def _padding(self, length: int, frames: int) -> tuple[int, int]:
        """Return the libraries' left padding and the row where they reflect.

        The row is past the end of a very short input.
        """
        total = self.taps.span - self.taps.stride
        right = total // 2
        wanted = max(total - right, right + frames * self.taps.stride - length)
        return total - right, max(length - 1, wanted)

    def _block(self, raw: Tensor) -> int:
        if raw.device.type != "cpu":
            return raw.shape[1]
        return max(BLOCK_ROWS, BLOCK_FLOATS // max(self.taps.inputs * self.taps.stride, raw.shape[2]))

    def _normalised(self, raw: Tensor, moments: Tensor) -> Signal:
        """Normalize `raw` by the mean and the mean square [2, L] of each of its rows of segments."""
        mean, square = moments[..., None, None]
        scale = (square - mean.square() + self.norm.eps).rsqrt() * self.norm.weight
        return Signal(((raw, scale.to(raw.dtype)),), (self.norm.bias - mean * scale).to(raw.dtype))


def layers_of(layers: Sequence[Any]) -> Layers:
    """Chain the layers of a SEANet encoder into one function of [L, T, C]."""
    run = _chain(layers)

    def apply(x: Tensor) -> Tensor:
        return run(Signal(((x, x.new_ones(1, 1, x.shape[2])),), x.new_zeros(len(x), 1, x.shape[2]))).rows(
            0, sys.maxsize
        )

    return apply


def _chain(layers: Sequence[Any]) -> Callable[[Signal], Signal]:
    steps: list[Callable[[Signal], Signal]] = []
    for before, layer in zip([None, *layers], layers):
        if hasattr(layer, "block"):
            steps.append(_residual(layer))
        elif not isinstance(layer, nn.ELU):
            steps.append(NormedConvolution(layer, activated=isinstance(before, nn.ELU)))
    return lambda x: reduce(lambda x, step: step(x), steps, x)


def _residual(layer: Any) -> Callable[[Signal], Signal]:
    block = _chain(list(layer.block))
    shortcut = None if isinstance(layer.shortcut, nn.Identity) else NormedConvolution(layer.shortcut, activated=False)
    return lambda x: (shortcut(x) if shortcut else x) + block(x)
