"""EnCodec's encoder and decoder (SEANet with an LSTM) for waves of any length, several at a time.

Defossez et al. 2022 (arXiv 2210.13438), section 3.2. The network is causal: a convolution keeps its last inputs and the
LSTM its state, so nothing is computed twice. Pieces are short, so activations between layers stay in a CPU's cache.

Convolutions run on one wave at a time, as matrix products of one fixed size. The LSTM's weights fit no cache, so it
runs on several waves (lanes) in parallel, but only on numbers of lanes that give identical bits
(`SeanetEncoder.widths`). A wave's latents therefore depend on that wave alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.backends.parts.seanet_layers import Arena, CausalConvolution, Lane, Recurrence, stages_of
from codecssl.tokenize.common.errors import UserError

WIDTHS = (2, 4, 8, 12, 16, 24, 32)
"""Numbers of lanes that a CPU may run in parallel. For a single lane oneDNN sums in another order."""
CUDA_WIDTH = 32
"""Lanes on a GPU, some of them empty. GPU libraries choose their summation order by shape, so the number is fixed."""


class SeanetEncoder:
    """The encoder's layers, from pieces of waves to latents."""

    def __init__(
        self, layers: Sequence[Any], hop_length: int, *, fine_frames: int, piece_frames: int, shared_pieces: int
    ) -> None:
        """Build the stages of the encoder.

        piece_frames: frames per piece. The layers up to the last residual one process fine_frames of them at once.
        shared_pieces: pieces at a wave's beginning whose LSTM runs in parallel with other lanes. After that, on a CPU,
        the wave's LSTM runs alone. This is slower than with other lanes, but faster than with empty ones.
        """
        *fine, residual, before, strided, lstm, after, last = layers
        if not hasattr(lstm, "lstm") or not isinstance(after, nn.ELU):
            raise UserError("only an encoder that ends in an LSTM, an ELU and a convolution runs in pieces")
        self.piece_frames, self.piece_samples = piece_frames, piece_frames * hop_length
        like = next(lstm.parameters())
        arena = Arena(like)
        self.piece = like.new_empty(fine_frames * hop_length, 1)
        self.fine = stages_of(fine, self.piece, arena, fine_frames)
        rows, channels = self.fine[-1].out.shape
        self.features = like.new_empty(piece_frames // fine_frames * rows, channels)
        self.coarse = stages_of([residual, before, strided], self.features, arena, piece_frames)
        self.recurrence = Recurrence(lstm)
        self.shared_pieces = shared_pieces if like.device.type == "cpu" else sys.maxsize
        self.hidden = like.new_empty(self.coarse[-1].out.shape)
        self.last = CausalConvolution(last, self.hidden, arena, frames=piece_frames, activate=True)

    def __call__(self, lanes: Sequence[Lane], pieces: Sequence[Tensor]) -> Tensor:
        """Encode the next piece of each lane's wave, up to [piece_samples], to latents [W, piece_frames, D].

        The number of lanes is free up to the last of `widths`. If a piece is shorter (the last one), only the
        frames that it covers are valid.
        """
        features = self.hidden.new_empty(self.piece_frames, len(lanes), self.hidden.shape[1])
        for i, (lane, piece) in enumerate(zip(lanes, pieces)):
            features[:, i] = self._convolve(lane, piece)
            lane.pieces += 1
        latents = []
        for lane, hidden in zip(lanes, self.recur(features, lanes).unbind(1)):
            self.hidden.copy_(hidden)
            self.last(lane)
            latents.append(self.last.out.clone())
        return torch.stack(latents)

    def recur(self, features: Tensor, lanes: Sequence[Lane]) -> Tensor:
        """Run the LSTM on [t, W, H]: in parallel up to `shared_pieces` of a wave, each lane alone after that."""
        alone = [[i] for i, lane in enumerate(lanes) if lane.pieces > self.shared_pieces]
        shared = [i for i, lane in enumerate(lanes) if lane.pieces <= self.shared_pieces]
        hidden = torch.empty_like(features)
        for group in [*alone, shared] if shared else alone:
            width = next(w for w in self.widths if w >= len(group)) if group is shared else 1
            empty = width - len(group)
            together = [*(lanes[i] for i in group), *(Lane(1) for _ in range(empty))]
            hidden[:, group] = self.recurrence(F.pad(features[:, group], (0, 0, 0, empty)), together)[:, : len(group)]
        return hidden

    def _convolve(self, lane: Lane, piece: Tensor) -> Tensor:
        """Run all layers before the LSTM: a piece to [piece_frames, H]."""
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
    @full_precision()
    def widths(self) -> tuple[int, ...]:
        """Numbers of lanes that may run in parallel, because a lane's result is bit-identical in all of them.

        The summation order of a matrix product does not depend on the values, so a test with identical lanes suffices.
        """
        if self.piece.device.type != "cpu":
            return (CUDA_WIDTH,)
        generator = torch.Generator().manual_seed(0)
        one = torch.randn(self.piece_frames, 1, self.hidden.shape[1], generator=generator).to(self.piece)
        results = [self.recurrence(one.repeat(1, width, 1), [Lane(1) for _ in range(width)]) for width in WIDTHS]
        return tuple(result.shape[1] for result in results if result.eq(results[0][:, :1]).all())


class SeanetDecoder:
    """The decoder's layers, from pieces of latents to samples."""

    def __init__(self, layers: Sequence[Any], latent_dim: int, piece_frames: int) -> None:
        like = next(layers[0].parameters())
        self.piece_frames, self.piece = piece_frames, like.new_empty(piece_frames, latent_dim)
        self.stages = stages_of(layers, self.piece, Arena(like), piece_frames)

    def __call__(self, latents: Tensor, lane: Lane) -> Tensor:
        """Decode the next piece of latents [piece_frames, D] to samples [piece_frames * hop]."""
        self.piece.copy_(latents)
        for stage in self.stages:
            stage(lane)
        return self.stages[-1].out[:, 0].clone()
