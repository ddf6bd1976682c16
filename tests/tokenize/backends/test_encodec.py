"""Our piecewise encoder and decoder against the encodec package's and transformers' own on whole files."""

import helpers
import numpy as np
import pytest
import random_models
import torch
import transformers
from encodec.model import EncodecModel
from encodec.modules.seanet import SEANetDecoder, SEANetEncoder
from encodec.quantization.vq import ResidualVectorQuantizer
from torch.nn import functional as F

from codecssl.tokenize.backends import encodec, tiny_16khz
from codecssl.tokenize.backends.parts.seanet_layers import Lane
from codecssl.tokenize.codec import CodecCard, Reference
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec


def wave(seconds, rate, seed=0):
    return helpers.wave(round(seconds * rate), seed, rate=rate)


def spread_codebooks(model):
    """K-means of 32 codebooks takes long. Spread entries are sufficient here."""
    for layer in model.quantizer.vq.layers:
        layer._codebook.embed.normal_(std=0.02)
    tiny_16khz.mark_initialised(model)
    return model


def random_24khz(seed=0):
    torch.manual_seed(seed)
    model = spread_codebooks(EncodecModel.encodec_model_24khz(pretrained=False))
    model.set_target_bandwidth(6.0)
    return model


def small(seed=0, decoder_lstm=2):
    """EnCodec's architecture, thin, with a second, dilated residual layer: 24 samples per frame, 16 kHz."""
    torch.manual_seed(seed)
    width = dict(dimension=8, n_filters=4, ratios=[4, 3, 2], causal=True, n_residual_layers=2)
    quantizer = ResidualVectorQuantizer(dimension=8, n_q=4, bins=64)
    encoder, decoder = SEANetEncoder(**width), SEANetDecoder(**width, lstm=decoder_lstm)
    return spread_codebooks(EncodecModel(encoder, decoder, quantizer, [1.0], 16_000, channels=1))


def as_codec(net, count=4):
    parts = encodec.from_encodec(net)
    return encodec.EncodecCodec(parts, encodec.make_card("test", "test", "0" * 64, parts, count, "cpu"))


