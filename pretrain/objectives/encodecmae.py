"""EnCodecMAE (Pepino, Riera, Ferrer 2023, arXiv 2309.07391): a masked autoencoder that predicts codes.

Masked frames are removed before the encoder, which processes visible frames only. The input of a light decoder is the
encoder's output at visible frames and a mask token at masked frames. It predicts the codes of every frame.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from codecssl.pretrain.config import MaeConfig, ModelConfig, ObjectiveConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.model.fairseq2_parts import Linear
from codecssl.pretrain.model.layers import SinusoidalPositions, make_encoder
from codecssl.pretrain.model.model import CodecModel, MelProjection
from codecssl.pretrain.model.packing import packed_layout
from codecssl.pretrain.objectives.heads import make_heads
from codecssl.pretrain.objectives.objective import (
    Loss,
    Objective,
    Scores,
    codebook_weights,
    encoder_flops,
    parameters,
    score_heads,
)
from codecssl.pretrain.objectives.targets import Target


class EncodecMae(Objective):
    """loss = w * mean over masked frames of sum_s gamma_s CE_s + (1 - w) * the same over visible ones.

    With objective.mel_weight m: + m * mean over masked frames and bands of |predicted - scaled log-mel|.
    """

    def __init__(self, model: CodecModel, target: Target, objective: ObjectiveConfig, config: MaeConfig) -> None:
        super().__init__()
        self.model, self.target, self.sizes, self.config = model, target, target.sizes, config
        decoder = decoder_config(model.config, config)
        dim = decoder.dim
        self.narrow = None if dim == model.config.dim else Linear(model.config.dim, dim, bias=True)
        self.mask_token = nn.Parameter(torch.randn(dim) * 0.02, requires_grad=config.mask_token == "learned")
        if config.mask_token == "zeros":
            nn.init.zeros_(self.mask_token)
        self.positions = SinusoidalPositions(dim)
        self.decoder = make_encoder(decoder)
        self.mel_weight = objective.mel_weight
        if objective.mel_weight:
            assert model.mel_spec is not None, "RunConfig checks it"
            self.mel_head = Linear(dim, model.mel_spec.bands, bias=True)
        self.heads = make_heads(objective, dim, self.sizes, target.width)
        self.gamma = codebook_weights(objective.gamma, len(self.sizes))

    def forward(self, batch: Batch, *, detailed: bool = False, score_visible: bool = False) -> Loss:
        hidden = self.decode(self.encode(batch), batch)
        labels = self.target.labels(batch).t()  # [N, S]
        loss, masked = self._score(hidden, labels, batch.masked, detailed, batch.masked_total)
        weight = self.config.masked_weight
        total = weight * loss
        visible = None
        if weight < 1.0 or score_visible:
            loss, visible = self._score(hidden, labels, batch.visible, detailed, batch.visible_total)
            total = total + (1.0 - weight) * loss
        if self.mel_weight and self.training:  # not in an evaluation's loss, which is that of the targets
            total = total + self.mel_weight * self._mel_error(hidden, batch) / batch.masked_total
        return Loss(total, masked, visible)

    def _mel_error(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the sum over masked frames of the mean absolute error of their log-mel values."""
        assert batch.mel is not None, "the loader reads it for model.input mel and both"
        predicted = self.mel_head(hidden.index_select(0, batch.masked)).float()
        wanted = MelProjection.scaled(batch.mel).index_select(0, batch.masked)
        return (predicted - wanted).abs().mean(1).sum()

    def encode(self, batch: Batch) -> Tensor:
        """Return hidden states [V, D] of the visible frames of all items, in order."""
        x, _ = self.model.front(batch.codes, batch.frames, None, batch.kept, batch.mel)
        layout = packed_layout(batch.visible_frames, x.device)
        output: Tensor = self.model.encoder(x.index_select(0, batch.visible), layout)
        return output

    def decode(self, encoded: Tensor, batch: Batch) -> Tensor:
        """Decode [V, D] at visible frames and the mask token at masked frames -> [N, decoder_dim]."""
        encoded = encoded if self.narrow is None else self.narrow(encoded)
        layout = packed_layout(batch.frames, encoded.device)
        full = self.mask_token.to(encoded.dtype).expand(sum(batch.frames), -1)
        full = full.index_copy(0, batch.visible, encoded)
        output: Tensor = self.decoder(self.positions(full, layout), layout)
        return output

    def weighted(self, masked: Mapping[str, list[float]], visible: Mapping[str, list[float]]) -> float:
        gamma, weight = self.gamma.double(), self.config.masked_weight
        means = [float(gamma @ torch.tensor(part["cross_entropy"]).double()) for part in (masked, visible)]
        return weight * means[0] + (1.0 - weight) * means[1]

    def flops(self, batch: Batch) -> float:
        seen = batch.visible_frames
        front = 6.0 * self.model.front_parameters() * sum(batch.frames)
        heads = 6.0 * parameters(self.heads) * sum(batch.frames)
        if self.narrow is not None:
            heads += 6.0 * parameters(self.narrow) * sum(seen)
        return front + heads + encoder_flops(self.model.encoder, seen) + encoder_flops(self.decoder, batch.frames)

    def head_parameters(self) -> int:
        narrow = 0 if self.narrow is None else parameters(self.narrow)
        return parameters(self.heads) + parameters(self.decoder) + narrow

    def _score(
        self, hidden: Tensor, labels: Tensor, where: Tensor, detailed: bool, frames: int
    ) -> tuple[Tensor, Scores]:
        own = labels.index_select(0, where)
        return score_heads(self.heads, hidden.index_select(0, where), own, self.sizes, detailed, self.gamma, frames)


def decoder_config(model: ModelConfig, config: MaeConfig) -> ModelConfig:
    """Return the shape of the decoder: the encoder's layers, as wide as `mae.decoder_dim`."""
    dim = config.decoder_dim or model.dim
    return replace(
        model,
        layers=config.decoder_layers,
        layerdrop=0.0,
        dim=dim,
        heads=dim * model.heads // model.dim,
        ffn_dim=dim * model.ffn_dim // model.dim,
    )
