"""Settings of prediction targets, heads and losses: the sections objective, online and mae of a config."""

from dataclasses import dataclass
from typing import Literal

from codecssl.pretrain.bounds import above_zero as _above_zero
from codecssl.pretrain.bounds import at_least as _at_least
from codecssl.pretrain.bounds import probability as _probability
from codecssl.tokenize.common.errors import UserError

ENCODECMAE_GAMMA = (
    0.22407463,
    0.1759858,
    0.14499009,
    0.12150037,
    0.10315603,
    0.08831368,
    0.07608274,
    0.06589669,
)
"""Codebook weights of EnCodecMAE's loss (arXiv 2309.07391, released configuration): eight, sum 1."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Prediction targets at masked frames, heads, and loss weights."""

    name: Literal["codec2vec", "encodecmae"] = "codec2vec"
    """codec2vec: masked frames are replaced by a learned vector. encodecmae: masked frames are removed before the
    encoder, and a light decoder reconstructs them."""
    target: Literal["codes", "labels", "online"] = "codes"
    """codes: the codec's own codes, one head per codebook (Codec2Vec's reconstruction target). labels: classes
    from data.labels, such as k-means clusters of a model's features (its iterative clustering). online: clusters of a
    moving average of the model itself (DinoSR). `TARGETS` in objectives/targets.py has their classes."""
    fsq: Literal["auto", "whole", "digits"] = "auto"
    """Targets of a codec with one codebook from finite scalar quantization, as NeuCodec's 65,536 codes. whole: one
    stream of all codes. digits: one stream for each channel of the quantizer, a digit of the code. auto: digits
    (LOG.md, 2026-11-30). Other codecs have no digits, and auto and whole are the same."""
    gamma: Literal["uniform", "encodecmae"] = "uniform"
    """Weights of the codebooks in the loss, normalised to sum to 1."""
    head: Literal["linear", "cosine", "codebook"] = "linear"
    """Logits of a class. linear: a matrix. cosine: the cosine of a projection with the class embedding, divided by
    `temperature`, as in HuBERT (arXiv 2106.07447, equation 3) and MERT. codebook: the inner product of a projection
    with the class vector, plus a bias; only for target codes. The class vectors are initialised from the codec's
    codebooks, and the bias from the log unigram. With 1,024 classes, codebook heads start to learn several times as
    early as linear ones (LOG.md, 2026-11-30)."""
    head_context: bool = False
    """Condition the head of codebook k on the de-quantised sum of the true codes below k (codebook heads only).
    The loss is then that of q_k given h and q_1 .. q_k-1, coarse to fine as in AudioLM (arXiv 2209.03143, section
    3.2)."""
    head_dim: int = 256
    """Width of the projection and of the class embeddings of each stream (cosine; HuBERT 256, MERT 64)."""
    temperature: float = 0.1
    """Divisor of the cosines (cosine heads, contrasts)."""
    mel_weight: float = 0.0
    """Weight of a second loss: the mean absolute error of scaled log-mel values that a linear layer predicts at masked
    frames (encodecmae with model.input mel or both), as in masked spectrogram models (TERA, arXiv 2007.06028,
    section III)."""
    codes_weight: float = 0.0
    """Weight of the prediction of the codec's codes next to that of labels (codec2vec with target labels), as with the
    several targets of MT4SSL (arXiv 2211.07321). Its heads are codebook heads with context: see `head`. Like the
    contrasts it is part of the training's loss; the loss of a validation is that of the labels."""
    contrast_weight: float = 0.0
    """Weight of a contrastive loss: the hidden state of a masked frame has to find the log-mels of that frame among
    those of all frames of its item (objectives/contrast.py; codec2vec with model.input mel or both)."""
    contrast_dim: int = 64
    """Width of the projections in both contrasts."""
    utterance_weight: float = 0.0
    """Weight of a contrastive loss between recordings: the mean hidden states of both halves of an item have to find
    each other among those of all items of the micro-batch (objectives/utterance_contrast.py; codec2vec)."""
    visible_weight: float = 0.0
    """Weight of the prediction loss at unmasked frames (HuBERT's pred_nomask_weight)."""
    quantizer_dropout: float = 0.5
    """Fraction of the items whose input keeps only n ~ U{1..K} codebooks. Targets keep all codebooks."""
    quantizer_dropout_kind: Literal["prefix", "subset"] = "prefix"
    """prefix keeps the first n codebooks, subset a random choice of n codebooks."""

    def __post_init__(self) -> None:
        _at_least("objective.visible_weight", self.visible_weight, 0.0)
        _at_least("objective.mel_weight", self.mel_weight, 0.0)
        _at_least("objective.codes_weight", self.codes_weight, 0.0)
        _at_least("objective.contrast_weight", self.contrast_weight, 0.0)
        _at_least("objective.utterance_weight", self.utterance_weight, 0.0)
        _at_least("objective.contrast_dim", self.contrast_dim, 1)
        _at_least("objective.head_dim", self.head_dim, 1)
        _above_zero("objective.temperature", self.temperature)
        if self.head == "codebook" and self.target != "codes":
            raise UserError(f"objective.head: codebook, but objective.target is {self.target}; use linear or cosine")
        if self.codes_weight and (self.name, self.target) != ("codec2vec", "labels"):
            raise UserError(
                f"objective.codes_weight: {self.codes_weight}, needs objective.name codec2vec and objective.target"
                " labels; set it to 0"
            )
        if self.head_context and self.head != "codebook":
            raise UserError(f"objective.head_context: true, but objective.head is {self.head}; use codebook")
        if not 0.0 <= self.quantizer_dropout <= 1.0:
            raise UserError(f"objective.quantizer_dropout: {self.quantizer_dropout}, must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Online clustering (objective.target online): DinoSR (arXiv 2305.10005), or SpidR's variant of it."""

    variant: Literal["dinosr", "spidr"] = "dinosr"
    """dinosr: every head predicts from the student's last layer. spidr: student layer k predicts teacher layer k."""
    top_layers: int = 8
    """Number of top teacher layers whose features are clustered, with one codebook per layer."""
    clusters: int = 256
    """Codewords of each codebook."""
    codebook_decay: float = 0.9
    """Decay of the codewords' moving sums and counts."""
    ema_start: float = 0.999
    """Decay of the teacher at step 0. With dinosr it rises linearly to `ema_end` over `ema_fraction` of the steps."""
    ema_end: float = 0.9999
    ema_fraction: float = 0.075
    """Fraction of the steps over which the decay rises (30,000 of 400,000 steps)."""
    freeze_fraction: float = 0.5
    """Fraction of the steps after which the teacher is frozen (200,000 of 400,000)."""
    spidr_timescale: float = 20_000.0
    """Timescale of the teacher's decay 1 - (1 - ema_start) exp(-step / timescale), steps (spidr)."""

    def __post_init__(self) -> None:
        _at_least("online.top_layers", self.top_layers, 1)
        _at_least("online.clusters", self.clusters, 2)
        for key in ("codebook_decay", "ema_start", "ema_end", "ema_fraction"):
            _probability(f"online.{key}", getattr(self, key))
        _at_least("online.freeze_fraction", self.freeze_fraction, 0.0)
        _above_zero("online.spidr_timescale", self.spidr_timescale)


@dataclass(frozen=True, kw_only=True)
class MaeConfig:
    """EnCodecMAE's decoder and loss (arXiv 2309.07391, released configuration)."""

    decoder_layers: int = 2
    decoder_dim: int | None = None
    """Width of the decoder's layers, whose heads are as wide as the encoder's; null is `model.dim`. A narrow decoder
    saves time, and leaves the work to the encoder (He et al. 2022, arXiv 2111.06377, section 3)."""
    masked_weight: float = 0.9
    """Weight of the loss at masked frames; visible frames have weight 1 - `masked_weight`."""
    mask_token: Literal["learned", "zeros"] = "learned"
    """Decoder input at masked frames: a learned vector, or zeros as in the released code."""

    def __post_init__(self) -> None:
        _at_least("mae.decoder_layers", self.decoder_layers, 1)
        if self.decoder_dim is not None:
            _at_least("mae.decoder_dim", self.decoder_dim, 1)
        if not 0.0 <= self.masked_weight <= 1.0:
            raise UserError(f"mae.masked_weight: {self.masked_weight}, must be between 0 and 1")
