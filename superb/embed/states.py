"""Hidden states of inputs of any length, in bounded memory.

An input of up to `window_seconds` goes through the upstream whole. A longer one is cut into windows of that length that
overlap by `overlap_seconds` on each side. The frames of the overlap are computed and dropped, so that every frame that
is kept has context. The windows of an input depend on that input alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE, SHORTEST

States = NDArray[np.float32]
"""[T, D]"""


class LayerChoice:
    """Chooses one layer of an upstream, or the mean of all.

    layer: 0 is the input of the first layer, i the output of layer i. Negative ones count from the last. None is the
    mean.
    """

    def __init__(self, layer: int | None) -> None:
        self.layer = layer

    def __call__(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """L + 1 tensors of one shape, [B, T, D] or [T, D], to that shape. Raises IndexError for other layers."""
        if self.layer is None:
            return torch.stack(list(hidden_states)).mean(0)
        return hidden_states[self.layer]


class WaveStates:
    """Waves at 16 kHz to hidden states, by an s3prl upstream (`forward(waves)`, `get_downsample_rates`)."""

    def __init__(
        self, expert: Any, layers: LayerChoice, device: str, *, window_seconds: float, overlap_seconds: float
    ) -> None:
        self.expert, self.layers, self.device = expert, layers, device
        self.shift = int(expert.get_downsample_rates("hidden_states"))
        """Samples at 16 kHz per frame."""
        self.overlap = max(1, round(overlap_seconds * SAMPLE_RATE / self.shift)) * self.shift
        self.window = max(4, round(window_seconds * SAMPLE_RATE / self.shift)) * self.shift
        self.step = max(self.shift, self.window - 2 * self.overlap)

    @torch.no_grad()
    def batch(self, waves: Sequence[NDArray[np.float32]]) -> list[States]:
        """Hidden states of waves [n] of at most a window each; a wave's states do not depend on the others."""
        padded = [np.pad(wave, (0, max(0, SHORTEST - len(wave)))) for wave in waves]
        tensors = [torch.from_numpy(np.ascontiguousarray(wave, np.float32)).to(self.device) for wave in padded]
        states = self.layers(self.expert(tensors)["hidden_states"]).float().cpu().numpy()
        counts = [min(-(-len(wave) // self.shift), states.shape[1]) for wave in padded]
        return [states[i, :count].copy() for i, count in enumerate(counts)]

    def windows(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[States]:
        """Yield the states of a long wave, read in blocks. At most two windows are in memory."""
        rest, first = np.zeros(0, np.float32), True
        for block in blocks:
            rest = np.concatenate([rest, block])
            while len(rest) > self.window + self.overlap:
                yield self._middle(rest[: self.window], first, False)
                rest, first = rest[self.step :], False
        if len(rest):
            yield self._middle(rest, first, True)

    def _middle(self, wave: NDArray[np.float32], first: bool, last: bool) -> States:
        [states] = self.batch([wave])
        skip = self.overlap // self.shift
        return states[0 if first else skip : len(states) if last else len(states) - skip]


class TimePooling:
    """Mean, or mean and deviation, over the frames of an input, added up in float64."""

    def __init__(self, kind: str) -> None:
        self.kind, self.frames = kind, 0
        self._sum: NDArray[np.float64] | float = 0.0
        self._squares: NDArray[np.float64] | float = 0.0

    def add(self, states: States) -> None:
        """Add frames [t, D]."""
        wide = states.astype(np.float64)
        self.frames += len(wide)
        self._sum = self._sum + wide.sum(0)
        self._squares = self._squares + np.square(wide).sum(0)

    def value(self) -> NDArray[np.float32]:
        """[D], or [2 D] for `meanstd`: the means, then the deviations (of the population)."""
        mean = np.asarray(self._sum) / self.frames
        if self.kind == "mean":
            return mean.astype(np.float32)
        deviation = np.sqrt(np.maximum(np.asarray(self._squares) / self.frames - np.square(mean), 0.0))
        return np.concatenate([mean, deviation]).astype(np.float32)
