"""The bottleneck at layer L of a model: quantize the states of the layer and restore them.

    state L [B, T, D] -> LayerNorm -> mean over `pool` frames -> residual quantizer -> out-projection to `pool` frames

The method is "Task-Specific Audio Coding for Machines" (Kuznetsova et al., arXiv 2507.12701), applied to an encoder of
codec tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codecssl.pretrain.model.fairseq2_parts import AttentionBiasCache
from codecssl.pretrain.model.layer_outputs import layer_outputs
from codecssl.pretrain.model.layers import ResidualEncoder
from codecssl.pretrain.model.lengths import lengths_to_mask
from codecssl.pretrain.model.model import CodecModel
from codecssl.pretrain.model.packing import from_grid, packed_layout, unpack
from codecssl.superb.task_codec.rvq import Rvq, RvqConfig, least_squares
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError

MOST_BITS = 10
"""Largest number of bits of one codebook: 1024 entries."""


@dataclass(frozen=True, kw_only=True)
class BitRate:
    """Codes per second and bits per code."""

    pool: int
    """Frames of the base codec in one frame of codes."""
    frame_rate: Fraction
    """Frames of codes per second."""
    num_codebooks: int
    bits: int
    """Bits of each code."""

    @property
    def bits_per_second(self) -> float:
        """Nominal bit rate."""
        return float(self.frame_rate * self.num_codebooks * self.bits)

    def __str__(self) -> str:
        shape = f"{self.num_codebooks} x {1 << self.bits} at {float(self.frame_rate):g} Hz"
        return f"{self.bits_per_second:g} bit/s ({shape})"


def choose_bit_rate(rate_bps: float, card: CodecCard, frame_rate: float) -> BitRate:
    """Choose the highest rate up to `rate_bps` (bit/s) at about `frame_rate` (Hz).

    The rate has as few codebooks as possible, with at most 1024 entries each. Raises UserError if a frame would have
    less than one bit.
    """
    pool = max(1, round(float(card.frame_rate) / frame_rate))
    rate = card.frame_rate / pool
    per_frame = math.floor(rate_bps / rate)
    if per_frame < 1:
        raise UserError(
            f"rate {rate_bps:g} bit/s: less than one bit for each of {float(rate):g} frames per second; give "
            f"{float(rate):g} or more, or a lower --frame-rate"
        )
    num_codebooks = -(-per_frame // MOST_BITS)
    return BitRate(pool=pool, frame_rate=rate, num_codebooks=num_codebooks, bits=per_frame // num_codebooks)


class Bottleneck(nn.Module):
    """LayerNorm, pooling, quantizer, out-projection. An incomplete last group is the mean of its existing frames."""

    def __init__(self, dim: int, pool: int, config: RvqConfig) -> None:
        super().__init__()
        self.dim, self.pool = dim, pool
        self.rvq = Rvq(dim, config)
        self.out = nn.Linear(dim, pool * dim)

    def pooled(self, states: Tensor, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        """States [B, T, D] and valid frames per item -> means [B, ceil(T / pool), D] and their bool mask."""
        normed = F.layer_norm(states, (self.dim,))
        real = lengths_to_mask(frames, states.shape[1], states.device)
        rest = -states.shape[1] % self.pool
        normed = F.pad(normed * real[..., None], (0, 0, 0, rest)).unflatten(1, (-1, self.pool))
        counts = F.pad(real, (0, rest)).unflatten(1, (-1, self.pool)).sum(dim=2)  # [B, T']
        return normed.sum(dim=2) / counts.clamp(min=1)[..., None], counts > 0

    @torch.no_grad()
    def encode(self, state: Tensor) -> Tensor:
        """Encode the state [T, D] of one utterance to codes int64 [K, ceil(T / pool)]."""
        pooled, _ = self.pooled(state[None], [len(state)])
        return self.rvq.encode(pooled)[0]

    def restore(self, codes: Tensor) -> Tensor:
        """Codes [B, k, T'] of the first k codebooks -> states [B, T' * pool, D]."""
        return self.expand(self.rvq.dequantise(codes))

    def expand(self, features: Tensor) -> Tensor:
        """Dequantised features [B, T', D] -> states [B, T' * pool, D]."""
        found: Tensor = self.out(features)
        return found.unflatten(2, (self.pool, self.dim)).flatten(1, 2)

    @torch.no_grad()
    def fit(
        self, states: Tensor, frames: Sequence[int], generator: torch.Generator, wanted: Tensor | None = None
    ) -> None:
        """Initialize from a batch of states: the quantizer by k-means, the out-projection by least squares.

        `wanted`: linear maps [C, D] of layer-normed states, whose values matter most.
        """
        pooled, real = self.pooled(states, frames)
        self.rvq.fit(pooled[real], generator, wanted)
        whole = [n // self.pool for n in frames]  # complete groups
        take = lengths_to_mask(whole, pooled.shape[1], states.device)
        if not bool(take.any()):
            return
        features = self.rvq.dequantise(self.rvq.encode(pooled))[take]
        rest = -states.shape[1] % self.pool
        targets = F.pad(states, (0, 0, 0, rest)).unflatten(1, (-1, self.pool)).flatten(2)[take]
        weight, bias = least_squares(features, targets, ridge=1e-3)
        self.out.weight.copy_(weight.T)
        self.out.bias.copy_(bias)


# ---------------------------------------------------------------- the model's two halves


def check_layer(model: CodecModel, layer: int) -> None:
    """Raise UserError if the model lacks the layer, or if later layers read more than its state."""
    last = model.config.layers
    if not 0 <= layer <= last:
        raise UserError(f"layer {layer}: this model has 0 (the input of the first layer) to {last}")
    if isinstance(model.encoder, ResidualEncoder) and 0 < layer < last:
        raise UserError(
            f"layer {layer}: the layers of a model.norm residual model pass on two streams; give layer 0 or {last}"
        )


def later_states(model: CodecModel, state: Tensor, frames: Sequence[int], layer: int) -> list[Tensor]:
    """State L [B, T, D] -> the states L, L + 1, ... of `CodecModel.extract`, with gradients."""
    states, last = [state], model.config.layers
    if layer == last:
        return states
    width, layout = state.shape[1], packed_layout(frames, state.device)
    packed = from_grid(state, layout)
    if isinstance(model.encoder, ResidualEncoder):  # layer 0: both streams start from this state
        *outputs, _, final = layer_outputs(model.encoder, packed, layout)
        later = [*outputs, final]
    else:
        later, cache = [], AttentionBiasCache()
        for module in model.encoder.layers[layer:]:  # type: ignore[index,union-attr]
            packed = module(packed, layout, cache)
            later.append(packed)
        if model.encoder.layer_norm is not None:
            later[-1] = model.encoder.layer_norm(packed)  # type: ignore[operator]
    return [*states, *(unpack(each, layout, width) for each in later)]
