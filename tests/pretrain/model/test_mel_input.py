"""Models that read the log-mel plane: their inputs, hidden frames, and equal outputs after export."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from codecssl.configs.load import from_dict
from codecssl.pretrain.bench import make_batch, make_objective
from codecssl.pretrain.config import ModelConfig, RunConfig
from codecssl.pretrain.data.open_data import open_data
from codecssl.pretrain.export.export import export, load_pretrained
from codecssl.pretrain.labels.label import LabelConfig, label
from codecssl.pretrain.labels.labellers import Extractor
from codecssl.pretrain.model.model import untrained
from codecssl.pretrain.ranks import Ranks
from codecssl.pretrain.run import run
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.records import EncodedUtterance
from codecssl.tokenize.format.writer import ShardWriter, finish_dataset
from codecssl.tokenize.mel import MelSpec
from codecssl.tokenize.shards import Shards

CARD = CodecCard(
    name="synthetic", weights="none", weights_sha256="0" * 64, sample_rate=16_000, hop_length=320,
    codebook_sizes=(16, 12, 8), codes_per_frame=(1, 1, 1), latent_dim=12,
)  # fmt: skip
SPEC = MelSpec.for_codec(8, CARD)
ONE = Ranks(rank=0, world_size=1, local_rank=0)
MODEL = dict(dim=32, layers=2, heads=2, ffn_dim=48, conv_kernel=8, conv_groups=4, embedding_init="random")


@pytest.fixture
def shards(tmp_path):
    random, utterances = np.random.default_rng(0), []
    for number in range(40):
        frames = int(random.integers(30, 90))
        utterances.append(
            EncodedUtterance(
                id=f"u{number}", path=f"u{number}", source_sha256="0" * 64, source_rate=16_000,
                samples=frames * 320, source_samples=frames * 320,
                codes=[random.integers(0, size, frames).astype(np.uint16) for size in CARD.codebook_sizes],
                mel=random.integers(0, 256, (frames, 8)).astype(np.uint8),
            )
        )  # fmt: skip
    writer = ShardWriter(tmp_path / "shards", 0, CARD)
    writer.add_block(40, utterances, [])
    writer.finish("0" * 64)
    header = {"codec": CARD.to_dict(), "sources": [], "mel": SPEC.to_dict()}
    finish_dataset(tmp_path / "shards", header, 1)
    return tmp_path / "shards", utterances


def config(shards, objective, model_input):
    exact = objective == "encodecmae"
    return from_dict(RunConfig, {
        "model": MODEL | {"input": model_input} | ({"positions": "sinusoidal"} if exact else {}),
        "mask": {"kind": "exact" if exact else "spans", "span_frames": 10},
        "objective": {"name": objective, "quantizer_dropout": 0.0},
        "data": {"dirs": [str(shards)], "batch_frames": 400, "crop_frames": 60, "min_frames": 20,
                 "valid_fraction": 0.1},
        "optim": {"steps": 4, "lr": 1e-3}, "log": {"log_every": 2, "valid_every": 2, "checkpoint_every": 2},
    })  # fmt: skip


@pytest.mark.parametrize("model_input", ["mel", "both"])
@pytest.mark.parametrize("objective", ["codec2vec", "encodecmae"])
def test_masked_columns_of_the_plane_never_reach_the_model(shards, objective, model_input):
    from dataclasses import replace

    from codecssl.pretrain.build import build

    made = config(shards[0], objective, model_input)
    train, _, corpus = open_data(made, ONE)
    [batch] = train.step(0)
    model = build(made, corpus, fresh=True).eval()
    hidden = batch.mask.expand_as(batch.mel)
    other = replace(batch, mel=torch.where(hidden, 255 - batch.mel, batch.mel))
    seen = replace(batch, mel=torch.where(hidden, batch.mel, 255 - batch.mel))
    loss = model(batch).total
    assert torch.equal(model(other).total, loss)
    assert not torch.equal(model(seen).total, loss)


def test_batches_hold_the_stored_plane(shards):
    folder, utterances = shards
    train, _, _ = open_data(config(folder, "codec2vec", "mel"), ONE)
    [batch] = train.step(0)
    planes = [u.mel.T for u in utterances]
    for own in batch.mel.split(batch.frames, 1):
        frames, own = own.shape[1], own.numpy()
        assert any(np.array_equal(plane[:, s : s + frames], own) for plane in planes for s in range(plane.shape[1]))


@pytest.mark.parametrize("model_input", ["mel", "both"])
def test_a_run_trains_resumes_exports_and_loads(shards, tmp_path, model_input):
    run(config(shards[0], "encodecmae", model_input), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    model = load_pretrained(tmp_path / "model")
    assert model.mel_spec == SPEC
    codes, mel = torch.zeros(2, 3, 9, dtype=torch.int64), torch.randint(0, 256, (2, 8, 9), dtype=torch.uint8)
    states = model.extract(codes, [9, 5], mel)
    alone = model.extract(codes[1:, :, :5], [5], mel[1:, :, :5])
    assert torch.allclose(states[-1][1, :5], alone[-1][0], atol=1e-5)
    with pytest.raises(UserError, match="mel: none"):
        model.extract(codes, [9, 5])


def test_projection_is_the_affine_map_of_the_stored_values():
    model = untrained(ModelConfig(**MODEL, input="mel", positions="sinusoidal"), CARD, None, 0, SPEC).eval()
    mel = torch.randint(0, 256, (8, 5), dtype=torch.uint8)
    linear = model.mel_projection.linear
    expected = ((mel.T.double() - 80) / 48) @ linear.weight.double().T + linear.bias.double()
    assert torch.allclose(model._embedded(torch.zeros(3, 5), None, mel).double(), expected, atol=1e-5)


def test_shards_without_a_plane_are_refused(make_shards, small_config):
    with pytest.raises(UserError, match="has no log-mel plane; tokenize the audio with --with-mel 80"):
        open_data(small_config(make_shards(), model={"input": "mel"}), ONE)


def test_a_start_from_a_model_of_another_plane_is_one_line(shards, tmp_path):
    from dataclasses import replace

    from codecssl.pretrain.build import build

    made = config(shards[0], "encodecmae", "mel")
    run(made, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    description = json.loads((tmp_path / "model" / "config.json").read_text())
    text = (tmp_path / "model" / "README.md").read_text()
    assert "model(codes, mel=mel, output_hidden_states=True)" in text
    assert "--with-mel 8 --mel-scale htk`" in text
    description["mel"]["window"] += 2
    (tmp_path / "model" / "config.json").write_text(json.dumps(description))
    _, _, corpus = open_data(made, ONE)
    other = replace(made, optim=replace(made.optim, start_from=str(tmp_path / "model")))
    with pytest.raises(UserError, match=r"optim\.start_from.*\(window \d+ against \d+\).*--with-mel 8 --mel-scale htk"):
        build(other, corpus, fresh=True)


@pytest.mark.parametrize("model_input", ["mel", "both"])
def test_the_bench_makes_planes(model_input):
    made = config("unused", "encodecmae", model_input)
    batch = make_batch(made, CARD, 4.0, 2.0)
    assert (batch.frames, batch.mel.shape) == ([100, 100], (80, 200))
    loss = make_objective(made, CARD)(batch).total
    assert torch.isfinite(loss)


@pytest.mark.parametrize("model_input", ["mel", "both"])
def test_labels_of_a_model_that_reads_the_plane(shards, tmp_path, model_input):
    run(config(shards[0], "codec2vec", model_input), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    model, stored = load_pretrained(tmp_path / "model"), Shards(shards[0])
    extract = Extractor(str(tmp_path / "model"), -1, stored.card, device="cpu")
    [features] = extract.features(stored, [3])
    codes = torch.from_numpy(stored.codes(3).astype(np.int64))[None]
    expected = model.extract(codes, [codes.shape[2]], torch.from_numpy(stored.mel(3).T.copy())[None])[-1][0]
    assert np.allclose(features, expected.numpy(), atol=1e-6)
    made = LabelConfig(source=str(tmp_path / "model"), data=(shards[0],), output=tmp_path / "labels", clusters=4,
                       sample_frames=400)  # fmt: skip
    label(made, say=lambda text: None)
    assert np.array_equal(Shards(tmp_path / "labels").frames, stored.frames)


def test_concatenated_inputs_stand_apart_in_the_first_hidden_state():
    """Half of the columns follow the codes alone, the other half the plane alone, each by its own projection."""
    settings = MODEL | {"input": "both", "positions": "rotary", "norm": "pre", "fusion": "concat"}
    model = untrained(ModelConfig(**settings), CARD, None, 0, SPEC)
    random = np.random.default_rng(0)
    codes = torch.from_numpy(np.stack([random.integers(0, size, (1, 9)) for size in CARD.codebook_sizes], axis=1))
    mel = torch.from_numpy(random.integers(0, 256, (1, 8, 9)).astype(np.uint8))
    first = model.extract(codes, [9], mel)[0]
    assert first.shape == (1, 9, 32)
    other_codes, other_mel = model.extract(codes * 0, [9], mel)[0], model.extract(codes, [9], mel // 2)[0]
    assert torch.equal(other_codes[..., 16:], first[..., 16:])
    assert torch.equal(other_mel[..., :16], first[..., :16])
    assert not torch.isclose(other_codes[..., :16], first[..., :16]).all()
    weight, bias = model.mel_projection.linear.weight.double(), model.mel_projection.linear.bias.double()
    expected = (mel[0].T.double() - 80.0) / 48.0 @ weight.T + bias
    torch.testing.assert_close(first[0, :, 16:].double(), expected, atol=1e-5, rtol=1e-5)


def test_concatenation_needs_both_inputs():
    with pytest.raises(UserError, match=r"model\.fusion: concat, needs model\.input both"):
        ModelConfig(fusion="concat", input="mel")


def test_a_frozen_front_stays_as_it_was_through_training(shards, tmp_path):
    folder, _ = shards
    made = config(folder, "encodecmae", "both")
    made = replace(made, model=replace(made.model, freeze_front=True))
    run(made, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    after = load_pretrained(tmp_path / "model").state_dict()
    before = untrained(made.model, CARD, None, made.seed, SPEC).state_dict()
    front = [name for name in before if name.startswith(("embedding", "input_norm", "projection", "mel_projection"))]
    assert len(front) == 7
    assert all(torch.equal(after[name], before[name]) for name in front)
    assert not torch.equal(
        after["encoder.layers.0.ffn.inner_proj.weight"], before["encoder.layers.0.ffn.inner_proj.weight"]
    )
