"""S3Tokenizer v2 against the package that was made from the published network, on random weights."""

import helpers
import pytest
import random_weights
import references
import torch

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return random_weights.write_s3tokenizer(tmp_path_factory.mktemp("s3"))


def test_codes_are_those_of_the_package(path):
    own = references.installed("s3tokenizer.model_v2", "pip install --no-deps s3tokenizer onnx")
    utils = references.installed("s3tokenizer.utils", "the same")
    config = own.ModelConfig(n_mels=128, n_audio_state=128, n_audio_head=2, n_audio_layer=2)
    model = own.S3TokenizerV2("speech_tokenizer_v2_25hz", config).eval()
    model.load_state_dict(torch.load(path))
    codec = load_codec(str(path))
    for frames in (1, 7, 30):
        wave = helpers.wave(640 * frames, frames, rate=16_000, levels=(0.1, 0.9))
        mel = utils.log_mel_spectrogram(wave)
        expected, lengths = model.quantize(mel[None], torch.tensor([mel.shape[1]]))
        assert lengths.tolist() == [frames]
        assert torch.equal(codec.encode([wave])[0].codes, expected.long())


def test_any_batch_and_any_cut_give_the_same_codes(path):
    codec = load_codec(str(path))
    codes = helpers.check_any_batch_and_any_cut(codec, (1, 640, 700, 60_000))
    [table] = codec.embeddings()
    assert table.shape == (6561, 8)
    assert table.unique().tolist() == [-1, 0, 1]
    assert torch.equal(table[codes[0]].t(), codec.latents(codes))


def test_it_does_not_decode(path):
    with pytest.raises(UserError, match="s3tokenizer_v2: encodes only"):
        load_codec(str(path)).decode(torch.zeros(1, 2, dtype=torch.int64))


def test_missing_and_other_weights_are_one_line(tmp_path):
    for spec in ("s3tokenizer_v2", f"s3tokenizer_v2@{tmp_path}"):
        with pytest.raises(UserError, match="get them by .*state_dict"):
            load_codec(spec)
    torch.save({"encoder.conv1.weight": torch.zeros(4, 4, 3)}, tmp_path / "speech_tokenizer_v2.pt")
    with pytest.raises(UserError, match="not the weights of s3tokenizer_v2"):
        load_codec(str(tmp_path))
