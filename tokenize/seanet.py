"""SEANet run piece by piece: the layers of EnCodec's encoder and decoder with what each carries from piece to piece.

Defossez et al. 2022 (arXiv 2210.13438), section 3.2. The network is causal, so nothing is computed twice: a convolution
keeps its last inputs, the LSTM its state. A piece is short, so that on a CPU all that passes between two layers stays
in its cache; pieces all have one length, so that each layer has its memory and its views of it from the start.

Convolutions run on one wave at a time, in products of matrices of one fixed size; the LSTM, whose weights fit in no
cache, runs on several waves (lanes) side by side. Only such numbers of lanes are used as give the same bits
(`Encoder.widths`), so that a wave's latents depend on that wave alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.errors import UserError

WIDTHS = (2, 4, 8, 12, 16, 24, 32)
"""Numbers of lanes that a CPU may run side by side; for a single one oneDNN sums in another order."""
CUDA_WIDTH = 32
"""A GPU's libraries choose their sums by the shape: it always runs this many lanes, some of them empty."""
BLOCK = 8
"""A convolution from or to one channel, too thin for a product of matrices, runs over blocks of this many samples."""

MAX_TERMS = 640
"""Of the sums in one product: for longer ones MKL's order depends on the number of threads."""


class Lane:
    """What one wave carries from piece to piece: a memory for each layer."""

    def __init__(self, first_frames: int) -> None:
        self.first_frames, self.pieces = first_frames, 0
        """Frames of the first piece that are the wave's; pieces that an encoder has taken."""
        self.memory: dict[object, Tensor] = {}


class Arena:
    """Three blocks of memory that all layers share in turn: fresh memory would not be in the cache."""

    def __init__(self, like: Tensor) -> None:
        self.blocks = [like.new_empty(1) for _ in range(3)]

    def take(self, rows: int, columns: int, *live: Tensor) -> Tensor:
        """An uninitialised [rows, columns] that shares no memory with the tensors in `live`, two at most."""
        taken = {tensor.untyped_storage().data_ptr() for tensor in live}
        block = next(b for b in self.blocks if b.untyped_storage().data_ptr() not in taken)
        storage, size = block.untyped_storage(), rows * columns * block.itemsize
        if len(storage) < size:
            storage.resize_(size)  # views of it that others have grow with it
        return block.new_empty(0).set_(storage, 0, (rows, columns), (columns, 1))


def elu(x: Tensor, out: Tensor) -> None:
    """ELU as max(x, exp(min(x, 0)) - 1): twice as fast as torch's own, rounded to 6e-8 of 1 as all sums here are."""
    torch.clamp(x, max=0, out=out)
    torch.maximum(x, out.exp_().sub_(1), out=out)


class Kernel:
    """The weights of a convolution of either library as an ordinary one over blocks of `stride` samples.

    A stride s with a kernel of m * s is a kernel of m over blocks of s samples. Transposed, it is a kernel of m that
    gives s samples at once.
    """

    def __init__(self, layer: Any, like: Tensor) -> None:
        inner = _innermost(layer)
        weight, self.stride, self.dilation = _weight(inner), inner.stride[0], inner.dilation[0]
        self.upsample, self.mirror = 1, True
        if isinstance(inner, nn.ConvTranspose1d):
            self.stride, self.upsample, self.mirror = 1, self.stride, False
            weight = weight.unflatten(2, (-1, self.upsample)).permute(3, 1, 0, 2).flatten(0, 1).flip(2)
        elif not layer.causal or layer.pad_mode != "reflect":
            raise UserError(f"{layer}: only causal convolutions with reflected padding run in pieces")
        elif 1 in weight.shape[:2] and self.stride == self.dilation == 1 and len(like) % BLOCK == 0:
            weight, self.stride, self.upsample = _blocked(weight), BLOCK, BLOCK
        if inner.groups != 1 or weight.shape[2] % self.stride:
            raise UserError(f"{inner}: only plain convolutions whose stride divides the kernel run in pieces")
        self.taps = weight.unflatten(2, (-1, self.stride)).permute(2, 3, 1, 0).flatten(1, 2).to(like)
        """[m, stride * C, upsample * N]"""
        self.bias = inner.bias.detach().repeat(self.upsample).to(like)


