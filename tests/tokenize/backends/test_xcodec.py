"""Our segments and our pieces against transformers' own X-codec, on small random networks."""

import json
from functools import partial

import helpers
import numpy as np
import pytest
import random_models
import torch
import transformers

from codecssl.tokenize.backends import xcodec
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

HOP = 320


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """3 s whole, segments of 2 s, pieces of 0.25 s."""
    monkeypatch.setattr(xcodec, "WHOLE_SECONDS", 3)
    monkeypatch.setattr(xcodec, "SEGMENT_SECONDS", 2)
    monkeypatch.setattr(xcodec, "PIECE_STEPS", 100)


wave = partial(helpers.wave, rate=16_000, levels=(0.1, 0.9), noise=0.5)


def as_codec(model, count=8):
    return xcodec.XcodecCodec(model, xcodec.make_card("xcodec", "test", model, count, "cpu"))


def plainly(model, audio):
    """Codes by the documentation of transformers: the feature extractor, then encode."""
    extractor = transformers.DacFeatureExtractor(sampling_rate=16_000, hop_length=HOP)
    inputs = extractor(raw_audio=audio.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    return model.encode(torch.as_tensor(inputs, dtype=model.dtype)).audio_codes[0]


@pytest.fixture(scope="module")
def exact():
    """The comparison is in float64, where rounding cannot hide a wrong frame."""
    return random_models.xcodec_model()


@pytest.mark.parametrize("samples", [1, 79, HOP - 1, HOP, HOP + 1, 399, 400, 5000, 16_000, 44_321, 48_000])
def test_a_wave_of_up_to_the_limit_is_encoded_as_by_transformers(exact, samples):
    codec, audio = as_codec(exact), wave(samples)
    expected = plainly(exact, audio)
    assert torch.equal(codec.encode([audio])[0].codes, expected)
    assert torch.equal(codec.encode_reference(audio), expected)
    assert expected.shape == (8, -(-samples // HOP)) == (8, codec.card.frames_of(samples))


def test_pieces_of_the_first_blocks_give_the_latents_of_the_whole(exact, monkeypatch):
    codec, audio = as_codec(exact), wave(40_000).double()
    own = random_models.xcodec_latents(exact, audio[None, None])
    assert len(plainly(exact, audio)[0].unique()) > 10  # the random network does tell things apart
    torch.testing.assert_close(codec._latents(audio[None]), own, rtol=0, atol=1e-10)
    monkeypatch.setattr(xcodec, "FRONT_CONTEXT", xcodec.FRONT_CONTEXT - 1)
    assert (codec._latents(audio[None]) - own).abs().max() > 1e-10  # so the context is not too long either


@pytest.mark.parametrize(
    ("samples", "lengths"),
    [
        (48_001, [32_000, 16_001]),
        (64_000, [32_000, 32_000]),
        (80_000, [32_000, 48_000]),
        (80_001, [32_000, 32_000, 16_001]),
    ],
)
def test_a_longer_wave_is_encoded_in_segments_each_for_itself(exact, samples, lengths):
    codec, audio = as_codec(exact), wave(samples)
    expected = torch.cat([plainly(exact, part) for part in audio.split(lengths)], dim=1)
    assert torch.equal(codec.encode([audio])[0].codes, expected)
    assert expected.shape[1] == codec.card.frames_of(samples)


def test_any_cut_of_the_stream_and_any_batch_give_the_same_codes():
    """The comparison is in float32, which users run."""
    codec = as_codec(random_models.xcodec_model().float())
    waves = [wave(n, seed) for seed, n in enumerate([1, 300, HOP, 5 * HOP + 1, 47_999, 90_000])]
    for audio, codes in zip(waves, helpers.codes_of(codec, waves)):
        assert torch.equal(codec.encode([audio])[0].codes, codes)
        stream, pieces, at = codec.stream(), [], 0
        rng = np.random.default_rng(len(audio))
        while at < len(audio):
            size = int(rng.integers(1, 60_000))
            pieces.append(stream.push(audio[at : at + size]))
            at += size
        assert torch.equal(torch.cat([*pieces, stream.finish()], 1), codes)
        assert stream.finish().shape == (8, 0)


def test_in_float32_few_codes_differ_from_transformers():
    model = random_models.xcodec_model().float()
    audio = wave(48_000)
    differing = (as_codec(model).encode([audio])[0].codes != plainly(model, audio)).float().mean()
    assert differing < 0.005


def test_fewer_codebooks_are_the_first_rows(exact):
    audio, whole = wave(20_000), as_codec(exact)
    some = as_codec(exact, 3)
    assert torch.equal(some.encode([audio])[0].codes, whole.encode([audio])[0].codes[:3])
    assert torch.equal(some.encode_reference(audio), whole.encode_reference(audio)[:3])
    assert len(some.embeddings()) == some.card.num_codebooks == 3


@pytest.mark.parametrize("count", [1, 8])
def test_embeddings_sum_to_transformers_own_latent(count):
    model = random_models.xcodec_model().float()
    codec = as_codec(model, count)
    codes = torch.randint(0, 32, (count, 30))
    summed = sum(table[c] for table, c in zip(codec.embeddings(), codes)).t()
    own = model.quantizer.decode(codes[:, None])[0]
    assert own.shape == (codec.card.latent_dim, 30)
    torch.testing.assert_close(summed, own, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.latents(codes), own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [2, 8])
def test_decode_is_transformers_own(exact, count):
    codes = torch.randint(0, 32, (count, 20))
    own = exact.decode(codes[None]).audio_values[0, 0]
    ours = as_codec(exact, count).decode(codes)
    assert ours.shape == (20 * HOP,)
    assert torch.equal(ours, own)
    assert as_codec(exact, count).decode(codes[:, :0]).shape == (0,)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("named", [False, True])
def test_a_folder_in_the_hubs_format_loads_and_agrees_with_transformers(tmp_path, monkeypatch, named):
    """named: the configuration names the source of its HuBERT, as on the hub. The hub must not be contacted."""
    model = random_models.xcodec_model(seed=3).float()
    model.save_pretrained(tmp_path)
    theirs = transformers.XcodecModel.from_pretrained(tmp_path).eval()
    if named:
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        config["semantic_model_config"]["_name_or_path"] = "facebook/hubert-base-ls960"
        path.write_text(json.dumps(config))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    codec = load_codec(str(tmp_path))
    card = codec.card
    assert (card.name, card.hop_length, card.codebook_sizes) == ("xcodec", HOP, (32,) * 8)
    assert CodecCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    audio = wave(30_000)
    with torch.no_grad():
        assert (codec.encode([audio])[0].codes != plainly(theirs, audio)).float().mean() < 0.005
    random_models.xcodec_model(seed=4).float().save_pretrained(tmp_path / "other")
    assert load_codec(str(tmp_path / "other")).card.weights_sha256 != card.weights_sha256


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for spec in ("xcodec", f"xcodec@{tmp_path}"):
        with pytest.raises(UserError, match="huggingface-cli download hf-audio/xcodec-hubert-librispeech"):
            load_codec(spec)


def test_another_network_is_refused(tmp_path):
    random_models.xcodec_model(sample_rate=24_000).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="X-codec at 24000 Hz"):
        load_codec(f"xcodec@{tmp_path}")


@pytest.mark.parametrize("count", [0, 9])
def test_a_count_out_of_range_is_refused(exact, tmp_path, count):
    exact.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"num_codebooks {count}: xcodec has 1 to 8"):
        load_codec(str(tmp_path), num_codebooks=count)
