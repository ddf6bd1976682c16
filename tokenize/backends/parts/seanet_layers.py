"""Layers of EnCodec's network, run piece by piece. Each layer has its own buffers and carried state.

All pieces of a wave have the same length, so each layer allocates its buffers and their views in advance. It reads
`source`, writes `out`, and stores in the wave's `Lane` what the next piece needs. Time precedes channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codecssl.tokenize.common.errors import UserError

BLOCK = 8
"""Block size in samples of convolutions from or to one channel, which are too thin for a matrix product."""
MAX_TERMS = 640
"""Maximum number of terms per sum in one product. For longer sums MKL's order depends on the number of threads."""


class Lane:
    """The state that one wave carries from piece to piece, by layer."""

    def __init__(self, first_frames: int) -> None:
        self.first_frames, self.pieces = first_frames, 0
        """Frames of the first piece that belong to the wave; pieces that an encoder has processed."""
        self.memory: dict[object, Tensor] = {}


class Arena:
    """Three blocks of memory that all layers share in turn. Newly allocated memory would not be in the cache."""

    def __init__(self, like: Tensor) -> None:
        self.blocks = [like.new_empty(1) for _ in range(3)]

    def take(self, rows: int, columns: int, *live: Tensor) -> Tensor:
        """Return an uninitialized [rows, columns] that shares no memory with the tensors in `live`, two at most."""
        taken = {tensor.untyped_storage().data_ptr() for tensor in live}
        block = next(b for b in self.blocks if b.untyped_storage().data_ptr() not in taken)
        storage, size = block.untyped_storage(), rows * columns * block.itemsize
        if len(storage) < size:
            storage.resize_(size)  # existing views stay valid
        return block.new_empty(0).set_(storage, 0, (rows, columns), (columns, 1))


def elu(x: Tensor, out: Tensor) -> None:
    """ELU as max(x, exp(min(x, 0)) - 1), twice as fast as torch's. Like all sums here, it is rounded to 6e-8 of 1."""
    torch.clamp(x, max=0, out=out)
    torch.maximum(x, out.exp_().sub_(1), out=out)


class Kernel:
    """Weights of a convolution of either library, as an ordinary convolution over blocks of `stride` samples.

    A kernel of m * s with stride s is a kernel of m over blocks of s samples. A transposed convolution is a kernel of m
    that returns s samples at once.
    """

    def __init__(self, layer: Any, source: Tensor) -> None:
        """source: the buffer [n, C] that will hold the input."""
        inner = innermost(layer)
        weight, self.stride, self.dilation = folded_weight(inner), inner.stride[0], inner.dilation[0]
        self.upsample, self.mirror = 1, True
        if isinstance(inner, nn.ConvTranspose1d):
            self.stride, self.upsample, self.mirror = 1, self.stride, False
            weight = weight.unflatten(2, (-1, self.upsample)).permute(3, 1, 0, 2).flatten(0, 1).flip(2)
        elif not layer.causal or layer.pad_mode != "reflect":
            raise UserError(f"{layer}: only causal convolutions with reflected padding run in pieces")
        elif 1 in weight.shape[:2] and self.stride == self.dilation == 1 and len(source) % BLOCK == 0:
            weight, self.stride, self.upsample = _blocked(weight), BLOCK, BLOCK
        if inner.groups != 1 or weight.shape[2] % self.stride:
            raise UserError(f"{inner}: only plain convolutions whose stride divides the kernel run in pieces")
        self.taps = weight.unflatten(2, (-1, self.stride)).permute(2, 3, 1, 0).flatten(1, 2).to(source)
        """Weights [m, stride * C, upsample * N]."""
        self.bias = inner.bias.detach().repeat(self.upsample).to(source)


class CausalConvolution:
    """A causal convolution over pieces [n, C], time before channels, as matrix products without unfolding.

    The input is read from `source` and the output is written to `out`.
    """

    def __init__(self, layer: Any, source: Tensor, arena: Arena, *live: Tensor, frames: int, activate: bool) -> None:
        """frames: frames per piece. activate: apply an ELU first. live: tensors that must stay valid in the arena."""
        kernel = Kernel(layer, source)
        self.source, self.frames, self.activate, self.mirror = source, frames, activate, kernel.mirror
        taps, width, outputs = kernel.taps.shape
        rows, step = len(source) // kernel.stride, kernel.dilation
        self.pad = (taps - 1) * step * kernel.stride
        if self.pad >= len(source):
            raise UserError(f"{layer}: pieces of {len(source)} samples are too short for a padding of {self.pad}")
        samples = arena.take(self.pad + len(source), source.shape[1], source, *live)
        self.lead, self.body, self.tail = samples[: self.pad], samples[self.pad :], samples[len(source) :]
        shifted = [samples.view(-1, width)[i * step : i * step + rows] for i in range(taps)]
        self.factors = [
            (part, weight.contiguous())
            for x, tap in zip(shifted, kernel.taps)
            for part, weight in zip(x.split(MAX_TERMS, 1), tap.split(MAX_TERMS))
        ]
        self.bias = kernel.bias
        self.product = arena.take(rows, outputs, samples, *live)
        self.out = self.product.view(rows * kernel.upsample, -1)

    def __call__(self, lane: Lane) -> None:
        self._load(lane)
        torch.addmm(self.bias, *self.factors[0], out=self.product)
        for rows, weight in self.factors[1:]:
            self.product.addmm_(rows, weight)

    def _load(self, lane: Lane) -> None:
        """Append the piece to the previous inputs."""
        if self.activate:
            elu(self.source, self.body)
        else:
            self.body.copy_(self.source)
        if self.pad:
            before = lane.memory.get(self)
            self.lead.copy_(self._mirrored(lane) if before is None else before)
            lane.memory[self] = self.tail.clone()

    def _mirrored(self, lane: Lane) -> Tensor:
        """Return the reference's left padding: the mirrored beginning of the wave, or zeros if it is too short."""
        mirrored = self.body[1 : self.pad + 1].flip(0)
        length = len(self.body) * lane.first_frames // self.frames if self.mirror else 0
        mirrored[: max(0, self.pad + 1 - length)] = 0
        return mirrored


