"""Codec2Vec's objective: cross-entropy per stream of targets at masked frames, weighted by gamma."""

from torch import Tensor, nn

from codecssl.pretrain.config import ObjectiveConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.model.model import CodecModel
from codecssl.pretrain.objectives.contrast import Contrast
from codecssl.pretrain.objectives.heads import CodebookHeads, make_heads
from codecssl.pretrain.objectives.objective import (
    Loss,
    Objective,
    Scores,
    codebook_weights,
    parameters,
    score_heads,
)
from codecssl.pretrain.objectives.targets import Target, make_codes
from codecssl.pretrain.objectives.utterance_contrast import UtteranceContrast


class MaskedPrediction(Objective):
    """Model and heads. `forward` returns the loss.

    loss = mean over masked frames of sum_s gamma_s CE_s + visible_weight * the same over visible frames

    With objective.codes_weight w: + w * mean over masked frames and codebooks of the cross-entropy of the codes.
    With objective.contrast_weight c: + c * mean over masked frames of the loss of `Contrast`.
    With objective.utterance_weight u: + u * the loss of `UtteranceContrast`. Each micro-batch has a loss of its own,
    weighted by its share of the masked frames.
    The means are over the global batch, without padding. Heads are applied only to the frames that need them.
    """

    def __init__(self, model: CodecModel, target: Target, config: ObjectiveConfig) -> None:
        super().__init__()
        self.model, self.target, self.sizes = model, target, target.sizes
        self.visible_weight = config.visible_weight
        self.heads = make_heads(config, model.config.dim, target.sizes, target.width)
        self.codes_weight = config.codes_weight
        if config.codes_weight:
            self.codes = make_codes(config, model.card)
            assert self.codes.width is not None
            self.code_heads = CodebookHeads(model.config.dim, self.codes.sizes, self.codes.width, context=True)
            self.code_gamma = codebook_weights("uniform", len(self.codes.sizes))
        self.contrast_weight = config.contrast_weight
        if config.contrast_weight:
            assert model.mel_spec is not None, "RunConfig checks it"
            self.contrast = Contrast(model.config.dim, model.mel_spec.bands, config.contrast_dim, config.temperature)
        self.utterance_weight = config.utterance_weight
        if config.utterance_weight:
            self.utterances = UtteranceContrast(model.config.dim, config.contrast_dim, config.temperature)
        self.gamma = codebook_weights(config.gamma, len(target.sizes))  # not a buffer: a bf16 engine would round it

    def forward(self, batch: Batch, *, detailed: bool = False, score_visible: bool = False) -> Loss:
        """detailed: count accuracy and usage too; score_visible: score visible frames even at weight 0."""
        hidden = self.model(batch.codes, batch.frames, batch.mask, batch.kept, batch.mel)
        labels = self.target.labels(batch).t()  # [N, S]
        total, masked = self._score(hidden, labels, batch.masked, detailed, batch.masked_total)
        visible = None
        if self.visible_weight > 0.0 or score_visible:
            loss, visible = self._score(hidden, labels, batch.visible, detailed, batch.visible_total)
            if self.visible_weight > 0.0:
                total = total + self.visible_weight * loss
        if self.codes_weight and self.training:
            codes = self.codes.labels(batch).t().index_select(0, batch.masked)
            at_masked = hidden.index_select(0, batch.masked)
            loss, _ = score_heads(
                self.code_heads, at_masked, codes, self.codes.sizes, False, self.code_gamma, batch.masked_total
            )
            total = total + self.codes_weight * loss
        if self.contrast_weight and self.training:  # not in an evaluation's loss, which is that of the targets
            total = total + self.contrast_weight * self.contrast(hidden, batch) / batch.masked_total
        if self.utterance_weight and self.training:
            share = len(batch.masked) / batch.masked_total
            total = total + self.utterance_weight * share * self.utterances(hidden, batch.frames)
        return Loss(total, masked, visible)

    def head_parameters(self) -> int:
        # without the projection of `utterances`, which reads two means of an item instead of its frames
        further: list[nn.Module] = [self.code_heads] if self.codes_weight else []
        further += [self.contrast] if self.contrast_weight else []
        return sum(map(parameters, (self.heads, *further)))

    def _score(
        self, hidden: Tensor, labels: Tensor, where: Tensor, detailed: bool, frames: int
    ) -> tuple[Tensor, Scores]:
        """hidden [N, D], labels [N, S], indices [M] of the frames to score. See `score_heads`."""
        own = labels.index_select(0, where)
        return score_heads(self.heads, hidden.index_select(0, where), own, self.sizes, detailed, self.gamma, frames)
