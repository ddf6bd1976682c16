"""Ours against the authors' code, and its parts against the encodec package and torch, on random weights."""

import helpers
import pytest
import random_weights
import references
import torch
from encodec.modules.seanet import SEANetEncoder
from encodec.quantization.vq import ResidualVectorQuantizer

from codecssl.tokenize.backends.parts.vocos import inverse_stft
from codecssl.tokenize.registry import load_codec

LENGTHS = [1, 3, 319, 320, 321, 5000, 24_000, 44_321]
RATIOS = [(8, 5, 4, 2), (6, 5, 5, 4)]


@pytest.fixture(scope="module", params=RATIOS)
def ratios(request):
    return request.param


@pytest.fixture(scope="module")
def state(ratios):
    return random_weights.wavtokenizer_state(ratios)


@pytest.fixture(scope="module")
def codec(ratios, tmp_path_factory):
    return load_codec(str(random_weights.write_wavtokenizer(tmp_path_factory.mktemp("wavtokenizer"), ratios)))


def part(state, prefix):
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def test_codes_are_those_of_the_encodec_packages_layers(codec, state, ratios):
    encoder = SEANetEncoder(causal=False, norm="weight_norm", dimension=16, n_filters=2, ratios=list(ratios), lstm=2)
    encoder.load_state_dict(part(state, "feature_extractor.encodec.encoder."))
    quantizer = ResidualVectorQuantizer(dimension=16, n_q=1, bins=256)
    quantizer.load_state_dict(part(state, "feature_extractor.encodec.quantizer."))
    for samples in LENGTHS:
        wave = helpers.wave(samples, rate=24_000, levels=(0.1, 0.9))
        with torch.no_grad():
            expected = quantizer.eval().vq.encode(encoder(wave[None, None]))[:, 0]
        assert torch.equal(codec.encode([wave])[0].codes, expected)
    assert (codec.card.hop_length, codec.card.codebook_sizes) == (encoder.hop_length, (256,))


def test_codes_and_wave_are_those_of_the_authors_code(codec, state, ratios, monkeypatch):
    references.cloned("jishengpeng/WavTokenizer", monkeypatch)
    encoder = references.installed("encoder.modules.seanet", "the clone").SEANetEncoder
    models, heads = (references.installed(f"decoder.{module}", "the clone") for module in ("models", "heads"))
    encoder = encoder(dimension=16, n_filters=2, ratios=list(ratios), lstm=2, causal=False, norm="weight_norm")
    backbone = models.VocosBackbone(16, 64, 48, 2, adanorm_num_embeddings=4)
    hop = codec.card.hop_length
    head = heads.ISTFTHead(64, 4 * hop, hop)
    encoder.load_state_dict(part(state, "feature_extractor.encodec.encoder."))
    backbone.load_state_dict(part(state, "backbone."))
    head.load_state_dict(part(state, "head."))
    table = state["feature_extractor.encodec.quantizer.vq.layers.0._codebook.embed"]
    for samples in LENGTHS:
        wave = helpers.wave(samples, rate=24_000, levels=(0.1, 0.9))
        with torch.no_grad():
            latents = encoder(wave[None, None])[0].t()
            expected = torch.cdist(latents, table).argmin(1)
            decoded = head(backbone.eval()(table[expected].t()[None], torch.tensor([0])))[0]
        assert torch.equal(codec.encode([wave])[0].codes[0], expected)
        torch.testing.assert_close(codec.decode(expected[None]), decoded, rtol=0, atol=1e-5)


def test_the_inverse_transform_is_torchs_away_from_the_ends():
    """torch centres frame t on the sample t * hop, ours on the middle of the hop."""
    torch.manual_seed(0)
    spectrum = torch.randn(1, 33, 40, dtype=torch.complex128)
    spectrum[:, [0, -1]] = spectrum[:, [0, -1]].real.to(torch.complex128)
    expected = torch.istft(spectrum, 64, 16, window=torch.hann_window(64, dtype=torch.float64))[0]
    ours = inverse_stft(spectrum, 64, 16)[0]
    assert ours.shape == (640,)
    torch.testing.assert_close(ours[64:-64], expected[56:][: 640 - 128], rtol=0, atol=1e-9)
