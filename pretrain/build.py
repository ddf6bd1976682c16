"""Construction of the model and the objective from a config."""

import torch
from torch import Tensor

from codecssl.configs.load import differences
from codecssl.pretrain.config import ModelConfig, RunConfig
from codecssl.pretrain.data.corpus import TokenCorpus
from codecssl.pretrain.export.export import load_pretrained
from codecssl.pretrain.model.model import CodecModel, untrained
from codecssl.pretrain.objectives.codec2vec import MaskedPrediction
from codecssl.pretrain.objectives.dinosr import OnlineClusters
from codecssl.pretrain.objectives.encodecmae import EncodecMae
from codecssl.pretrain.objectives.heads import CodebookHeads, log_unigram
from codecssl.pretrain.objectives.objective import Objective
from codecssl.pretrain.objectives.targets import Codes, Digits, make_target
from codecssl.tokenize.codec import Codec, stored_tables
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec_for

_NO_SHAPE = {"dropout", "input_dropout", "attention_dropout", "activation_dropout", "layerdrop",
             "embedding_init", "layer_init", "freeze_embedding", "freeze_front",
             "rotary_max_frames"}  # fmt: skip
"""Model settings that do not affect the names and shapes of the weights."""

_COUNTED = 2_000
"""Number of utterances from which the initial bias of the heads is estimated."""


def build(config: RunConfig, corpus: TokenCorpus, *, fresh: bool) -> Objective:
    """Build the model and the heads.

    fresh: initialise the weights from the config. A resumed run loads them from its checkpoint instead.
    """
    tables, start_from = None, config.optim.start_from if fresh else None
    if fresh and not start_from and config.model.embedding_init != "random" and config.model.input != "mel":
        tables = first_tables(config.model, load_codec_for(corpus.card, weights=config.data.codec_weights))
    model = untrained(config.model, corpus.card, tables, config.seed, corpus.require_mel(config.model.input))
    if start_from:
        _take_weights(model, start_from)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        objective = build_objective(config, model, corpus.label_sizes)
    if fresh and (config.objective.head == "codebook" or config.objective.codes_weight):
        codec = load_codec_for(corpus.card, weights=config.data.codec_weights)
        heads, target = (
            (objective.code_heads, objective.codes) if config.objective.codes_weight
            else (objective.heads, objective.target)
        )  # fmt: skip
        assert isinstance(target, Codes | Digits)
        assert isinstance(heads, CodebookHeads)
        heads.start(target.tables(codec.embeddings()), log_unigram(target.counts(_code_counts(corpus))))
    return objective


def _code_counts(corpus: TokenCorpus) -> list[Tensor]:
    """Histogram of each row of codes, int64 [V_k], over up to `_COUNTED` evenly spaced utterances."""
    counts = [torch.zeros(size, dtype=torch.int64) for size in corpus.card.row_sizes]
    for index in torch.linspace(0, len(corpus.frames) - 1, min(_COUNTED, len(corpus.frames))).long().tolist():
        codes = torch.from_numpy(corpus.codes(index, 0, int(corpus.frames[index])).astype("int64"))
        for row, count in zip(codes, counts, strict=True):
            count += torch.bincount(row, minlength=len(count))
    return counts


def _take_weights(model: CodecModel, start_from: str) -> None:
    """Load the weights of an exported model of the same codec and the same shape."""
    other = load_pretrained(start_from)
    if other.card.fingerprint != model.card.fingerprint:
        raise UserError(
            f"optim.start_from: {start_from} was trained on codec {other.card.name}, the data is of {model.card.name}"
            f" ({other.card.difference(model.card)}); give a model of the same codec"
        )
    for key, (mine, theirs) in differences(model.config, other.config).items():
        if key not in _NO_SHAPE:
            raise UserError(
                f"optim.start_from: {start_from} has model.{key} {theirs}, this run {mine}; make them equal"
            )
    own = model.mel_spec
    if (spec := other.mel_spec) and own and spec != own:  # both are there, or model.input would differ
        raise UserError(
            f"optim.start_from: {start_from} reads another log-mel plane than the data has ({spec.difference(own)});"
            f" tokenize the audio with {spec.options}"
        )
    model.load_state_dict(other.state_dict())


def first_tables(config: ModelConfig, codec: Codec) -> list[Tensor] | None:
    """Initial code embeddings, R tables [V_k, width]; None for noise."""
    if config.embedding_init == "random":
        return None
    return stored_tables(codec) if config.embedding_init == "raw" else codec.embeddings()


def build_objective(config: RunConfig, model: CodecModel, label_sizes: tuple[int, ...] = ()) -> Objective:
    """Wrap the model in the config's objective with its heads.

    label_sizes: number of classes of each stream of the label folders.
    """
    if config.objective.target == "online":
        return OnlineClusters(model, config.online, config.optim.steps)
    target = make_target(config.objective, model.card, label_sizes)
    assert target is not None
    if config.objective.name == "encodecmae":
        return EncodecMae(model, target, config.objective, config.mae)
    return MaskedPrediction(model, target, config.objective)
