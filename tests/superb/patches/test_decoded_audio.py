"""Loaded audio: the waves of s3prl's own loader, loaded once while there is room."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from codecssl.superb.patches import decoded_audio, import_patches
from codecssl.superb.patches.decoded_audio import LoadedOnce
from codecssl.tokenize.common.errors import UserError

import_patches.install()  # before s3prl is imported


@pytest.fixture
def path(tmp_path: Path) -> str:
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 16_000), 8_000, subtype="PCM_16")
    return str(tmp_path / "a.wav")


class Loader:
    """s3prl's LoadAudio through a new cache, and as it is. `loaded` counts the genuine loads of the cache."""

    def __init__(self, limit_bytes: int = 1 << 20) -> None:
        from s3prl.dataio.dataset.load_audio import LoadAudio

        self.kind = LoadAudio
        self.genuine: Any = getattr(LoadAudio.__getitem__, "__wrapped__", LoadAudio.__getitem__)
        self.loaded = 0
        self.once = LoadedOnce(self._counted, limit_bytes)

    def _counted(self, audio: Any, index: int) -> Any:
        self.loaded += 1
        return self.genuine(audio, index)

    def item(self, path: str, **options: Any) -> Any:
        return self.once.item(self.kind([path], **options), 0)

    def expected(self, path: str, **options: Any) -> Any:
        return self.genuine(self.kind([path], **options), 0)


def test_each_part_at_each_rate_and_effect_is_loaded_once_and_matches_s3prl(path: str) -> None:
    loader = Loader()
    part = {"start_secs": [0.5], "end_secs": [0.75]}
    for options in ({}, part, {"sample_rate": 8_000}, {"sox_effects": [["gain", "-3.0"]]}) * 2:
        item, expected = loader.item(path, **options), loader.expected(path, **options)
        assert torch.equal(item.pop("wav"), expected.pop("wav"))
        assert item == expected
    assert loader.loaded == 4


def test_random_crops_are_those_of_s3prl_and_differ(path: str) -> None:
    loader = Loader()
    crops = []
    for item in (loader.once.item, loader.genuine):
        audio = loader.kind([path], max_secs=0.5, generator=random.Random(1))
        crops.append([item(audio, 0)["wav"] for _ in range(3)])
    assert all(torch.equal(one, other) for one, other in zip(*crops, strict=True))
    assert not torch.equal(crops[0][0], crops[0][1])
    assert loader.loaded == 1


def test_a_rewritten_file_is_read_again(path: str) -> None:
    loader = Loader()
    assert loader.item(path)["wav"].any()
    soundfile.write(path, np.zeros(8_000), 8_000)
    assert not loader.item(path)["wav"].any()


def test_a_wave_that_was_changed_in_place_is_loaded_again(path: str) -> None:
    loader = Loader()
    first = loader.item(path)["wav"]
    assert loader.item(path)["wav"] is first, "the tensor keeps its key"
    first.zero_()
    assert loader.item(path)["wav"].abs().max() > 0.4
    assert loader.loaded == 2


def test_the_cache_respects_its_size_limit(path: str) -> None:
    loader = Loader(limit_bytes=16_000 * 4)  # two seconds at 8 kHz, float32
    for rate in (16_000, 8_000, 16_000, 8_000):
        loader.item(path, sample_rate=rate)
    assert loader.loaded == 3


def test_s3prls_loader_keeps_its_waves(path: str) -> None:
    decoded_audio.install()
    from s3prl.dataio.dataset.load_audio import LoadAudio

    assert LoadAudio([path])[0]["wav"] is LoadAudio([path])[0]["wav"]


@pytest.mark.parametrize("content", ["a letter", None])
def test_a_file_that_cannot_be_used_is_named(content: str | None, tmp_path: Path) -> None:
    """A file without audio, or with samples that are NaN."""
    path = tmp_path / "a.wav"
    if content is None:
        soundfile.write(path, np.array([0.1, np.nan, 0.1], "f4"), 16_000, subtype="FLOAT")
    else:
        path.write_text(content)
    with pytest.raises(UserError, match=r"a\.wav: cannot be used \(.+\); replace it or remove its row$"):
        Loader(0).item(str(path))