class Convolution:
    """A causal convolution over pieces [n, C], time before channels, as products of matrices: nothing is unfolded.

    The input stands in `source`, the output in `out`.
    """

    def __init__(self, layer: Any, source: Tensor, arena: Arena, *live: Tensor, frames: int, activate: bool) -> None:
        """frames: of a piece. activate: the input goes through an ELU first. live: what else must last in the arena."""
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
        """Put the piece behind the inputs before it."""
        if self.activate:
            elu(self.source, self.body)
        else:
            self.body.copy_(self.source)
        if self.pad:
            before = lane.memory.get(self)
            self.lead.copy_(self._mirrored(lane) if before is None else before)
            lane.memory[self] = self.tail.clone()

    def _mirrored(self, lane: Lane) -> Tensor:
        """What the reference puts before a wave: its beginning mirrored, with zeros for what a short one lacks."""
        mirrored = self.body[1 : self.pad + 1].flip(0)
        length = len(self.body) * lane.first_frames // self.frames if self.mirror else 0
        mirrored[: max(0, self.pad + 1 - length)] = 0
        return mirrored


class Residual:
    """x -> shortcut(x) + pointwise(elu(convolution(elu(x)))); [n, C] in `source` to [n, C] in `out`."""

    def __init__(self, layer: Any, source: Tensor, arena: Arena, frames: int) -> None:
        self.source = source
        self.narrow = Convolution(layer.block[1], source, arena, source, frames=frames, activate=True)
        pointwise, shortcut = _innermost(layer.block[3]), _innermost(layer.shortcut)
        self.widen = _weight(pointwise)[..., 0].t().contiguous()
        self.shortcut = _weight(shortcut)[..., 0].t().contiguous()
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
    """An LSTM and the connection past it, for lanes side by side."""

    def __init__(self, layer: Any) -> None:
        self.lstm: nn.LSTM = layer.lstm

    def __call__(self, x: Tensor, lanes: Sequence[Lane]) -> Tensor:
        """[t, W, H] to [t, W, H]."""
        fresh = x.new_zeros(2, self.lstm.num_layers, self.lstm.hidden_size)
        hidden, cell = torch.stack([lane.memory.get(self, fresh) for lane in lanes], 2)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            out, states = self.lstm(x, (hidden, cell))
        for lane, state in zip(lanes, torch.stack(states).unbind(2)):
            lane.memory[self] = state
        return out + x


class LoneRecurrence:
    """A `Recurrence` of one lane among stages: [n, H] in `source` to [n, H] in `out`."""

    def __init__(self, layer: Any, source: Tensor, arena: Arena) -> None:
        self.source, self.recurrence = source, Recurrence(layer)
        self.out = arena.take(*source.shape, source)

    def __call__(self, lane: Lane) -> None:
        self.out.copy_(self.recurrence(self.source[:, None], [lane])[:, 0])