class SeanetResidual:
    """x -> shortcut(x) + pointwise(elu(convolution(elu(x)))), from [n, C] in `source` to [n, C] in `out`."""

    def __init__(self, layer: Any, source: Tensor, arena: Arena, frames: int) -> None:
        self.source = source
        self.narrow = CausalConvolution(layer.block[1], source, arena, source, frames=frames, activate=True)
        pointwise, shortcut = innermost(layer.block[3]), innermost(layer.shortcut)
        self.widen = folded_weight(pointwise)[..., 0].t().contiguous()
        self.shortcut = folded_weight(shortcut)[..., 0].t().contiguous()
        self.bias = (pointwise.bias + shortcut.bias).detach()
        hidden = self.narrow.out
        self.activated = arena.take(*hidden.shape, source, hidden)
        self.out = arena.take(*source.shape, source, self.activated)

    def __call__(self, lane: Lane) -> None:
        self.narrow(lane)
        elu(self.narrow.out, self.activated)
        torch.addmm(self.bias, self.source, self.shortcut, out=self.out)
        self.out.addmm_(self.activated, self.widen)


class Recurrence:
    """An LSTM with its skip connection, for several lanes in parallel."""

    def __init__(self, layer: Any) -> None:
        self.lstm: nn.LSTM = layer.lstm

    def __call__(self, x: Tensor, lanes: Sequence[Lane]) -> Tensor:
        """Map [t, W, H] to [t, W, H]."""
        fresh = x.new_zeros(2, self.lstm.num_layers, self.lstm.hidden_size)
        hidden, cell = torch.stack([lane.memory.get(self, fresh) for lane in lanes], 2)
        out, states = self.lstm(x, (hidden, cell))
        for lane, state in zip(lanes, torch.stack(states).unbind(2)):
            lane.memory[self] = state
        return out + x


class LoneRecurrence:
    """A `Recurrence` of one lane as a stage, from [n, H] in `source` to [n, H] in `out`."""

    def __init__(self, layer: Any, source: Tensor, arena: Arena) -> None:
        self.source, self.recurrence = source, Recurrence(layer)
        self.out = arena.take(*source.shape, source)

    def __call__(self, lane: Lane) -> None:
        self.out.copy_(self.recurrence(self.source[:, None], [lane])[:, 0])


def stages_of(layers: Sequence[Any], source: Tensor, arena: Arena, frames: int) -> list[Any]:
    """Convert the layers of a SEANet, of the encodec package or of transformers, to stages that read one another."""
    found: list[Any] = []
    for before, layer in zip([None, *layers], layers):
        if isinstance(layer, nn.ELU):
            continue
        if hasattr(layer, "lstm"):
            found.append(LoneRecurrence(layer, source, arena))
        elif hasattr(layer, "block"):
            found.append(SeanetResidual(layer, source, arena, frames))
        else:
            found.append(CausalConvolution(layer, source, arena, frames=frames, activate=isinstance(before, nn.ELU)))
        source = found[-1].out
    return found


def innermost(layer: Any) -> Any:
    """Return the torch layer inside the wrappers of either library."""
    while (inner := getattr(layer, "convtr", getattr(layer, "conv", None))) is not None:
        layer = inner
    return layer


def _blocked(weight: Tensor) -> Tensor:
    """Rewrite a convolution [N, C, k] as one of stride BLOCK, [BLOCK * N, C, m * BLOCK], with BLOCK samples out."""
    outputs, inputs, kernel = weight.shape
    length = -(-(kernel - 1) // BLOCK) * BLOCK + BLOCK
    blocked = weight.new_zeros(BLOCK, outputs, inputs, length)
    for i, part in enumerate(blocked):
        end = length - BLOCK + i + 1
        part[..., end - kernel : end] = weight
    return blocked.flatten(0, 1)


@torch.no_grad()
def folded_weight(convolution: Any) -> Tensor:
    """Return a convolution's weight with its weight norm, of either kind, folded in."""
    if hasattr(convolution, "weight_g"):  # set by a hook when the layer is called: recompute what may be stale
        return torch._weight_norm(convolution.weight_v, convolution.weight_g, 0)
    return convolution.weight.detach().clone()
