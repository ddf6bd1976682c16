"""Our chunked encoder against the encodec package's and transformers' own whole-file encoding."""

import numpy as np
import pytest
import torch
import transformers
from encodec.model import EncodecModel
from torch.nn import functional as F

from codecssl.tokenize import encodec, tiny
from codecssl.tokenize.codec import load_codec
from codecssl.tokenize.errors import UserError


def wave(seconds, rate, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    level = np.interp(t, np.linspace(0, seconds, 12), rng.uniform(0, 0.5, 12))
    tone = np.sin(2 * np.pi * np.cumsum(120 + 60 * np.sin(t)) / rate)
    return torch.from_numpy((level * (tone + 0.3 * rng.standard_normal(len(t)))).astype(np.float32))


def random_24khz(seed=0):
    torch.manual_seed(seed)
    model = EncodecModel.encodec_model_24khz(pretrained=False)
    for layer in model.quantizer.vq.layers:  # k-means would take long for 32: spread entries are enough for the maths
        layer._codebook.embed.normal_(std=0.02)
    tiny.mark_initialised(model)
    model.set_target_bandwidth(6.0)
    return model


def as_codec(net, name, count):
    return encodec.EncodecCodec(net, encodec.make_card(name, "test", "0" * 64, net, count, "cpu"))


@pytest.mark.parametrize(("model", "rate"), [(random_24khz, 24_000), (tiny.random_network, 16_000)])
def test_chunks_equal_the_whole_file_of_the_encodec_package(model, rate):
    """In float64, where rounding cannot hide a wrong frame: 21.3 s are three chunks."""
    net = model().double()
    codec = as_codec(encodec.from_encodec(net), "test", 8)
    codec.lstm.double()
    audio = wave(21.3, rate).double()
    padded = F.pad(audio, (0, -len(audio) % codec.card.hop_length))
    with torch.no_grad():
        front = codec.front(padded[None, None])
        whole = net.encoder(padded[None, None])[0]
        reference = net.encode(padded[None, None])[0][0][0]
    assert front.shape[-1] == whole.shape[-1]
    stream, latents = codec.stream(), []
    codec.quantize = lambda z: latents.append(z) or torch.zeros(8, z.shape[1], dtype=torch.int64)
    stream.push(audio)
    stream.finish()
    assert len(latents) == 3
    torch.testing.assert_close(torch.cat(latents, 1), whole, rtol=0, atol=1e-9)
    del codec.quantize
    ours = codec.encode([audio])[0]
    assert ours.shape == reference.shape == (8, whole.shape[1])
    assert (ours != reference).float().mean() < 0.002  # ties between entries that coincide may fall either way


def test_any_cut_of_the_stream_and_any_batch_give_the_same_codes():
    codec = tiny.random_codec()
    waves = [wave(s, 16_000, seed) for seed, s in enumerate([0.01, 0.02, 0.13, 1.0, 10.0, 10.02, 23.456])]
    batch = codec.encode(waves)
    for audio, codes in zip(waves, batch):
        assert torch.equal(codec.encode([audio])[0], codes)
        assert codes.shape[1] == -(-len(audio) // 320)
        stream, pieces, at = codec.stream(), [], 0
        rng = np.random.default_rng(len(audio))
        while at < len(audio):
            size = int(rng.integers(1, 70_000))
            pieces.append(stream.push(audio[at : at + size]))
            at += size
        pieces.append(stream.finish())
        assert torch.equal(torch.cat(pieces, 1), codes)


def test_prefix_of_a_wave_gives_a_prefix_of_its_codes():
    codec = tiny.random_codec()
    audio = wave(3, 16_000)
    whole, part = codec.encode([audio, audio[: 320 * 100]])
    assert torch.equal(whole[:, :100], part)


def test_embeddings_sum_to_the_codecs_own_latent():
    net = random_24khz()
    codec = as_codec(encodec.from_encodec(net), "test", 8)
    codes = torch.randint(0, 1024, (8, 50))
    summed = sum(table[c] for table, c in zip(codec.embeddings(), codes)).t()
    own = net.quantizer.decode(codes[:, None])[0]
    torch.testing.assert_close(summed, own, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.latents(codes), own, rtol=0, atol=1e-5)


def test_decode_is_the_packages_own():
    net = random_24khz()
    codec = as_codec(encodec.from_encodec(net), "test", 8)
    codes = torch.randint(0, 1024, (8, 20))
    with torch.no_grad():
        own = net.decode([(codes[None], None)])[0, 0]
    torch.testing.assert_close(codec.decode(codes), own)


def test_weights_in_the_hubs_format_load_and_agree_with_transformers(tmp_path):
    torch.manual_seed(0)
    model = transformers.EncodecModel(transformers.EncodecConfig())
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_(std=0.02)
    model.save_pretrained(tmp_path)
    codec = load_codec(str(tmp_path), num_codebooks=4)
    assert codec.card.name == "encodec_24khz"
    assert codec.card.codebook_sizes == (1024,) * 4
    audio = wave(4, 24_000)
    with torch.no_grad():
        own = model.eval().encode(audio[None, None], bandwidth=3.0).audio_codes[0, 0]
    assert (codec.encode([audio])[0] == own).float().mean() > 0.998
    with torch.no_grad():
        theirs = model.decode(own[None, None], [None]).audio_values[0, 0]
    torch.testing.assert_close(codec.decode(own), theirs)


def test_the_packages_own_file_loads(tmp_path):
    net = random_24khz()
    path = tmp_path / "encodec_24khz-test.th"
    torch.save(net.state_dict(), path)
    codec = load_codec(str(path))
    assert codec.card.num_codebooks == 8
    audio = wave(1, 24_000)
    with torch.no_grad():
        own = net.encode(audio[None, None])[0][0][0]
    assert torch.equal(codec.encode([audio])[0], own)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("encodec_25khz", "unknown codec 'encodec_25khz': give a path or one of dac_16khz"),
        ("./nowhere", "no such file or folder"),
        ("tiny_16khz@/nowhere", "no weights at /nowhere"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(spec, says):
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


def test_too_many_codebooks_are_refused(tmp_path):
    net = random_24khz()
    path = tmp_path / "encodec_24khz-test.th"
    torch.save(net.state_dict(), path)
    with pytest.raises(UserError, match="num_codebooks 33: encodec_24khz has 1 to 32"):
        load_codec(str(path), num_codebooks=33)
