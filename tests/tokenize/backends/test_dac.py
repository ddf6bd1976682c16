"""Our piecewise time-major encoder against `transformers.DacModel.encode` of the whole wave."""

import itertools
from functools import partial

import helpers
import numpy as np
import pytest
import random_models
import torch
from torch.nn import functional as F

from codecssl.tokenize.backends import dac
from codecssl.tokenize.codec import CodecCard, stored_tables
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

wave = partial(helpers.wave, rate=16_000)


def as_codec(model, name="dac_16khz", count=6, pace=None):
    codec = dac.DacCodec(model, dac.make_card(name, "test", model, count, "cpu"))
    codec.pace = pace or codec.pace
    return codec


def through_stream(codec, audio, most, seed=0):
    rng = np.random.default_rng(seed)
    stream, pieces, at = codec.stream(), [], 0
    while at < len(audio):
        size = int(rng.integers(1, most))
        pieces.append(stream.push(audio[at : at + size]))
        at += size
    return torch.cat([*pieces, stream.finish()], dim=1)


def padded(audio, hop):
    return F.pad(audio, (0, -len(audio) % hop))[None, None]


@pytest.mark.parametrize("name", ["dac_16khz", "dac_44khz"])
@pytest.mark.parametrize("pace", [None, dac.Pace(chunk=5, piece=2), dac.Pace(chunk=1, piece=1)])
def test_pieces_equal_the_whole_wave_of_the_reference(name, pace):
    """The comparison is in float64, where rounding cannot hide a wrong border."""
    model = random_models.dac_model(name).double()
    codec, hop = as_codec(model, name, pace=pace), dac.NETWORKS[name][1]
    frames = 3 * codec.pace.chunk + 4 if pace else 205
    latents, quantize = [], codec.quantize
    codec.quantize = lambda rows: latents.append(rows) or quantize(rows)
    for samples in (1, hop - 1, hop, hop + 1, 7 * hop + 3, codec.pace.chunk * hop, frames * hop - 11):
        audio = wave(samples, samples).double()
        latents.clear()
        codes = codec.encode([audio])[0].codes
        whole = model.encoder(padded(audio, hop))[0].t()
        torch.testing.assert_close(torch.cat(latents), whole, rtol=1e-12, atol=1e-12)
        assert torch.equal(codes, model.encode(padded(audio, hop)).audio_codes[0])
        assert codes.shape == (6, codec.card.frames_of(samples))


def test_a_padded_batch_of_the_reference_would_not_do():
    """The reference's own padded batch changes frames at the end of the shorter wave."""
    model = random_models.dac_model().double()
    audio = wave(320 * 40).double()
    alone = model.encode(audio[None, None]).audio_codes[0]
    longer = model.encode(F.pad(audio, (0, 3200))[None, None]).audio_codes[0, :, :40]
    assert (alone != longer).any(0).nonzero().flatten().tolist()[-1] == 39
    assert torch.equal(as_codec(model).encode([audio, wave(16_000).double()])[0].codes, alone)


def test_in_float32_the_codes_are_the_references():
    model = random_models.dac_model(width=8)
    codec = as_codec(model)
    waves = [wave(n, n) for n in (1, 319, 320, 321, 16_000, 60_123)]
    ours = helpers.codes_of(codec, waves)
    references = [model.encode(padded(w, 320)).audio_codes[0] for w in waves]
    plain = [codec.encode_reference(w) for w in waves]
    assert all(torch.equal(a, b) for a, b in zip(plain, references))
    wrong = sum(int((a != b).sum()) for a, b in zip(ours, references))
    assert wrong <= 0.001 * sum(a.numel() for a in ours)
    assert len(ours[-1].unique()) > 100  # no degenerate quantizer


def test_any_cut_of_the_stream_and_any_batch_give_the_same_codes():
    codec = as_codec(random_models.dac_model(width=8))
    waves = [wave(n, n) for n in (1, 320, 5_000, 192 * 320, 192 * 320 + 1, 65_001)]
    for audio, codes in zip(waves, helpers.codes_of(codec, waves)):
        assert torch.equal(codec.encode([audio])[0].codes, codes)
        for most in (3_000, 90_000):
            assert torch.equal(through_stream(codec, audio, most), codes)


def test_the_state_of_a_stream_does_not_grow():
    codec = as_codec(random_models.dac_model(), pace=dac.Pace(chunk=4, piece=2))
    stream, sizes = codec.stream(), []
    for i in range(30):
        stream.push(wave(2 * 320, i))
        sizes.append(sum(rows.numel() for rows in [*stream.pending, *stream.kept.values()]))
    assert max(sizes[10:]) == max(sizes[:10])
    stream.push(wave(60 * 320))
    for rows in [*stream.pending, *stream.kept.values()]:  # no view that holds a long wave in memory
        assert rows.untyped_storage().nbytes() == rows.nbytes


def test_codes_are_given_as_soon_as_a_chunk_is_full():
    codec = as_codec(random_models.dac_model(), pace=dac.Pace(chunk=16, piece=4))
    stream = codec.stream()
    given = [stream.push(wave(320)).shape[1] for _ in range(64)]
    assert 64 - sum(given) <= 16 + 8
    assert sum(given) + stream.finish().shape[1] == 64
    assert stream.finish().shape == (6, 0)


