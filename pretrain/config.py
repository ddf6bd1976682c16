"""Configuration of a pretraining run: frozen dataclasses, defaults in the code, units in the names.

A YAML file holds only the values that differ from the defaults. Defaults are those of the published Codec2Vec base
model; values that were not published are from HuBERT's base recipe. Each section checks its own ranges on construction.
`RunConfig` checks constraints across sections. A failed check raises UserError with the key, its value, the bound and
the remedy.
"""

from dataclasses import dataclass, field
from typing import Literal

from codecssl.pretrain.bounds import above_zero as _above_zero
from codecssl.pretrain.bounds import at_least as _at_least
from codecssl.pretrain.bounds import probability as _probability
from codecssl.pretrain.engine_config import EngineConfig, LogConfig
from codecssl.pretrain.objective_config import ENCODECMAE_GAMMA, MaeConfig, ObjectiveConfig, OnlineConfig
from codecssl.tokenize.common.errors import UserError

__all__ = [
    "ENCODECMAE_GAMMA",
    "DataConfig",
    "EngineConfig",
    "LogConfig",
    "MaeConfig",
    "MaskConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OnlineConfig",
    "OptimConfig",
    "RunConfig",
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder: Codec2Vec base (arXiv 2511.16639), which is HuBERT base behind code embeddings."""

    dim: int = 768
    """Width D of every layer."""
    layers: int = 12
    heads: int = 12
    ffn_dim: int = 3072
    norm: Literal["post", "pre", "residual"] = "post"
    """Layer norm after (BERT, HuBERT base) or before (large models) each block; residual is ResiDual (EnCodecMAE)."""
    positions: Literal["conv", "rotary", "sinusoidal"] = "conv"
    """HuBERT's grouped convolution before the first layer, rotary embeddings in each attention, or fixed sinusoids
    with a learned scale (EnCodecMAE)."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Activation function of the feed-forward blocks."""
    input: Literal["codes", "mel", "both"] = "codes"
    """codes: the sum of the code embeddings. mel: the log-mel plane of `codecssl-tokenize run --with-mel`, as in
    EnCodecMAE's mel256-ec (arXiv 2309.07391, section 2). both: the sum of the two projections."""
    fusion: Literal["sum", "concat"] = "sum"
    """How input both combines the two projections. sum: each has `dim` columns. concat: each has half of them, so that
    the first hidden state holds both apart."""
    tie_ffn: bool = False
    """One feed-forward block shared by all layers, as in EnCodecMAE's released code."""
    conv_kernel: int = 128
    """Kernel size of the convolutional position encoder, frames."""
    conv_groups: int = 16
    rotary_max_frames: int = 30_000
    """Longest input of a rotary model, frames (10 minutes at 50 Hz)."""
    embedding_init: Literal["codec", "raw", "random"] = "codec"
    """Initial code embeddings. codec: the contribution of each code to the codec's latent (latent-exact). raw: the
    codebooks as stored, before the output projections that some codecs have. random: noise."""
    layer_init: Literal["bert", "xavier"] = "bert"
    """Initial weights of attention and feed-forward blocks. bert: normal with deviation 0.02, whatever the width, as in
    HuBERT. xavier: uniform with deviation sqrt(2 / (inputs + outputs)) (Glorot and Bengio 2010, equation 16), three
    times as large at width 256: a narrow model's blocks contribute to its residual stream from the first step."""
    freeze_embedding: bool = False
    """Exclude the code embeddings from training."""
    freeze_front: bool = False
    """Exclude everything before the positions from training: embeddings, norm and projections. The first hidden state
    then keeps the speaker information of the input. Vision Transformers are also trained on frozen random projections
    of patches (Chen, Xie and He 2021, arXiv 2104.02057, section 4.2)."""
    embedding_dim: int | None = None
    """Width of the code embeddings; null is the codec's latent width. Additional columns start from noise."""
    dropout: float = 0.1
    """Dropout after attention and feed-forward blocks."""
    input_dropout: float = 0.1
    """Dropout before the first layer."""
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    """Dropout inside the feed-forward block."""
    layerdrop: float = 0.05

    def __post_init__(self) -> None:
        for key in ("dim", "layers", "heads", "ffn_dim", "conv_kernel", "conv_groups", "rotary_max_frames"):
            _at_least(f"model.{key}", getattr(self, key), 1)
        for key in ("dropout", "input_dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            _probability(f"model.{key}", getattr(self, key))
        if self.dim % self.heads:
            raise UserError(f"model.heads: {self.heads}, must divide model.dim ({self.dim})")
        if self.fusion == "concat" and (self.input != "both" or self.dim % 2):
            raise UserError(
                f"model.fusion: concat, needs model.input both and an even model.dim ({self.input}, {self.dim})"
            )
        if self.embedding_init == "raw" and self.embedding_dim is None:
            raise UserError("model.embedding_dim: null, must be given with model.embedding_init raw (DAC: 8)")
        if self.tie_ffn and self.norm != "residual":
            raise UserError("model.tie_ffn: true, but only model.norm residual can share its feed-forward block")
        if self.positions == "conv" and self.dim % self.conv_groups:
            raise UserError(f"model.conv_groups: {self.conv_groups}, must divide model.dim ({self.dim})")
        if self.positions == "rotary" and self.dim // self.heads % 2:
            raise UserError(f"model.heads: {self.heads}, leaves an odd head width with rotary positions; change it")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Span masking as in HuBERT and Codec2Vec: at 50 frames/s, 8 % start a span of 10; 57 % are masked."""

    kind: Literal["spans", "exact"] = "spans"
    """spans: HuBERT's masking, a fixed number of spans that may overlap. exact: EnCodecMAE's masking, exactly
    `fraction` of the frames. `KINDS` in data/masking.py has their functions."""
    starts_per_second: float = 4.0
    """Spans that start in a second of audio (spans)."""
    start_probability: float = 0.0
    """Fraction of the frames at which a span starts (spans); 0: `starts_per_second` at the codec's frame rate."""
    fraction: float = 0.5
    """Fraction of the frames that is masked (exact)."""
    span_seconds: float = 0.2
    """Length of a span."""
    span_frames: int = 0
    """Length of a span, frames; 0: `span_seconds` at the codec's frame rate."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.start_probability <= 1.0:
            raise UserError(f"mask.start_probability: {self.start_probability}, must be between 0 and 1")
        for key in ("starts_per_second", "span_seconds"):
            _above_zero(f"mask.{key}", getattr(self, key))
        if not 0.0 < self.fraction < 1.0:
            raise UserError(f"mask.fraction: {self.fraction}, must be above 0 and below 1")
        _at_least("mask.span_frames", self.span_frames, 0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Token shards to read, and the sizes of batches and crops (see `pretrain.frame_rate`)."""

    dirs: tuple[str, ...] = ()
    """Shard folders to train on; the command line's --data sets them."""
    labels: tuple[str, ...] = ()
    """Label folders (of `codecssl-pretrain label`), one for each of `dirs`, for objective.target labels."""
    weights: tuple[float, ...] = ()
    """Passes over each of `dirs` in one epoch (2 is twice, 0.5 every other utterance); empty is one pass each."""
    valid_dirs: tuple[str, ...] = ()
    """Shard folders to validate on. If empty, `valid_fraction` of the training utterances is held out."""
    valid_labels: tuple[str, ...] = ()
    """Label folders of `valid_dirs`."""
    valid_fraction: float = 0.01
    """Fraction of the utterances held out, by a hash of their index in the folder; 0 disables validation."""
    valid_seconds: float = 1_200.0
    """Maximum seconds of audio of one validation."""
    valid_frames: int = 0
    """Maximum number of frames of one validation; 0: `valid_seconds` at the codec's frame rate."""
    num_codebooks: int | None = None
    """Number of codebooks to read from the shards, starting with the first; null reads all."""
    codec_weights: str | None = None
    """Path of the codec's weights, if they have moved from the path in the shards' card."""
    batch_seconds: float = 2_800.0
    """Seconds of audio of a global batch, over all ranks and accumulation steps."""
    batch_frames: int = 0
    """Frames of a global batch; 0: `batch_seconds` at the codec's frame rate."""
    auto_batch: bool = False
    """Raise `engine.accumulation` until a micro-batch fits into memory (`--data.batch_frames auto`)."""
    crop_seconds: float = 15.6
    """Maximum length of a piece; longer utterances are cut into several pieces."""
    crop_frames: int = 0
    """Maximum length of a piece, frames; 0: `crop_seconds` at the codec's frame rate."""
    min_seconds: float = 0.4
    """Minimum length of an utterance; shorter ones are skipped and counted."""
    min_frames: int = 0
    """Minimum length of an utterance, frames; 0: `min_seconds` at the codec's frame rate, at least two spans."""
    bucket_ratio: float = 1.04
    """Approximate maximum ratio of the lengths of two utterances in a batch."""
    workers: int = 2
    """Threads that read and mask batches."""
    prefetch: int = 4
    """Number of batches prepared in advance."""

    def __post_init__(self) -> None:
        for key in ("workers", "prefetch"):
            _at_least(f"data.{key}", getattr(self, key), 1)
        for key in ("crop", "min", "batch", "valid"):
            _at_least(f"data.{key}_frames", getattr(self, f"{key}_frames"), 0)
            _above_zero(f"data.{key}_seconds", getattr(self, f"{key}_seconds"))
        for weight in self.weights:
            _at_least("data.weights", weight, 0.0)
        _probability("data.valid_fraction", self.valid_fraction)
        if self.num_codebooks is not None:
            _at_least("data.num_codebooks", self.num_codebooks, 1)
        if self.bucket_ratio <= 1.0:
            raise UserError(f"data.bucket_ratio: {self.bucket_ratio}, must be above 1")
        if 0 < self.crop_frames < self.min_frames:
            raise UserError(f"data.crop_frames: {self.crop_frames}, is below data.min_frames ({self.min_frames})")
        if 0 < self.batch_frames < 2 * self.crop_frames:
            raise UserError(
                f"data.batch_frames: {self.batch_frames}, must be at least twice data.crop_frames"
                f" ({self.crop_frames}); raise it or lower the crop"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule: HuBERT's polynomial decay, DinoSR's tri-stage, or constant."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw: for all weights. muon: Muon (Jordan et al. 2024) for the matrices of the Transformer layers, scaled so
    that `lr` means the same as for AdamW (Liu et al. 2025, arXiv 2502.16982), and AdamW for all other weights."""
    momentum: float = 0.95
    """Momentum of Muon."""
    start_from: str | None = None
    """Folder of an exported model, or name of a shipped one, from which the encoder is initialised, as in EnCodecMAE's
    self-training. Heads and decoders are always new. null is random initialisation."""
    steps: int = 400_000
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    """Maximum norm of the gradient; 0 disables clipping."""
    schedule: Literal["polynomial", "tri_stage", "constant"] = "polynomial"
    warmup_fraction: float = 0.08
    """Fraction of the steps over which the learning rate rises from 1 % of `lr` to `lr`, in every schedule."""
    hold_fraction: float = 0.47
    """Fraction of the steps at the full learning rate (tri_stage)."""
    final_scale: float = 0.01
    """Final learning rate as a fraction of `lr` (polynomial, tri_stage)."""

    def __post_init__(self) -> None:
        _at_least("optim.steps", self.steps, 1)
        for key in ("lr", "eps", "final_scale"):
            _above_zero(f"optim.{key}", getattr(self, key))
        for key in ("weight_decay", "clip_norm"):
            _at_least(f"optim.{key}", getattr(self, key), 0.0)
        for beta in self.betas:
            _probability("optim.betas", beta)
        _probability("optim.momentum", self.momentum)
        for key in ("warmup_fraction", "hold_fraction"):
            _probability(f"optim.{key}", getattr(self, key))
        if self.schedule == "tri_stage" and self.warmup_fraction + self.hold_fraction > 1.0:
            raise UserError(
                f"optim.hold_fraction: {self.hold_fraction}, with the warm-up"
                f" ({self.warmup_fraction}) must not be above 1"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Complete configuration of a pretraining run."""

    seed: int = 1
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    mae: MaeConfig = field(default_factory=MaeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: {self.seed}, must be at least 0 and below 2**63")
        if 0 < self.data.min_frames < 2 * self.mask.span_frames:
            raise UserError(
                f"data.min_frames: {self.data.min_frames}, must be at least two spans"
                f" (mask.span_frames: {self.mask.span_frames}), or whole utterances are masked"
            )
        if self.model.positions == "rotary" and self.data.crop_frames > self.model.rotary_max_frames:
            raise UserError(
                f"data.crop_frames: {self.data.crop_frames}, must be at most model.rotary_max_frames"
                f" ({self.model.rotary_max_frames}) with rotary positions"
            )
        self._check_target()
        if self.objective.mel_weight and (self.objective.name != "encodecmae" or self.model.input == "codes"):
            raise UserError(
                f"objective.mel_weight: {self.objective.mel_weight}, needs objective.name encodecmae and model.input"
                " mel or both; set it to 0"
            )
        self._check_contrasts()
        self._check_muon()
        if self.objective.name == "encodecmae":
            self._check_encodecmae()
        if self.objective.target == "online":
            self._check_online()

    def _check_target(self) -> None:
        target = self.objective.target
        if target != "labels" and (self.data.labels or self.data.valid_labels):
            raise UserError(f"data.labels: given, but objective.target is {target}; add --objective.target labels")
        if (self.objective.name == "encodecmae" or target == "online") and self.objective.visible_weight:
            raise UserError(
                f"objective.visible_weight: {self.objective.visible_weight}, applies to codec2vec with codes or labels;"
                " set mae.masked_weight for encodecmae"
            )

    def _check_contrasts(self) -> None:
        objective = self.objective
        fits = objective.name == "codec2vec" and objective.target != "online"
        if objective.contrast_weight and not (fits and self.model.input != "codes"):
            raise UserError(
                f"objective.contrast_weight: {objective.contrast_weight}, needs objective.name codec2vec, targets codes"
                " or labels, and model.input mel or both; set it to 0"
            )
        if objective.utterance_weight and not fits:
            raise UserError(
                f"objective.utterance_weight: {objective.utterance_weight}, needs objective.name codec2vec, and targets"
                " codes or labels; set it to 0"
            )

    def _check_muon(self) -> None:
        fits = 1 if self.engine.precision == "bf16" else 0
        if self.optim.name == "muon" and self.engine.zero_stage not in (None, fits):
            raise UserError(
                f"engine.zero_stage: {self.engine.zero_stage}, but with optim.name muon it must be {fits} in"
                f" {self.engine.precision}, or null"
            )

    def _check_online(self) -> None:
        model, online = self.model, self.online
        if online.top_layers > model.layers:
            raise UserError(f"online.top_layers: {online.top_layers}, the model has {model.layers} layers; lower it")
        if online.variant == "spidr" and model.layerdrop > 0.0:
            raise UserError(f"model.layerdrop: {model.layerdrop}, spidr needs every layer; set it to 0")
        if self.objective.gamma != "uniform":
            raise UserError(f"objective.gamma: {self.objective.gamma}, but all online clusters have the same weight")
        if self.objective.head != "linear":
            raise UserError(f"objective.head: {self.objective.head}, but online clusters have linear heads")

    def _check_encodecmae(self) -> None:
        if self.objective.target == "online":
            raise UserError("objective.target: online, but encodecmae predicts codes or labels")
        width = self.model.dim // self.model.heads
        if (self.mae.decoder_dim or width) % width:
            raise UserError(
                f"mae.decoder_dim: {self.mae.decoder_dim}, must be a multiple of the width of a head ({width})"
            )
        if self.model.positions != "sinusoidal":
            raise UserError(
                f"model.positions: {self.model.positions}, but encodecmae removes frames; use sinusoidal, which are"
                " added before that"
            )
