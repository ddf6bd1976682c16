"""Decoded audio: the same samples as from the file, read once while there is room."""

from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import soundfile

from codecssl.superb.patches.decoded_audio import DecodedOnce
from codecssl.tokenize.common.errors import UserError


class CountingLibrosa:
    """librosa that records its calls of `load`."""

    def __init__(self) -> None:
        self.loaded: list[tuple[Any, ...]] = []

    def load(self, path: str, **options: Any) -> Any:
        self.loaded.append((path, *options.values()))
        return librosa.load(path, **options)


@pytest.fixture
def path(tmp_path: Path) -> str:
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 16_000), 8_000, subtype="PCM_16")
    return str(tmp_path / "a.wav")


def test_each_part_at_each_rate_is_decoded_once_and_matches_librosa(path: str) -> None:
    genuine = CountingLibrosa()
    once = DecodedOnce(genuine, limit_bytes=1 << 20)
    for options in ({"sr": 16_000}, {"sr": 16_000, "offset": 0.5, "duration": 0.25}, {"sr": 8_000}) * 2:
        wave, rate = once.load(path, **options)
        assert np.array_equal(wave, librosa.load(path, **options)[0])
        assert rate == options["sr"]
        wave[:] = 0.0  # changes by a caller must have no effect
    assert len(genuine.loaded) == 3


def test_a_rewritten_file_is_read_again(path: str) -> None:
    once = DecodedOnce(librosa, limit_bytes=1 << 20)
    assert once.load(path, sr=8_000)[0].any()
    soundfile.write(path, np.zeros(8_000), 8_000)
    assert not once.load(path, sr=8_000)[0].any()


def test_the_cache_respects_its_size_limit(path: str) -> None:
    genuine = CountingLibrosa()
    once = DecodedOnce(genuine, limit_bytes=16_000 * 4)  # two seconds at 8 kHz, float32
    for rate in (16_000, 8_000, 16_000, 8_000):
        once.load(path, sr=rate)
    assert [rate for _, rate, *_ in genuine.loaded] == [16_000, 8_000, 16_000]


def test_s3prls_loader_reads_a_file_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from codecssl.superb.patches import decoded_audio, import_patches

    import_patches.install()
    import s3prl.dataio.dataset.load_audio as loader

    decoded_audio.install()
    genuine = CountingLibrosa()
    monkeypatch.setattr(loader.librosa, "librosa", genuine)
    audio = loader.LoadAudio([path])
    first = audio[0]["wav"]
    assert np.array_equal(audio[0]["wav"], first)
    assert len(genuine.loaded) == 1
    first.zero_()
    assert audio[0]["wav"].abs().max() > 0.4


@pytest.mark.parametrize("content", ["a letter", None])
def test_a_file_that_cannot_be_used_is_named(content: str | None, tmp_path: Path) -> None:
    """A file without audio, or with samples that are NaN."""
    path = tmp_path / "a.wav"
    if content is None:
        soundfile.write(path, np.array([0.1, np.nan, 0.1], "f4"), 16_000, subtype="FLOAT")
    else:
        path.write_text(content)
    with pytest.raises(UserError, match=r"a\.wav: cannot be used \(.+\); replace it or remove its row$"):
        DecodedOnce(librosa, 0).load(str(path), sr=16_000)
