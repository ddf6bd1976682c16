"""Our chunked encoder of codebooks at several rates against the snac package's own whole-file encoding."""

import json
from functools import partial

import helpers
import huggingface_hub.constants
import numpy as np
import pytest
import random_models
import torch
from snac import SNAC

from codecssl.tokenize.backends import snac
from codecssl.tokenize.codec import CodecCard, stored_tables
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

HOP = 2048


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Encode waves of a second or two in many chunks, the last one shorter than the others."""
    monkeypatch.setattr(snac, "CPU_PACE", snac.Pace(piece=3, chunk=8))


wave = partial(helpers.wave, rate=24_000, levels=(0.1, 0.9), noise=0.5)


def as_codec(net, count=3):
    return snac.SnacCodec(net, snac.make_card("snac_24khz", "test", net, count, "cpu"))


def as_rows(codes):
    """The package's list of codes [1, T], [1, 2T], [1, 4T] to rows, entry by entry."""
    frames = codes[0].shape[1]
    rows = [[int(codes[0][0, t]) for t in range(frames)]]
    rows += [[int(codes[1][0, 2 * t + j]) for t in range(frames)] for j in range(2)]
    rows += [[int(codes[2][0, 4 * t + j]) for t in range(frames)] for j in range(4)]
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def net():
    return random_models.snac_model()


@pytest.fixture(scope="module")
def exact():
    """The comparison is in float64, where rounding cannot hide a wrong frame."""
    return random_models.snac_model().double()


@pytest.mark.parametrize(
    "samples",
    [1, HOP - 1, HOP, HOP + 1, 3 * HOP + 5, 8 * HOP, 11 * HOP, 11 * HOP + 1, 17 * HOP + 7, 27 * HOP, 27 * HOP + 1],
)
def test_codes_are_those_of_the_whole_wave_through_the_package(exact, samples):
    codec, audio = as_codec(exact), wave(samples).double()
    expected = as_rows(exact.encode(audio[None, None]))
    assert torch.equal(codec.encode([audio])[0].codes, expected)
    assert torch.equal(codec.encode_reference(audio), expected)
    assert expected.shape == (7, -(-samples // HOP)) == (codec.card.num_rows, codec.card.frames_of(samples))


def test_latents_of_chunks_are_those_of_the_whole_wave(exact, monkeypatch):
    codec, audio = as_codec(exact), wave(27 * HOP).double()
    whole, parts = exact.encoder(audio[None, None])[0], []
    assert len(exact.encode(audio[None, None])[2].unique()) > 30  # the random network does tell things apart

    def catch(z):
        parts.append(z)
        return torch.zeros(7, z.shape[1] // 4)

    monkeypatch.setattr(codec, "quantize", catch)
    codec.encode([audio])
    assert len(parts) == 4
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rates", "depthwise"), [([2, 2, 3, 5], True), ([3, 4], False)])
def test_other_strides_and_full_convolutions_are_those_of_the_package(rates, depthwise):
    net = random_models.snac_model(encoder_rates=rates, decoder_rates=rates[::-1], depthwise=depthwise).double()
    codec = as_codec(net)
    for samples in (1, codec.card.hop_length, 30 * codec.card.hop_length + 1):
        audio = wave(samples).double()
        assert torch.equal(codec.encode([audio])[0].codes, as_rows(net.encode(audio[None, None])))


def test_any_cut_of_the_stream_and_any_batch_give_the_same_codes(net):
    codec = as_codec(net)
    waves = [wave(n, seed) for seed, n in enumerate([1, 300, HOP, 3 * HOP + 1, 19 * HOP + 5, 16 * HOP])]
    for audio, codes in zip(waves, helpers.codes_of(codec, waves)):
        assert torch.equal(codec.encode([audio])[0].codes, codes)
        stream, pieces, at = codec.stream(), [], 0
        rng = np.random.default_rng(len(audio))
        while at < len(audio):
            size = int(rng.integers(1, 12 * HOP))
            pieces.append(stream.push(audio[at : at + size]))
            at += size
        assert torch.equal(torch.cat([*pieces, stream.finish()], 1), codes)
        assert stream.finish().shape == (7, 0)


def test_in_float32_few_codes_differ_from_the_package(net):
    codec, audio = as_codec(net), wave(60 * HOP + 9)
    assert (codec.encode([audio])[0].codes != as_rows(net.encode(audio[None, None]))).float().mean() < 0.005


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 3)])
def test_fewer_codebooks_are_the_first_rows(net, count, rows):
    audio = wave(15 * HOP)
    codec = as_codec(net, count)
    assert codec.card.codes_per_frame == (1, 2, 4)[:count]
    assert torch.equal(codec.encode([audio])[0].codes, as_codec(net).encode([audio])[0].codes[:rows])
    assert codec.encode_reference(audio).shape == (rows, 15)
    assert len(codec.embeddings()) == rows