def stream_latents(codec, audio):
    """The latents [D, T] that the stream's quantizer is given."""
    seen, count, size = [], codec.card.num_codebooks, codec.encoder.piece_frames
    codec.quantize = lambda z: seen.append(z) or torch.zeros(count, z.shape[1], dtype=torch.int64)
    try:
        stream = codec.stream()
        stream.push(audio)
        stream.finish()
    finally:
        del codec.quantize
    frames = codec.card.frames_of(len(audio))
    rest = [frames % size] if frames % size else []  # of the last piece, the valid frames alone
    assert [z.shape[1] for z in seen] == [size] * (frames // size) + rest
    return torch.cat(seen, 1)


# ---------------------------------------------------------------- the same as the libraries


@pytest.mark.parametrize(
    ("model", "seconds", "pieces"), [(random_24khz, 1.43, 4), (helpers.random_network, 2.2, 4), (small, 0.5, 11)]
)
def test_latents_equal_the_whole_file_of_the_encodec_package(model, seconds, pieces, monkeypatch):
    """In float64 rounding cannot hide a wrong frame. The LSTM runs alone after the first second."""
    monkeypatch.setattr(encodec, "SHARED_SECONDS", 1)
    net = model().double()
    codec = as_codec(net)
    audio = wave(seconds, codec.card.sample_rate).double()
    assert -(-len(audio) // codec.encoder.piece_samples) == pieces
    padded = F.pad(audio, (0, -len(audio) % codec.card.hop_length))
    with torch.no_grad():
        whole = net.encoder(padded[None, None])[0]
    torch.testing.assert_close(stream_latents(codec, audio), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frames", [1 / 24, 23 / 24, 1, 25 / 24, 2, 3, 6, 7, 8, 16, 17, 32, 33])
def test_short_waves_begin_as_in_the_encodec_package(frames):
    """Its layers mirror a wave's beginning, and put zeros where a short one has nothing to mirror."""
    net = small().double()
    codec = as_codec(net)
    audio = wave(1, 16_000)[: round(frames * 24)].double()
    with torch.no_grad():
        whole = net.encoder(F.pad(audio, (0, -len(audio) % 24))[None, None])[0]
    torch.testing.assert_close(stream_latents(codec, audio), whole, rtol=0, atol=1e-12)


def test_plain_codes_are_the_encodec_packages_own():
    net = random_24khz()
    codec = as_codec(net, 8)
    audio = wave(0.5, 24_000)
    with torch.no_grad():
        own = net.encode(F.pad(audio, (0, -len(audio) % 320))[None, None])[0][0][0]
    assert isinstance(codec, Reference)
    assert torch.equal(codec.encode_reference(audio), own)
    assert torch.equal(codec.encode([audio])[0].codes, own)


def test_trained_codes_are_the_plain_ones():
    """The shipped tiny_16khz. Rounding changes less than one of 1000 codes, at near ties."""
    codec = load_codec("tiny_16khz")
    waves = [wave(seconds, 16_000, seed) for seed, seconds in enumerate([1 / 16_000, 0.0199, 0.02, 0.021, 0.7, 9, 14])]
    ours, plain = helpers.codes_of(codec, waves), [codec.encode_reference(audio) for audio in waves]
    assert [codes.shape for codes in ours] == [codes.shape for codes in plain]
    differing = sum(int((a != b).sum()) for a, b in zip(ours, plain))
    assert differing <= 0.001 * sum(codes.numel() for codes in ours)
    assert len({tuple(row) for row in ours[-1].t().tolist()}) > 500  # it is not the same code all the time


def test_quantizer_picks_the_nearest_entry_level_by_level():
    codec = as_codec(small())
    latents = torch.randn(8, 77) * 0.03
    residual, expected = latents.double().t(), []
    for table in codec.embeddings():
        expected.append(torch.cdist(residual, table.double()).argmin(1))
        residual = residual - table[expected[-1]].double()
    assert torch.equal(codec.quantize(latents), torch.stack(expected))


# ---------------------------------------------------------------- independence


@pytest.fixture(scope="module")
def codec24():
    return as_codec(random_24khz(), 8)


@pytest.fixture(scope="module")
def codec16():
    return helpers.random_codec()


@pytest.mark.parametrize("width", [2, 3, 7, 13, 32])
def test_latents_do_not_depend_on_other_lanes(codec24, width):
    encoder = codec24.encoder
    waves = [wave(0.6, 24_000, seed) for seed in range(width)]
    with torch.inference_mode():
        lanes = [Lane(32) for _ in waves]
        size = encoder.piece_samples
        together = torch.cat([encoder(lanes, [w[i * size : (i + 1) * size] for w in waves]) for i in range(2)], 1)
        for i in (0, width - 1):
            lane = Lane(32)
            alone = torch.cat([encoder([lane], [waves[i][at : at + size]]) for at in (0, size)], 1)[0]
            assert torch.equal(together[i, :45], alone[:45])  # 45 frames are the wave's


def test_widths_that_sum_otherwise_are_left_out(monkeypatch):
    encoder = as_codec(small()).encoder
    genuine = encoder.recurrence
    monkeypatch.setattr(encoder, "recurrence", lambda x, lanes: genuine(x, lanes) * (1 + 1e-6 * (len(lanes) > 8)))
    assert encoder.widths == (2, 4, 8)


def test_any_cut_of_the_stream_and_any_batch_give_the_same_codes(codec16, monkeypatch):
    codec = codec16
    monkeypatch.setattr(codec.encoder, "shared_pieces", 8)  # 5.12 s
    seconds = [0.01, 0.02, 0.13, 1.0, 4.99, 5.12, 5.76, 8.3, 0, 0.64, 2.2, 3.1]
    waves = [wave(s, 16_000, seed) for seed, s in enumerate(seconds)]
    batch = helpers.codes_of(codec, waves)
    assert all(torch.equal(a, b) for a, b in zip(reversed(helpers.codes_of(codec, waves[::-1])), batch))
    for audio, codes in zip(waves, batch):
        assert torch.equal(codec.encode([audio])[0].codes, codes)
        assert codes.shape[1] == -(-len(audio) // 320)
        stream, pieces, at = codec.stream(), [], 0
        rng = np.random.default_rng(len(audio))
        while at < len(audio):
            size = int(rng.integers(1, 40_000))
            pieces.append(stream.push(audio[at : at + size]))
            at += size
        pieces.append(stream.finish())
        assert torch.equal(torch.cat(pieces, 1), codes)
    assert codec.encode([]) == []


def test_prefix_of_a_wave_gives_a_prefix_of_its_codes(codec16):
    audio = wave(3, 16_000)
    whole, part = helpers.codes_of(codec16, [audio, audio[: 320 * 100]])
    assert torch.equal(whole[:, :100], part)


def test_a_stream_gives_codes_at_once_and_holds_no_more_than_a_piece(codec16):
    codec = codec16
    stream = codec.stream()
    audio = wave(10, 16_000)
    held = []
    for block in audio.split(16_000):
        stream.push(block)
        held.append(stream.samples + sum(tensor.numel() for tensor in stream.lane.memory.values()))
    assert stream.samples < codec.encoder.piece_samples
    assert max(held) - min(held) < codec.encoder.piece_samples
    assert stream.finish().shape[1] == -(-(160_000 % codec.encoder.piece_samples) // 320)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("frames", [1, 2, 6, 7, 31, 32, 33, 100])
@pytest.mark.parametrize("lstm", [0, 2])
def test_decode_is_the_packages_own(frames, lstm):
    net = small(decoder_lstm=lstm)
    codec = as_codec(net)
    codes = torch.randint(0, 64, (4, frames))
    with torch.no_grad():
        own = net.decoder(codec.latents(codes)[None])[0, 0]
    torch.testing.assert_close(codec.decode(codes), own)


def test_decode_24khz_is_the_packages_own(codec24):
    net = random_24khz()
    codes = torch.randint(0, 1024, (8, 50))
    with torch.no_grad():
        own = net.decode([(codes[None], None)])[0, 0]
    torch.testing.assert_close(codec24.decode(codes), own)


def test_embeddings_sum_to_the_codecs_own_latent(codec24):
    codes = torch.randint(0, 1024, (8, 50))
    summed = sum(table[c] for table, c in zip(codec24.embeddings(), codes)).t()
    own = random_24khz().quantizer.decode(codes[:, None])[0]
    torch.testing.assert_close(summed, own, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec24.latents(codes), own, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- weights


def test_weights_in_the_hubs_format_load_and_agree_with_transformers(tmp_path):
    model = random_models.encodec_24khz_model()
    model.save_pretrained(tmp_path)
    codec = load_codec(str(tmp_path), num_codebooks=4)
    assert codec.card.name == "encodec_24khz"
    assert codec.card.codebook_sizes == (1024,) * 4
    assert CodecCard.from_dict(codec.card.to_dict()) == codec.card
    audio = wave(1, 24_000)
    with torch.no_grad():
        own = model.encode(audio[None, None], bandwidth=3.0).audio_codes[0, 0]
        theirs = model.decode(own[None, None], [None]).audio_values[0, 0]
    assert torch.equal(codec.encode_reference(audio), own)
    assert (codec.encode([audio])[0].codes == own).float().mean() > 0.998
    torch.testing.assert_close(codec.decode(own), theirs, rtol=1e-4, atol=1e-5)
    fewer = load_codec(str(tmp_path), num_codebooks=2)
    assert torch.equal(fewer.encode([audio])[0].codes, codec.encode([audio])[0].codes[:2])
    assert torch.equal(fewer.encode_reference(audio), own[:2])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_causal_conv": False}, "24000 Hz EnCodec, encodec_24khz is causal at 24000 Hz"),
        ({"pad_mode": "constant"}, "only causal convolutions with reflected padding"),
    ],
)
def test_networks_that_cannot_run_in_pieces_are_refused(config, says, tmp_path):
    random_models.encodec_24khz_model(**config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=says):
        load_codec(str(tmp_path))


def test_the_packages_own_file_loads(tmp_path):
    net = random_24khz()
    path = tmp_path / "encodec_24khz-test.th"
    torch.save(net.state_dict(), path)
    codec = load_codec(str(path))
    assert codec.card.num_codebooks == 8
    audio = wave(0.4, 24_000)
    with torch.no_grad():
        own = net.encode(audio[None, None])[0][0][0]
    assert torch.equal(codec.encode([audio])[0].codes, own)
    with pytest.raises(UserError, match="num_codebooks 33: encodec_24khz has 1 to 32"):
        load_codec(str(path), num_codebooks=33)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("encodec_25khz", "unknown codec 'encodec_25khz': give a path or one of dac_16khz.* mean encodec_24khz"),
        ("music", "unknown codec 'music': give a path or one of .*xcodec2$"),
        ("./nowhere", "no such file or folder"),
        ("tiny_16khz@/nowhere", "no weights at /nowhere"),
        ("tiny_16khz@{letter}", "letter.th: not the weights of tiny_16khz"),
        ("encodec_24khz@{letter}", "letter.th: not the weights of encodec_24khz"),
        ("encodec_48khz@{letter}", "letter.th: not the weights of encodec_48khz"),
        ("{folder}", "config.json: not a model's configuration"),
        ("dac_16khz@{folder}", "no weights at .*codec_of_a_friend \\(.+\\); get them by"),
    ],
)
def test_loading_errors_name_the_remedy(spec, says, tmp_path):
    letter, folder = tmp_path / "letter.th", tmp_path / "codec_of_a_friend"
    letter.write_text("Dear friend, here is my codec.")
    folder.mkdir()
    (folder / "config.json").write_text("[1]")
    spec = spec.format(letter=letter, folder=folder)
    with pytest.raises(UserError, match=says):
        load_codec(spec)


def test_missing_weights_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        transformers.EncodecModel,
        "from_pretrained",
        classmethod(lambda cls, source, **options: (_ for _ in ()).throw(OSError("no net"))),
    )
    with pytest.raises(UserError, match="huggingface-cli download facebook/encodec_24khz"):
        load_codec("encodec_24khz")


def test_the_first_of_equal_scores_is_taken_by_numpy_and_by_torch():
    scores = torch.randn(32, 1024, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    assert (scores == scores.amax(1, keepdim=True)).sum(1).max() > 1, "a row must hold its largest score twice"
    index = torch.zeros(64, dtype=torch.int64)
    encodec.first_largest(scores, index[:32])
    assert torch.equal(index[:32], scores.max(1).indices)
    assert not index[32:].any()
