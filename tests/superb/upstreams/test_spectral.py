"""The baselines logmel and mfcc against librosa in float64."""

import librosa
import numpy as np
import pytest
import torch

from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.names import parse
from codecssl.superb.upstreams.spectral import FLOOR, LogMel, Mfcc

WAVE = 0.3 * np.random.default_rng(0).standard_normal(16_123)
FRAMES = -(-len(WAVE) // 160)


def reference(bands: int) -> np.ndarray:
    options = {"n_fft": 400, "hop_length": 160, "pad_mode": "constant", "fmax": 8000.0}
    power = librosa.feature.melspectrogram(y=WAVE, sr=16000, n_mels=bands, dtype=np.float64, **options)
    return np.log(np.maximum(power, FLOOR))[:, :FRAMES]


def test_log_mel_equals_that_of_librosa() -> None:
    found = LogMel().frames(torch.from_numpy(WAVE)).numpy()
    assert found.shape == (FRAMES, 80)
    assert np.abs(found.T - reference(80)).max() < 1e-4  # torchaudio's and librosa's filters are float32


def test_mfcc_equals_that_of_librosa_with_second_deltas() -> None:
    cepstra = librosa.feature.mfcc(S=reference(40), n_mfcc=13)
    deltas = librosa.feature.delta(cepstra, width=5, mode="nearest")
    expected = np.concatenate([cepstra, deltas, librosa.feature.delta(deltas, width=5, mode="nearest")])
    found = Mfcc().frames(torch.from_numpy(WAVE)).numpy().T
    assert found.shape == (39, FRAMES)
    assert np.abs(found - expected).max() < 1e-3


@pytest.mark.parametrize(("name", "width"), [("logmel", 80), ("mfcc", 39)])
def test_as_upstreams_waves_do_not_depend_on_their_batch(name: str, width: int) -> None:
    """Waves include one shorter than a window. Features of silence are finite."""
    expert = UpstreamBuilder().build(parse(name))
    waves = [torch.from_numpy(WAVE).float(), torch.from_numpy(WAVE[:150]).float(), torch.zeros(1000)]
    (batch,) = expert(waves)["hidden_states"]
    assert batch.shape == (3, FRAMES, width)
    assert batch.isfinite().all()
    for wave, found in zip(waves, batch, strict=True):
        frames = -(-len(wave) // expert.get_downsample_rates("hidden_states"))
        assert torch.equal(expert([wave])["hidden_states"][0][0], found[:frames])
        assert not found[frames:].any()
