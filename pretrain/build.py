"""Model and objective as the config names them."""

import torch
from torch import Tensor

from codecssl.pretrain.config import ModelConfig, RunConfig
from codecssl.pretrain.corpus import Corpus
from codecssl.pretrain.mae import EncodecMae
from codecssl.pretrain.masked import MaskedPrediction
from codecssl.pretrain.model import CodecModel, untrained
from codecssl.pretrain.objective import Objective
from codecssl.pretrain.online import OnlineClusters
from codecssl.pretrain.targets import make_target
from codecssl.tokenize.codec import Codec, load_codec_for, stored_tables


def build(config: RunConfig, corpus: Corpus, *, from_codec: bool) -> Objective:
    """Model and heads. from_codec: fill the embeddings as the config says; a resumed run has them already."""
    tables = None
    if from_codec and config.model.embedding_init != "random":
        tables = first_tables(config.model, load_codec_for(corpus.card, weights=config.data.codec_weights))
    model = untrained(config.model, corpus.card, tables, config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        return build_objective(config, model, corpus.label_sizes)


def first_tables(config: ModelConfig, codec: Codec) -> list[Tensor] | None:
    """What the code embeddings start from, R tables [V_k, width]; None is noise."""
    if config.embedding_init == "random":
        return None
    return stored_tables(codec) if config.embedding_init == "raw" else codec.embeddings()


def build_objective(config: RunConfig, model: CodecModel, label_sizes: tuple[int, ...] = ()) -> Objective:
    """Heads, and what else the config's objective puts around the model. label_sizes: of the label folders."""
    if config.objective.target == "online":
        return OnlineClusters(model, config.online, config.optim.steps)
    target = make_target(config.objective, model.card, label_sizes)
    assert target is not None
    if config.objective.name == "encodecmae":
        return EncodecMae(model, target, config.objective, config.mae)
    return MaskedPrediction(model, target, config.objective)
