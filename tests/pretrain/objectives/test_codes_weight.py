"""Codes as a second target next to labels: its part of the loss, by hand, and its initial heads."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from codecssl.pretrain.build import build
from codecssl.pretrain.config import ModelConfig, ObjectiveConfig, RunConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.data.open_data import open_data
from codecssl.pretrain.model.model import untrained
from codecssl.pretrain.objectives.codec2vec import MaskedPrediction
from codecssl.pretrain.objectives.targets import make_target
from codecssl.pretrain.ranks import Ranks
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError

CARD = CodecCard(
    name="synthetic", weights="none", weights_sha256="0", sample_rate=16_000, hop_length=320,
    codebook_sizes=(16, 8), codes_per_frame=(1, 1), latent_dim=10,
)  # fmt: skip


def test_it_is_the_mean_over_codebooks_and_masked_frames_in_training_alone() -> None:
    shape = ModelConfig(dim=16, layers=1, heads=2, ffn_dim=16, conv_kernel=4, conv_groups=2, layerdrop=0.0,
                        dropout=0.0, input_dropout=0.0, attention_dropout=0.0)  # fmt: skip
    random = torch.Generator().manual_seed(0)
    mask = torch.arange(25) % 3 == 0
    codes = torch.stack([torch.randint(0, size, (25,), generator=random) for size in (16, 8)])
    labels = torch.randint(0, 5, (1, 25), generator=random)
    elsewhere = 4 * int(mask.sum())  # masked frames of the whole batch: this micro-batch has a quarter
    batch = Batch.of(codes, [12, 5, 8], mask, torch.ones(2, 25, dtype=torch.bool), elsewhere, 64, labels)
    made = {}
    for weight in (0.0, 0.5):
        config = ObjectiveConfig(target="labels", codes_weight=weight)
        torch.manual_seed(1)
        made[weight] = MaskedPrediction(untrained(shape, CARD, None, seed=0), make_target(config, CARD, (5,)), config)
    made[0.5].heads.load_state_dict(made[0.0].heads.state_dict())
    heads = made[0.5].code_heads
    torch.nn.init.normal_(heads.projection.weight)
    torch.nn.init.normal_(heads.from_context)
    assert made[0.5].eval()(batch).total.item() == pytest.approx(made[0.0].eval()(batch).total.item(), rel=1e-6)
    hidden = made[0.5].model(batch.codes, batch.frames, batch.mask, batch.kept)
    query = heads.projection(hidden[mask]).view(-1, 2, 10)
    first, second = heads.classes.split([16, 8])
    known = heads.known.split([16, 8])[0][codes[0, mask]]
    scale = heads.log_scale.exp() / 10**0.5
    logits = [
        query[:, 0] @ first.t() * scale[0] + heads.bias[:16],
        (query[:, 1] + known @ heads.from_context[1]) @ second.t() * scale[1] + heads.bias[16:],
    ]
    by_hand = sum(F.cross_entropy(own, codes[k, mask]).item() for k, own in enumerate(logits)) / 2
    trained = made[0.5].train()(batch).total
    assert trained.item() == pytest.approx(made[0.0].train()(batch).total.item() + 0.5 * 0.25 * by_hand, rel=1e-5)
    trained.backward()
    assert heads.from_context.grad is not None
    assert heads.from_context.grad.abs().sum() > 0


def test_its_heads_start_at_the_codebooks_and_the_unigram(
    trained: Path, small_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(
        trained / "shards", data={"labels": [str(trained / "labels")]},
        objective={"target": "labels", "codes_weight": 1.0},
    )  # fmt: skip
    corpus = open_data(config, Ranks(rank=0, world_size=1, local_rank=0))[0].corpus
    tables = [torch.randn(size, corpus.card.latent_dim) for size in (16, 12, 8)]
    codec = SimpleNamespace(embeddings=lambda: tables)
    monkeypatch.setattr("codecssl.pretrain.build.load_codec_for", lambda card, weights=None: codec)
    objective = build(config, corpus, fresh=True)
    assert isinstance(objective, MaskedPrediction)
    counts = [torch.zeros(size) for size in (16, 12, 8)]
    for index in range(len(corpus.frames)):
        for own, row in zip(counts, corpus.codes(index, 0, int(corpus.frames[index])), strict=True):
            own += torch.bincount(torch.from_numpy(row.astype("int64")), minlength=len(own))
    for own, table in zip(objective.code_heads.classes.split([16, 12, 8]), tables, strict=True):
        assert torch.allclose(own, table / table.square().mean().sqrt(), atol=1e-6)
    for bias, own in zip(objective.code_heads.bias.split([16, 12, 8]), counts, strict=True):
        assert torch.allclose(bias.softmax(0), (own + 0.5) / (own + 0.5).sum(), atol=1e-5)
    assert float(objective.code_heads.projection.weight.abs().max()) == 0.0


@pytest.mark.parametrize("values", [{"target": "codes"}, {"target": "labels", "name": "encodecmae"}])
def test_it_needs_codec2vec_with_labels(values: dict[str, str]) -> None:
    with pytest.raises(UserError, match="objective.codes_weight: 0.5, needs objective.name codec2vec and"):
        ObjectiveConfig(codes_weight=0.5, **values)  # type: ignore[arg-type]
