"""The embedded codec: its weights, how they are folded, and its training."""

import json

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from codecssl.tokenize.backends import tiny_16khz
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.codec_training import train
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec, load_codec_for


def test_the_shipped_codec_matches_its_name():
    card = load_codec("tiny_16khz").card
    assert (card.sample_rate, card.hop_length, card.frame_rate) == (16_000, 320, 50)
    assert card.codebook_sizes == (1024,) * 8
    assert card.bits_per_second == 4000
    assert tiny_16khz.WEIGHTS.stat().st_size < 6_000_000
    assert CodecCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card


def test_fewer_codebooks_are_the_first_ones():
    audio = torch.from_numpy(np.random.default_rng(0).standard_normal(16_000).astype("f4") * 0.1)
    whole, three = load_codec("tiny_16khz"), load_codec("tiny_16khz", num_codebooks=3)
    assert torch.equal(whole.encode([audio])[0].codes[:3], three.encode([audio])[0].codes)


def test_a_card_refuses_other_weights(codec_file):
    card = load_codec("tiny_16khz").card
    assert load_codec_for(card).card == card
    with pytest.raises(UserError, match="has weights .* the data was written with"):
        load_codec_for(card, weights=str(codec_file))


def test_folded_weights_match_the_trained_network(tmp_path):
    torch.manual_seed(0)
    model = tiny_16khz.build_network(weight_norm=True)
    for parameter in model.parameters():  # values that float16 holds, so that only the folding can differ
        parameter.data.copy_(parameter.data.half().float())
    tiny_16khz.mark_initialised(model)
    tiny_16khz.save_weights(model, tmp_path / "w.safetensors", {})
    folded = tiny_16khz.load_network(tmp_path / "w.safetensors")
    audio = torch.randn(1, 1, 3200) * 0.1
    with torch.no_grad():
        torch.testing.assert_close(folded.encoder(audio), model.eval().encoder(audio), rtol=2e-2, atol=2e-4)


def test_other_weights_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="not the weights of tiny_16khz"):
        load_codec(str(tmp_path / "w.safetensors"))


@pytest.fixture
def manifest(tmp_path):
    rows = []
    for i in range(30):
        t, rng = np.arange(16_000) / 16_000, np.random.default_rng(i)
        tone = np.sin(2 * np.pi * rng.uniform(100, 2000) * t) * np.sin(2 * np.pi * 3 * t)
        soundfile.write(tmp_path / f"{i}.wav", (0.2 * tone + 0.02 * rng.standard_normal(16_000)).astype("f4"), 16_000)
        rows.append({"path": f"{i}.wav", "task": "x", "speaker": f"s{i}"})
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "m.jsonl"


def test_training_lowers_the_loss_and_resumes_where_it_stopped(manifest, tmp_path, monkeypatch):
    config = train.CodecTrainConfig(steps=14, warmup_steps=8, batch_size=2)
    monkeypatch.setattr(train, "SAVE_EVERY", 9)
    monkeypatch.setattr(train, "FIT_BATCHES", 2)
    whole = train.train_codec(manifest, tmp_path / "whole", config)
    losses = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert losses[-1]["guided"] < losses[0]["guided"]

    class KilledError(Exception):
        pass

    def stop(step, *_):
        if step == 11:
            raise KilledError
        return 1e-3

    real = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, c: stop(step) and real(step, c))
    with pytest.raises(KilledError):
        train.train_codec(manifest, tmp_path / "part", config)
    monkeypatch.setattr(train, "learning_rate", real)
    part = load_file(train.train_codec(manifest, tmp_path / "part", config))
    assert all(torch.equal(value, part[key]) for key, value in load_file(whole).items())


def test_held_out_speakers_are_never_trained_on(manifest, tmp_path):
    pool = train.AudioPool(manifest, tmp_path / "pool", lambda path: np.zeros(16_000, np.float32))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    held_out = {row["speaker"] for row in rows if train.is_held_out(row)}
    assert held_out
    assert held_out.isdisjoint(row["speaker"] for row in pool.rows)
    assert len(held_out) + len(pool.rows) == len(rows)


def test_the_guide_is_causal():
    waves = torch.randn(3, 1, 6400)
    guide = train.Guide(waves)
    changed = waves.clone()
    changed[..., 3200:] = 0
    assert guide(waves).shape == (3, 64, 20)
    assert torch.equal(guide(waves)[..., :10], guide(changed)[..., :10])
    assert not torch.equal(guide(waves)[..., 10], guide(changed)[..., 10])