@pytest.mark.parametrize("count", [1, 2, 3])
def test_embeddings_sum_to_the_packages_own_latent(net, count):
    codec = as_codec(net, count)
    codes = torch.randint(0, 64, (codec.card.num_rows, 9))
    tables = codec.embeddings()
    assert all(table.shape == (64, codec.card.latent_dim) for table in tables)
    rows = [q.codebook.weight for q, n in zip(net.quantizer.quantizers, codec.card.codes_per_frame) for _ in range(n)]
    assert all(torch.equal(one, other) for one, other in zip(stored_tables(codec), rows, strict=True))
    summed = sum(table[row] for table, row in zip(tables, codes)).t()
    parts = [rows.t().reshape(1, -1) for rows in codes.split(codec.card.codes_per_frame)]
    quantizer = net.quantizer
    own = 0
    for layer, part in zip(quantizer.quantizers, parts):
        own = own + layer.out_proj(layer.decode_code(part)).repeat_interleave(layer.stride, -1)
    if count == 3:
        torch.testing.assert_close(own, quantizer.from_codes(parts), rtol=0, atol=0)
    own = torch.cat([own[0, :, step::4] for step in range(4)])  # a frame's four steps one under another
    torch.testing.assert_close(summed, own, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.latents(codes), own, rtol=0, atol=1e-5)


def test_decode_is_the_packages_own_with_the_noise_of_a_fixed_seed(net):
    codec = as_codec(net)
    codes = torch.randint(0, 64, (7, 6))
    parts = [rows.t().reshape(1, -1) for rows in codes.split((1, 2, 4))]
    torch.manual_seed(snac.NOISE_SEED)
    own = net.decode(parts)[0, 0]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = codec.decode(codes)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first, own, rtol=0, atol=0)
    assert torch.equal(codec.decode(codes), first)
    assert first.shape == (6 * HOP,)
    assert not torch.equal(first, net.decode(parts)[0, 0])  # there is noise
    assert codec.decode(codes[:, :0]).shape == (0,)
    assert as_codec(net, 2).decode(codes[:3]).shape == (6 * HOP,)


# ---------------------------------------------------------------- loading


def test_a_folder_in_the_hubs_format_loads_and_agrees_with_the_package(net, tmp_path):
    codec = load_codec(str(random_models.save_snac(net, tmp_path)))
    card = codec.card
    assert (card.name, card.hop_length, card.codebook_sizes, card.codes_per_frame) == (
        "snac_24khz",
        HOP,
        (64,) * 3,
        (1, 2, 4),
    )
    assert CodecCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    audio = wave(20_000)
    theirs = SNAC.from_pretrained(str(tmp_path))
    with torch.no_grad():
        assert (codec.encode([audio])[0].codes != as_rows(theirs.encode(audio[None, None]))).float().mean() < 0.01
    other = load_codec(str(random_models.save_snac(random_models.snac_model(seed=1), tmp_path / "other")))
    assert other.card.weights_sha256 != card.weights_sha256


def test_the_hubs_cache_is_found_without_a_net(net, tmp_path, monkeypatch):
    repository = tmp_path / "models--hubertsiuzdak--snac_24khz"
    random_models.save_snac(net, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    codec = load_codec("snac_24khz", num_codebooks=2)
    assert codec.card.weights == "snac_24khz"
    assert codec.card.num_rows == 3


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for spec in ("snac_24khz", f"snac_24khz@{tmp_path}"):
        with pytest.raises(UserError, match="huggingface-cli download hubertsiuzdak/snac_24khz"):
            load_codec(spec)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampling_rate": 32_000}, "SNAC at 32000 Hz with no attention, snac_24khz has none, at 24000 Hz"),
        ({"attn_window_size": 32, "encoder_dim": 8, "decoder_dim": 128}, "SNAC at 24000 Hz with attention"),
        ({"codebook_size": 32}, r"not the weights of snac_24khz \(RuntimeError: Error\(s\) in loading state_dict"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'"),
    ],
)
def test_another_network_is_refused(tmp_path, changes, says):
    model = random_models.snac_model(**{k: v for k, v in changes.items() if k not in ("colour", "codebook_size")})
    with pytest.raises(UserError, match=says):
        load_codec(f"snac_24khz@{random_models.save_snac(model, tmp_path, **changes)}")


def test_half_a_file_is_refused(net, tmp_path):
    path = random_models.save_snac(net, tmp_path) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not the weights of snac_24khz"):
        load_codec(str(tmp_path))


@pytest.mark.parametrize("count", [0, 4])
def test_a_count_out_of_range_is_refused(net, tmp_path, count):
    with pytest.raises(UserError, match=f"num_codebooks {count}: snac_24khz has 1 to 3"):
        load_codec(str(random_models.save_snac(net, tmp_path)), num_codebooks=count)