@pytest.mark.parametrize("name", ["dac_16khz", "dac_44khz"])
def test_decode_is_the_references_own(name, monkeypatch):
    monkeypatch.setattr(dac, "DECODE_FRAMES", 20)
    model, hop = random_models.dac_model(name).double(), dac.NETWORKS[name][1]
    codec = as_codec(model, name)
    for frames in (1, 19, 20, 21, 73):
        codes = torch.randint(0, 128, (6, frames))
        own = model.decode(audio_codes=codes[None]).audio_values[0]
        ours = codec.decode(codes)
        assert ours.shape == (frames * hop,)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours[: len(own)], own.float(), rtol=0, atol=1e-7)
        assert not ours[len(own) :].any()
        assert frames * hop - len(own) == (8 if name == "dac_16khz" else 0)
    assert codec.decode(codes[:, :0]).shape == (0,)


def test_embeddings_sum_to_the_codecs_own_latent():
    model = random_models.dac_model()
    codec = as_codec(model)
    codes = torch.randint(0, 128, (6, 50))
    summed = sum(table[c] for table, c in zip(codec.embeddings(), codes)).t()
    own = model.quantizer.from_codes(codes[None])[0][0]
    assert own.shape == (codec.card.latent_dim, 50)
    torch.testing.assert_close(summed, own, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.latents(codes), own, rtol=0, atol=0)
    for entries, table, level in zip(stored_tables(codec), codec.embeddings(), model.quantizer.quantizers):
        assert torch.equal(entries, level.codebook.weight)
        torch.testing.assert_close(level.out_proj(entries.t()[None])[0].t(), table, rtol=0, atol=1e-5)


def test_fewer_codebooks_are_the_first_ones():
    model, audio = random_models.dac_model(), wave(8_000)
    six, two = as_codec(model), as_codec(model, count=2)
    assert two.card.codebook_sizes == (128, 128)
    assert torch.equal(two.encode([audio])[0].codes, six.encode([audio])[0].codes[:2])
    assert torch.equal(two.encode_reference(audio), six.encode_reference(audio)[:2])
    assert len(two.embeddings()) == 2


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_around_it_changes_nothing(autocast):
    model, audio = random_models.dac_model(), wave(8_000)
    expected = as_codec(model).encode([audio])[0].codes
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert torch.equal(as_codec(model).encode([audio])[0].codes, expected)


@pytest.mark.parametrize("name", list(random_models.DAC_RATIOS))
def test_weights_in_the_hubs_format_load(name, tmp_path):
    model = random_models.dac_model(name, num_codebooks=3)
    model.config.hop_length = 512  # as the hub once said of all three
    model.save_pretrained(tmp_path)
    codec, audio = load_codec(str(tmp_path)), wave(6_000)
    card = codec.card
    assert (card.name, card.sample_rate, card.hop_length) == (name, *dac.NETWORKS[name])
    assert card.codebook_sizes == (128,) * 3  # all of the checkpoint's
    assert CodecCard.from_dict(card.to_dict()) == card
    assert card.policies["device"] == "cpu"
    assert card.weights_sha256 == load_codec(f"{name}@{tmp_path}", num_codebooks=1).card.weights_sha256
    own = model.encode(padded(audio, card.hop_length)).audio_codes[0]
    assert (codec.encode([audio])[0].codes == own).float().mean() >= 0.999


@pytest.mark.parametrize(
    ("name", "count", "says"),
    [
        ("dac_44khz", None, "a DAC of 16000 Hz and 320 samples per frame, dac_44khz has 44100 Hz and 512"),
        ("dac_24khz", None, "a DAC of 16000 Hz .* dac_24khz has 24000 Hz"),
        ("dac_16khz", 4, "num_codebooks 4: dac_16khz has 1 to 3"),
        ("dac_16khz", 0, "num_codebooks 0: dac_16khz has 1 to 3"),
    ],
)
def test_wrong_weights_or_counts_are_refused(name, count, says, tmp_path):
    random_models.dac_model(num_codebooks=3).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=says):
        load_codec(f"{name}@{tmp_path}", num_codebooks=count)


@pytest.mark.parametrize("source", ["dac_16khz@{}/nowhere", "dac_16khz@{}"])
def test_missing_weights_say_how_to_get_them(source, tmp_path):
    with pytest.raises(UserError, match="huggingface-cli download descript/dac_16khz"):
        load_codec(source.format(tmp_path))


def test_a_stream_does_not_depend_on_earlier_ones():
    """A finished stream starts afresh, and no state leaks between two streams that run side by side."""
    codec = as_codec(random_models.dac_model(), pace=dac.Pace(chunk=3, piece=2))
    first, second = wave(5_000, 1), wave(5_000, 2)
    expected = helpers.codes_of(codec, [first, second])
    stream = codec.stream()
    for audio, codes in zip((first, second), expected):
        assert torch.equal(torch.cat([stream.push(audio), stream.finish()], 1), codes)
    streams, pieces = (codec.stream(), codec.stream()), ([], [])
    for at, i in itertools.product(range(0, 5_000, 500), range(2)):
        pieces[i].append(streams[i].push((first, second)[i][at : at + 500]))
    for i in range(2):
        assert torch.equal(torch.cat([*pieces[i], streams[i].finish()], 1), expected[i])
