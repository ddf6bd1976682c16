"""Codes by content, from the token cache, from memory or from the codec, and counts of each."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import codes_of

from codecssl.superb.tokens.token_cache import CachedCodec, TokenCache, codec_folder, wave_key
from codecssl.tokenize.write_codes import write_shards


@pytest.fixture
def waves() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(n, generator=generator) for n in (16000, 5001, 800, 12345, 319)]


def test_a_key_is_the_sha256_of_the_samples(waves: list[torch.Tensor]) -> None:
    import hashlib

    wave = waves[0]
    assert wave_key(wave) == hashlib.sha256(wave.numpy().tobytes()).hexdigest()
    assert wave_key(wave.double()) == wave_key(wave)
    assert wave_key(torch.stack([wave, wave], 1)[:, 0]) == wave_key(wave)  # whatever lies between the samples
    assert wave_key(wave[1:]) != wave_key(wave)


def test_memory_answers_the_second_time(codec: Any, waves: list[torch.Tensor]) -> None:
    cache = CachedCodec(partial(codes_of, codec))
    expected = codes_of(codec, waves)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(cache([*waves, waves[0]]), [*expected, expected[0]], strict=True))
    assert cache.counts == {"cached": 0, "kept": len(waves), "live": len(waves)}


def test_a_full_memory_still_answers(codec: Any, waves: list[torch.Tensor]) -> None:
    cache = CachedCodec(partial(codes_of, codec), limit_bytes=900)  # room for some, not for all
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(cache(waves), codes_of(codec, waves), strict=True))
    assert len(waves) < cache.encoded < 2 * len(waves)


def test_waves_on_disk_never_reach_the_codec(codec: Any, waves: list[torch.Tensor], tmp_path: Path) -> None:
    """A wave cut by one sample is another wave."""
    _write(tmp_path, codec, waves[:3])
    asked: list[int] = []
    stored = TokenCache(tmp_path, codec.card)
    cache = CachedCodec(lambda wavs: asked.extend(map(len, wavs)) or codes_of(codec, wavs), stored)
    given = [*waves, waves[0][1:]]
    assert all(torch.equal(a, b) for a, b in zip(cache(given), codes_of(codec, given), strict=True))
    assert asked == [len(wave) for wave in given[3:]]
    assert cache.counts == {"cached": 3, "kept": 0, "live": 3}


def _write(root: Path, codec: Any, waves: list[torch.Tensor]) -> None:
    """A set as `fill` writes it, by way of the tokenize stage's own writer."""
    from codecssl.tokenize.format.layout import to_planes
    from codecssl.tokenize.format.records import EncodedUtterance
    from codecssl.tokenize.format.writer import ShardWriter, finish_dataset

    folder = codec_folder(root, codec.card) / "set"
    writer = ShardWriter(folder, 0, codec.card)
    utterances = [
        EncodedUtterance(
            id=wave_key(wave),
            path="x",
            codes=to_planes(codes.numpy().astype(np.uint16), codec.card),
            samples=len(wave),
            source_sha256=wave_key(wave),
            source_rate=16_000,
            source_samples=len(wave),
        )
        for wave, codes in zip(waves, codes_of(codec, waves), strict=True)
    ]
    writer.add_block(len(utterances), utterances, [])
    writer.finish(inputs_sha256="")
    finish_dataset(folder, {"codec": codec.card.to_dict(), "sources": []}, 1)


def test_keys_with_zeros_at_their_end_are_found(codec: Any, tmp_path: Path) -> None:
    """numpy's byte strings drop them; a key must not lose its last bytes."""
    from codecssl.superb.tokens.token_cache import KeyedShards

    shards = write_shards(tmp_path / "set", codec.card, [(str(i), np.full((8, 3), i), {}) for i in range(200)])
    keys = KeyedShards(tmp_path / "set", codec.card)
    for i in range(200):
        key = shards.utterance(i).source_sha256
        assert (keys.find(key) == i).all()
        assert keys.find(key[:-1] + ("1" if key[-1] == "0" else "0")) is None
    assert keys.find("00" * 32) is None
    assert keys.find("ff" * 32) is None
