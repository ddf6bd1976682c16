"""Waves through `from_pretrained`: equal states as from token shards in any batch; errors of one line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from codecssl.pretrain.export.pretrained import from_pretrained
from codecssl.tokenize.codec import Codec, CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.registry import load_codec
from codecssl.tokenize.run import run
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.sources.waves import frame_times

RATE = 44_100
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec("tiny_16khz")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Three files at 44.1 kHz, tokenized with a log-mel plane."""
    root, random = tmp_path_factory.mktemp("audio"), np.random.default_rng(0)
    for number, samples in enumerate((44_100, 9_001, 20_000)):
        wave = 0.1 * random.standard_normal(samples).astype(np.float32)
        soundfile.write(root / f"{number}.wav", wave, RATE, subtype="FLOAT")
    run(TokenizeConfig(sources=(str(root),), output=root / "shards", codec="tiny_16khz", workers=0, mel_bands=24))
    return Shards(root / "shards")


def waves_of(shards: Shards) -> list[np.ndarray]:
    return [soundfile.read(shards.path.parent / f"{i}.wav", dtype="float32")[0] for i in range(3)]


@pytest.mark.parametrize(
    "settings",
    [
        {"input": "codes", "norm": "post", "positions": "conv"},
        {"input": "mel", "norm": "residual", "positions": "sinusoidal"},
        {"input": "both", "norm": "pre", "positions": "rotary"},
    ],
)
def test_states_are_those_of_the_shards_and_not_of_the_batch(
    settings: dict[str, Any], shards: Shards, codec: Codec, export_of: Export
) -> None:
    model, waves = from_pretrained(export_of(codec.card, **settings)), waves_of(shards)
    batch = model(waves, sampling_rate=RATE)
    assert batch.attention_mask.sum(1).tolist() == shards.frames.tolist()
    assert len(batch.hidden_states) == 4
    for index, wave in enumerate(waves):
        codes = torch.from_numpy(shards.codes(index).astype(np.int64))[None]
        mel = None if model.mel_spec is None else torch.from_numpy(shards.mel(index).T.copy())[None]
        expected = model(codes, mel=mel, output_hidden_states=True).hidden_states
        alone = model(wave, sampling_rate=RATE)
        for layer, states in enumerate(expected):
            torch.testing.assert_close(alone.hidden_states[layer], states, rtol=0, atol=1e-5)
            own = batch.hidden_states[layer][index][batch.attention_mask[index]]
            torch.testing.assert_close(own, states[0], rtol=0, atol=1e-5)
        assert torch.equal(batch.frame_times[index][batch.attention_mask[index]], alone.frame_times[0])


def test_a_model_of_the_plane_alone_never_loads_the_codec(
    export_of: Export, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from codecssl.pretrain.export import wave_input

    monkeypatch.setattr(wave_input, "load_codec_for", lambda *_, **__: pytest.fail("a codec was loaded"))
    model = from_pretrained(export_of(codec.card, input="mel"))
    assert model(torch.ones(1600) / 2, sampling_rate=16_000).last_hidden_state.shape == (1, 5, 32)


def test_the_shipped_model_takes_waves() -> None:
    output = from_pretrained("laptop_16khz")(torch.randn(2, 16_000) / 10, sampling_rate=16_000)
    assert output.last_hidden_state.shape == (2, 50, 256)
    assert output.frame_times[0, :3].tolist() == [0.01, 0.03, 0.05]
    assert torch.isfinite(output.last_hidden_state).all()


def test_times_of_overlapping_segments() -> None:
    """The oracle is EnCodec's own loop: a segment every `stride` samples, framed by itself."""
    card = load_codec("tiny_16khz").card
    card = replace(card, hop_length=320, segment_samples=48_000, segment_stride=47_520, sample_rate=48_000)
    for samples in (1, 320, 47_999, 48_000, 48_001, 95_300, 200_000):
        expected = []
        for offset in range(0, samples, 47_520):
            length = min(48_000, samples - offset)
            expected += [(offset + 320 * frame + 160) / 48_000 for frame in range(-(-length // 320))]
        assert np.allclose(frame_times(card, samples), expected, atol=1e-12)
        assert len(expected) == card.frames_of(samples)


BAD: list[tuple[Any, Any, str]] = [
    (np.ones(10, np.float32), 16_000, r"waves\[0\]: 10 samples at 16000 Hz are shorter than one frame of tiny_16khz"),
    ([np.ones(800), np.full(800, np.nan)], 16_000, r"waves\[1\]: NaN or infinite from sample 0 on"),
    ([np.ones((2, 800))], 16_000, r"waves\[0\]: shape \(2, 800\), must be one channel"),
    (np.ones((800, 2)), 16_000, r"waves: shape \(800, 2\) is samples by channels"),
    (np.ones((1, 2, 800)), 16_000, r"waves: shape \(1, 2, 800\), must be"),
    (np.ones(800, np.int16), 16_000, r"waves\[0\]: torch.int16, must be floats"),
    (np.ones(800), None, r"sampling_rate None: must be given"),
    (np.ones(800), 0, r"sampling_rate 0: must be from 1000 to 768000 Hz"),
    (np.ones(800), "16k", r"sampling_rate '16k': must be given for waves, as whole Hz"),
    ([], 16_000, r"waves: an empty batch"),
    (np.zeros((0, 16_000)), 16_000, r"waves: an empty batch"),
    (np.ones(3 * 3600 * 1000, np.float32), 1000, r"waves\[0\]: 10800 s are 540,000 frames, at most 30,000"),
]


@pytest.mark.parametrize(("waves", "rate", "message"), BAD)
def test_bad_input_is_one_line(waves: Any, rate: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        from_pretrained("laptop_16khz")(waves, sampling_rate=rate)
    assert "\n" not in str(caught.value)


def test_silence_warns_and_has_finite_states() -> None:
    with pytest.warns(UserWarning, match=r"waves\[0\]: silent, all 1600 samples are 0"):
        output = from_pretrained("laptop_16khz")(np.zeros(1600), sampling_rate=16_000)
    assert torch.isfinite(output.last_hidden_state).all()


def test_another_codec_is_refused(export_of: Export, codec: Codec, tmp_path: Path) -> None:
    fewer = load_codec("tiny_16khz", num_codebooks=4)
    with pytest.raises(UserError, match=r"codec tiny_16khz: the model was trained on tiny_16khz \(codebook_sizes"):
        from_pretrained("laptop_16khz", codec=fewer)
    assert from_pretrained("laptop_16khz", codec=codec)(np.ones(400), sampling_rate=16_000).frame_times.shape == (1, 2)
    other: CodecCard = replace(codec.card, weights_sha256="0" * 64)
    with pytest.raises(UserError, match="the data was written with 000000000000; give the original weights"):
        from_pretrained(export_of(other))(np.ones(800), sampling_rate=16_000)
