"""Codecs that encode a wave as a whole: batches, cuts, segments, decoding and loading, with random weights."""

import json

import helpers
import numpy as np
import pytest
import random_weights
import torch

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

NAMES = ["speechtokenizer", "wavtokenizer", "hificodec_16khz"]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def path(name, tmp_path_factory):
    return random_weights.WRITERS[name](tmp_path_factory.mktemp(name))


@pytest.fixture
def codec(path):
    """3 s whole, segments of 2 s."""
    found = load_codec(str(path))
    found.whole_seconds, found.segment_seconds = 3, 2
    return found


def waves(codec, *seconds):
    rate = codec.card.sample_rate
    return [helpers.wave(max(1, round(s * rate)), i, rate=rate, levels=(0.1, 0.9)) for i, s in enumerate(seconds)]


def test_any_batch_and_any_cut_of_the_stream_give_the_same_codes(codec):
    audio = [*waves(codec, 0, 0.01, 1, 2.99, 5.3), waves(codec, 1)[0][: codec.card.hop_length]]
    for wave, codes in zip(audio, helpers.codes_of(codec, audio)):
        assert codes.shape == (codec.card.num_rows, codec.card.frames_of(len(wave)))
        assert torch.equal(codec.encode([wave])[0].codes, codes)
        stream, pieces, at = codec.stream(), [], 0
        rng = np.random.default_rng(len(wave))
        while at < len(wave):
            size = int(rng.integers(1, 3 * codec.card.sample_rate))
            pieces.append(stream.push(wave[at : at + size]))
            at += size
        assert torch.equal(torch.cat([*pieces, stream.finish()], 1), codes)
    assert all(len(row.unique()) > 5 for row in helpers.codes_of(codec, waves(codec, 2))[0])


def test_a_longer_wave_is_encoded_in_segments_each_for_itself(codec):
    [wave] = waves(codec, 5.3)
    parts = wave.split([2 * codec.card.sample_rate, 2 * codec.card.sample_rate, len(wave) - 4 * codec.card.sample_rate])
    assert torch.equal(codec.encode([wave])[0].codes, torch.cat(helpers.codes_of(codec, parts), 1))
    codec.whole_seconds = 6
    whole = codec.encode([wave])[0].codes
    assert whole.shape[1] == codec.card.frames_of(len(wave))
    assert not torch.equal(codec.encode([wave])[0].codes, torch.cat(helpers.codes_of(codec, parts), 1))


def test_embeddings_sum_to_the_latents(codec):
    codes = torch.stack([torch.randint(size, (30,)) for size in codec.card.row_sizes])
    summed = sum(table[c] for table, c in zip(codec.embeddings(), codes)).t()
    assert summed.shape == (codec.card.latent_dim, 30)
    torch.testing.assert_close(codec.latents(codes), summed, rtol=0, atol=1e-5)


def test_decodes_to_hops(codec):
    [wave] = waves(codec, 1)
    codes = codec.encode([wave])[0].codes
    decoded = codec.decode(codes)
    assert decoded.shape == (codes.shape[1] * codec.card.hop_length,)
    assert decoded.isfinite().all()
    assert decoded.std() > 0
    assert codec.decode(codes[:, :0]).shape == (0,)


def test_the_card(name, codec, path, tmp_path):
    card = codec.card
    assert card.name == name
    assert CodecCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    assert load_codec(f"{name}@{path}").card.fingerprint == card.fingerprint
    other = random_weights.WRITERS[name](tmp_path, seed=1)
    assert load_codec(str(other)).card.weights_sha256 != card.weights_sha256


def test_missing_weights_say_how_to_get_them(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for spec in (name, f"{name}@{tmp_path}", f"{name}@{tmp_path}/none.pt"):
        with pytest.raises(UserError, match="get them by .*PATH"):
            load_codec(spec)


def test_files_of_other_kinds_are_refused(name, tmp_path):
    for content in ({"encoder.model.0.conv.conv.weight_v": torch.zeros(2)}, {"a": 1}, [torch.zeros(2)]):
        torch.save(content, path := tmp_path / "weights")
        with pytest.raises(UserError, match=f"not the weights of {name}"):
            load_codec(f"{name}@{path}")
    path.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(UserError, match=f"not the weights of {name}"):
        load_codec(f"{name}@{path}")


def test_a_count_out_of_range_is_refused(codec, name, path):
    count = codec.card.num_codebooks + 1
    with pytest.raises(UserError, match=f"num_codebooks {count}: {name} has 1 to {count - 1}"):
        load_codec(f"{name}@{path}", num_codebooks=count)