class Encoder:
    """The encoder's layers, from pieces of waves to latents."""

    def __init__(
        self, layers: Sequence[Any], hop_length: int, *, fine_frames: int, piece_frames: int, shared_pieces: int
    ) -> None:
        """piece_frames: taken at once, of which the layers up to the last residual one see fine_frames at once.

        shared_pieces: of a wave, at its beginning; from there on its LSTM runs alone (on a CPU), which is slower than
        side by side with others, but faster than side by side with nothing.
        """
        *fine, residual, elu_, strided, lstm, activation, last = layers
        if not hasattr(lstm, "lstm") or not isinstance(activation, nn.ELU):
            raise UserError("only an encoder that ends in an LSTM, an ELU and a convolution runs in pieces")
        self.piece_frames, self.piece_samples = piece_frames, piece_frames * hop_length
        like = next(lstm.parameters())
        arena = Arena(like)
        self.piece = like.new_empty(fine_frames * hop_length, 1)
        self.fine = _stages(fine, self.piece, arena, fine_frames)
        rows, channels = self.fine[-1].out.shape
        self.features = like.new_empty(piece_frames // fine_frames * rows, channels)
        self.coarse = _stages([residual, elu_, strided], self.features, arena, piece_frames)
        self.recurrence, self.shared_pieces = (
            Recurrence(lstm),
            shared_pieces if like.device.type == "cpu" else sys.maxsize,
        )
        self.hidden = like.new_empty(self.coarse[-1].out.shape)
        self.last = Convolution(last, self.hidden, arena, frames=piece_frames, activate=True)

    def __call__(self, lanes: Sequence[Lane], pieces: Sequence[Tensor]) -> Tensor:
        """The next piece of each lane's wave, up to [piece_samples], to latents [W, piece_frames, D].

        The number of lanes is free up to the last of `widths`. Of a piece that is shorter, the last, only so many
        frames are meant.
        """
        features = self.hidden.new_empty(self.piece_frames, len(lanes), self.hidden.shape[1])
        for i, (lane, piece) in enumerate(zip(lanes, pieces)):
            features[:, i] = self._convolve(lane, piece)
            lane.pieces += 1
        latents = []
        for lane, hidden in zip(lanes, self._recur(features, lanes).unbind(1)):
            self.hidden.copy_(hidden)
            self.last(lane)
            latents.append(self.last.out.clone())
        return torch.stack(latents)

    def _recur(self, features: Tensor, lanes: Sequence[Lane]) -> Tensor:
        """[t, W, H] to [t, W, H]: side by side up to `shared_pieces` of a wave, each lane alone from there on."""
        shared = [i for i, lane in enumerate(lanes) if lane.pieces <= self.shared_pieces]
        hidden = torch.empty_like(features)
        for group in [shared] * bool(shared) + [[i] for i in range(len(lanes)) if i not in shared]:
            width = next(w for w in self.widths if w >= len(group)) if group is shared else 1
            empty = width - len(group)
            together = [*(lanes[i] for i in group), *(Lane(1) for _ in range(empty))]
            hidden[:, group] = self.recurrence(F.pad(features[:, group], (0, 0, 0, empty)), together)[:, : len(group)]
        return hidden

    def _convolve(self, lane: Lane, piece: Tensor) -> Tensor:
        """All before the LSTM: a piece to [piece_frames, H]."""
        for samples, features in zip(piece.split(len(self.piece)), self.features.split(len(self.fine[-1].out))):
            self.piece[: len(samples), 0] = samples
            self.piece[len(samples) :] = 0
            for stage in self.fine:
                stage(lane)
            features.copy_(self.fine[-1].out)
        for stage in self.coarse:
            stage(lane)
        return self.coarse[-1].out

    @cached_property
    @torch.inference_mode()
    def widths(self) -> tuple[int, ...]:
        """Numbers of lanes that may run side by side, because a lane's result is the same, to the bit, in all of them.

        How a product of matrices sums up does not depend on the numbers in it, so lanes that are all alike show it.
        """
        if self.piece.device.type != "cpu":
            return (CUDA_WIDTH,)
        generator = torch.Generator().manual_seed(0)
        one = torch.randn(self.piece_frames, 1, self.hidden.shape[1], generator=generator).to(self.piece)
        results = [self.recurrence(one.repeat(1, width, 1), [Lane(1) for _ in range(width)]) for width in WIDTHS]
        return tuple(result.shape[1] for result in results if result.eq(results[0][:, :1]).all())


class Decoder:
    """The decoder's layers, from pieces of latents to samples."""

    def __init__(self, layers: Sequence[Any], latent_dim: int, piece_frames: int) -> None:
        like = next(layers[0].parameters())
        self.piece_frames, self.piece = piece_frames, like.new_empty(piece_frames, latent_dim)
        self.stages = _stages(layers, self.piece, Arena(like), piece_frames)

    def __call__(self, latents: Tensor, lane: Lane) -> Tensor:
        """The next piece [piece_frames, D] to samples [piece_frames * hop]."""
        self.piece.copy_(latents)
        for stage in self.stages:
            stage(lane)
        return self.stages[-1].out[:, 0].clone()


def _stages(layers: Sequence[Any], source: Tensor, arena: Arena, frames: int) -> list[Any]:
    """The layers of a SEANet, of the encodec package or of transformers, as stages, each reading the one before it."""
    stages: list[Any] = []
    for before, layer in zip([None, *layers], layers):
        if isinstance(layer, nn.ELU):
            continue
        if hasattr(layer, "lstm"):
            stages.append(LoneRecurrence(layer, source, arena))
        elif hasattr(layer, "block"):
            stages.append(Residual(layer, source, arena, frames))
        else:
            stages.append(Convolution(layer, source, arena, frames=frames, activate=isinstance(before, nn.ELU)))
        source = stages[-1].out
    return stages


def _innermost(layer: Any) -> Any:
    """The torch layer within the wrappers of either library."""
    while (inner := getattr(layer, "convtr", getattr(layer, "conv", None))) is not None:
        layer = inner
    return layer


def _blocked(weight: Tensor) -> Tensor:
    """A convolution [N, C, k] as one of stride BLOCK, [BLOCK * N, C, m * BLOCK], which gives BLOCK samples at once."""
    outputs, inputs, kernel = weight.shape
    length = -(-(kernel - 1) // BLOCK) * BLOCK + BLOCK
    blocked = weight.new_zeros(BLOCK, outputs, inputs, length)
    for i, part in enumerate(blocked):
        end = length - BLOCK + i + 1
        part[..., end - kernel : end] = weight
    return blocked.flatten(0, 1)


@torch.no_grad()
def _weight(convolution: Any) -> Tensor:
    """Its weight with the weight norm of either kind folded in."""
    if hasattr(convolution, "weight_g"):  # set by a hook when the layer is called: recompute what may be stale
        return torch._weight_norm(convolution.weight_v, convolution.weight_g, 0)
    return convolution.weight.detach().clone()
