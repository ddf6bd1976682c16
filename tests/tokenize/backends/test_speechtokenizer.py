"""Ours against the authors' package, and its parts against the encodec package, on random weights."""

import helpers
import pytest
import random_weights
import references
import torch
from encodec.quantization.vq import ResidualVectorQuantizer

from codecssl.tokenize.backends import speechtokenizer
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

LENGTHS = [1, 3, 319, 320, 321, 5000, 16_000, 44_321]


@pytest.fixture(scope="module")
def state():
    return random_weights.speechtokenizer_state()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return random_weights.write_speechtokenizer(tmp_path_factory.mktemp("speechtokenizer"))


def test_codes_and_wave_are_those_of_the_authors_package(path, state):
    own = references.installed(
        "speechtokenizer.model", "pip install --no-deps speechtokenizer beartype", "speechtokenizer.trainer"
    )
    model = own.SpeechTokenizer(random_weights.SPEECHTOKENIZER)
    model.load_state_dict(state)  # strict: the checkpoint has the package's keys, and only those
    model, codec = model.eval(), load_codec(str(path))
    for samples in LENGTHS:
        wave = helpers.wave(samples, rate=16_000, levels=(0.1, 0.9))
        with torch.no_grad():
            expected = model.encode(wave[None, None])[:, 0]
            decoded = model.decode(expected[:, None])[0, 0]
        assert torch.equal(codec.encode([wave])[0].codes, expected)
        torch.testing.assert_close(codec.decode(expected), decoded, rtol=0, atol=1e-5)


def test_codes_are_those_of_the_encodec_packages_quantizer(path, state):
    codec = load_codec(str(path))
    own = ResidualVectorQuantizer(dimension=16, n_q=8, bins=64)
    own.load_state_dict({k.removeprefix("quantizer."): v for k, v in state.items() if k.startswith("quantizer.")})
    wave = helpers.wave(30_000, rate=16_000)
    with torch.no_grad():
        latents = codec.encode_latents(wave)
        expected = own.vq.encode(latents[None])[:, 0]
    assert torch.equal(codec.encode([wave])[0].codes, expected)
    torch.testing.assert_close(codec.latents(expected), own.decode(expected[:, None])[0], rtol=0, atol=1e-5)


def test_the_last_latents_reach_the_first(path):
    """The encoder's LSTM reads in both directions."""
    codec = load_codec(str(path))
    wave = helpers.wave(16_000, rate=16_000)
    other = torch.cat([wave[:8000], -wave[8000:]])
    with torch.no_grad():
        assert (codec.encode_latents(wave) - codec.encode_latents(other))[:, 0].abs().max() > 1e-7


def test_fewer_codebooks_are_the_first_rows(path):
    wave = helpers.wave(9_000, rate=16_000)
    whole, some = load_codec(str(path)), load_codec(str(path), num_codebooks=3)
    assert torch.equal(some.encode([wave])[0].codes, whole.encode([wave])[0].codes[:3])
    assert len(some.embeddings()) == some.card.num_codebooks == 3


def test_a_checkpoint_alone_has_the_published_configuration(tmp_path):
    path = tmp_path / "SpeechTokenizer.pt"
    assert speechtokenizer.read_config(path) == speechtokenizer.DEFAULTS
    torch.save(random_weights.speechtokenizer_state(), path)
    with pytest.raises(UserError, match=r"not the weights of speechtokenizer .*size mismatch"):
        load_codec(str(path))


@pytest.mark.parametrize(("text", "message"), [('{"sample_rate": 24000}', "has 16000"), ("[", "not a model's")])
def test_another_configuration_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        speechtokenizer.read_config(tmp_path / "SpeechTokenizer.pt")
