"""The log-mel plane: against librosa in float64, for any cut, and in shards that are divided, damaged, repaired."""

import librosa
import numpy as np
import pytest
from helpers import card, wave
from hypothesis import given, settings
from hypothesis import strategies as st

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.integrity.repair import repair
from codecssl.tokenize.integrity.verify import examine
from codecssl.tokenize.mel import HIGH, LOW, MelSpec, MelStream, mel_plane
from codecssl.tokenize.run import run
from codecssl.tokenize.shards import Shards

SPEC = MelSpec.for_codec(80, card((1024,)))
WAVE = wave(60_000, 3, rate=16_000).numpy()


def test_plane_equals_librosa():
    """librosa's frames are centred on hop * t; ours on the middle of frame t, half a hop later."""
    left = (SPEC.window - SPEC.hop_length) // 2
    padded = np.pad(WAVE.astype(np.float64), (left, SPEC.window))
    spectrum = librosa.stft(
        padded, n_fft=SPEC.window, hop_length=SPEC.hop_length, center=False, window="hann", dtype=np.complex128
    )
    bank = librosa.filters.mel(
        sr=16_000, n_fft=SPEC.window, n_mels=80, fmin=0.0, fmax=8000.0, htk=True, norm=None, dtype=np.float64
    )
    power = (bank @ np.abs(spectrum) ** 2) / (SPEC.window / 4) ** 2
    expected = np.clip((np.log10(power.T) - LOW) / (HIGH - LOW) * 255, 0, 255)
    plane = mel_plane(SPEC, WAVE)
    assert plane.shape == (-(-60_000 // 320), 80)
    assert np.abs(plane - expected[: len(plane)]).max() <= 0.5 + 1e-6
    assert np.abs(SPEC.log_power(plane) - np.clip(np.log10(power.T), LOW, HIGH)[: len(plane)]).max() <= 12 / 510 + 1e-5


def test_a_full_scale_sine_has_power_1():
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    assert SPEC.log_power(mel_plane(SPEC, tone))[10].max() == pytest.approx(0.0, abs=0.2)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 60_000), max_size=6), st.integers(1, 60_000))
def test_any_cut_gives_the_same_plane(cuts, samples):
    short = WAVE[:samples]
    stream, found = MelStream(SPEC), []
    for piece in np.split(short, sorted(min(cut, samples) for cut in cuts)):
        found.append(stream.push(piece))
    assert np.array_equal(np.concatenate([*found, stream.finish()]), mel_plane(SPEC, short))


def test_codecs_and_bands_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="overlap between segments"):
        MelSpec.for_codec(80, card((1024,), segment_samples=16_000, segment_stride=15_840))
    with pytest.raises(UserError, match="bands hold no bin"):
        MelSpec.for_codec(256, card((1024,)))


@pytest.fixture
def dataset(audio_folder, tmp_path, hashcodec):
    def make(name, **options):
        config = dict(
            sources=(str(audio_folder),), codec="hash_16khz", workers=0, mel_bands=80, shard_inputs=6, block_inputs=4
        )
        for task in range(options.get("tasks", 1)):
            run(TokenizeConfig(output=tmp_path / name, task=task, **{**config, **options}))
        return tmp_path / name

    return make


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_shards_hold_the_plane_next_to_unchanged_codes(dataset, audio_folder):
    whole, without, coded = dataset("a"), dataset("b", mel_bands=None), dataset("c", compress=True)
    with_mel, plain, compressed = Shards(whole), Shards(without), Shards(coded)
    assert plain.mel_spec is None
    assert len(with_mel) == len(plain) > 5
    from codecssl.tokenize.sources.audio import read_wave

    for index, utterance in enumerate(with_mel.utterances()):
        assert np.array_equal(with_mel.codes(index), plain.codes(index))
        expected = mel_plane(SPEC, read_wave(audio_folder / utterance.path, 16_000))
        assert np.array_equal(with_mel.mel(index), expected)
        assert np.array_equal(compressed.mel(index), expected)
        assert np.array_equal(with_mel.mel(index, start=1, stop=len(expected)), expected[1:])
    with pytest.raises(UserError, match="--with-mel 80"):
        plain.mel(0)


def test_the_bytes_do_not_depend_on_the_division_of_the_work(dataset):
    assert files(dataset("one")) == files(dataset("three", tasks=3))


def test_another_plane_is_another_dataset(dataset):
    dataset("a")
    with pytest.raises(UserError, match="begun with mel"):
        dataset("a", mel_bands=40)


def test_a_damaged_plane_is_found_named_and_repaired(dataset):
    root = dataset("a")
    before, tar = files(root), root / "shards" / "00001.tar"
    content = bytearray(tar.read_bytes())
    blocks = Shards(root).blocks
    first = int(blocks["first"][blocks["shard"] == 1][0])
    plane = Shards(root).mel(first).tobytes()
    content[bytes(content).index(plane) + len(plane) // 2] ^= 4
    tar.write_bytes(content)
    with pytest.raises(UserError, match="log-mel plane of utterance"):
        Shards(root).mel(first)
    damages = [str(damage) for damage in examine(root, sample=0).damages]
    assert any("log-mel plane of utterance" in damage for damage in damages), damages
    repair(root, workers=0)
    assert files(root) == before
