"""The encoder of Qwen3-TTS-Tokenizer-12Hz against the authors' package and against transformers' Mimi."""

import json

import helpers
import pytest
import random_weights
import references
import torch
from safetensors.torch import load_file

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

HOP = 1920
UNNEEDED = (
    "qwen_tts.inference.qwen3_tts_model",
    "qwen_tts.inference.qwen3_tts_tokenizer",
    "qwen_tts.core.tokenizer_25hz.configuration_qwen3_tts_tokenizer_v1",
    "qwen_tts.core.tokenizer_25hz.modeling_qwen3_tts_tokenizer_v1",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_weights.write_qwen3_tts(tmp_path_factory.mktemp("qwen"))


def test_codes_are_those_of_the_authors_package(folder):
    """Waves are shorter than the window of the attention, which transformers 4.57 has none (backends/mimi.py)."""
    name = "qwen_tts.core.tokenizer_12hz"
    own = references.installed(f"{name}.modeling_qwen3_tts_tokenizer_v2", "pip install --no-deps qwen-tts", *UNNEEDED)
    values = json.loads((folder / "config.json").read_text())
    small = {"hidden_size": 16, "latent_dim": 16, "decoder_dim": 128, "num_hidden_layers": 1, "intermediate_size": 16}
    config = own.Qwen3TTSTokenizerV2Config(
        **values, decoder_config=small | {"num_attention_heads": 1, "num_key_value_heads": 1, "codebook_dim": 16}
    )
    model = own.Qwen3TTSTokenizerV2Model(config).eval()
    state = load_file(folder / "model.safetensors")
    lacking = model.load_state_dict(state, strict=False).missing_keys
    assert all(key.startswith("decoder.") for key in lacking)
    codec = load_codec(str(folder))
    for frames in (1, 5, 14):
        wave = helpers.wave(frames * HOP, rate=24_000, levels=(0.1, 0.9))
        with torch.no_grad():
            [expected] = model.encode(wave[None], torch.ones(1, len(wave), dtype=torch.int64)).audio_codes
        assert torch.equal(codec.encode([wave])[0].codes, expected.t())


@pytest.mark.parametrize("kept", [None, 1, 6])
def test_codes_are_those_of_transformers_mimi(folder, kept):
    codec = load_codec(str(folder), num_codebooks=kept)
    model = random_weights.mimi_model()
    wave = helpers.wave(14 * HOP, rate=24_000, levels=(0.1, 0.9))
    with torch.no_grad():
        expected = model.encode(wave[None, None]).audio_codes[0, : kept or 4]
    assert torch.equal(codec.encode([wave])[0].codes, expected)
    assert (codec.card.name, codec.card.num_codebooks) == ("qwen3_tts_12hz", kept or 4)
    assert len(expected[0].unique()) > 5
    summed = sum(table[c] for table, c in zip(codec.embeddings(), expected)).t()
    torch.testing.assert_close(codec.latents(expected), summed, rtol=0, atol=1e-5)


def test_it_streams_beyond_the_window_as_mimi_does(folder):
    codec = load_codec(str(folder))
    wave = helpers.wave(150 * HOP + 7, rate=24_000)
    codes = codec.encode([wave])[0].codes
    stream = codec.stream()
    parts = [stream.push(part) for part in wave.split(50_001)]
    assert torch.equal(torch.cat([*parts, stream.finish()], 1), codes)
    assert torch.equal(codec.encode_reference(wave), codes)


def test_it_does_not_decode(folder):
    with pytest.raises(UserError, match="qwen3_tts_12hz: encodes only"):
        load_codec(str(folder)).decode(torch.zeros(4, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mimi"}, "model_type 'mimi' with encoder_config, must be"),
        ({"encoder_config": {"sampling_rate": 16_000}}, "an encoder at 16000 Hz"),
        ({"encoder_config": {"hidden_size": "wide"}}, "not the configuration of Qwen3-TTS's encoder"),
        ({"encoder_config": {"num_filters": 4}}, "not the weights of qwen3_tts_12hz"),
    ],
)
def test_another_model_is_refused(folder, tmp_path, changes, message):
    values = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_codec(f"qwen3_tts_12hz@{tmp_path}")


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for spec in ("qwen3_tts_12hz", f"qwen3_tts_12hz@{tmp_path}"):
        with pytest.raises(UserError, match="huggingface-cli download Qwen/Qwen3-TTS-Tokenizer-12Hz"):
            load_codec(spec)
