"""Lists of waves give the states of s3prl's padded batches, and a wave is hashed and computed once."""

from typing import Any

import pytest
import torch

from codecssl.superb.patches import import_patches
from codecssl.superb.patches.faster_modules import weighted_sum
from codecssl.superb.tokens import token_cache
from codecssl.superb.tokens.token_cache import on_device, wave_key
from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.feature_cache import CachedUpstream, ListedUpstream
from codecssl.superb.upstreams.names import parse

import_patches.install()  # before s3prl is imported


def waves(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(n, generator=generator) for n in lengths]


class Ramps(torch.nn.Module):
    """Three layers of ceil(n / 10) frames, 2 wide, that depend on the wave. `calls` counts the waves."""

    calls = 0

    def get_downsample_rates(self, key: str) -> int:
        return 10

    def forward(self, wavs: list[torch.Tensor]) -> dict[str, Any]:
        self.calls += len(wavs)
        frames = [torch.stack([wav[::10], wav[::10] + 1], 1) for wav in wavs]
        first = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)
        return {"hidden_states": [first, 2 * first, 3 * first]}


@pytest.mark.parametrize("name", ["fbank", "codes"])
@pytest.mark.parametrize("lengths", [(16_000, 5_001, 800, 12_345), (700, 480), (16_000,)])
def test_a_list_of_waves_has_the_states_and_lengths_of_s3prls_padded_batch(
    name: str, lengths: tuple[int, ...], loads_codec: Any
) -> None:
    """Batches of waves below 50 ms, which s3prl pads, are among them."""
    import s3prl.hub
    from s3prl.nn import S3PRLUpstream

    upstream = CachedUpstream(UpstreamBuilder().build(parse(name)), 1 << 30)
    s3prl.hub.codecssl_listed = lambda **options: upstream
    genuine, given, counts = S3PRLUpstream("codecssl_listed"), waves(*lengths), torch.tensor(lengths)
    padded = torch.nn.utils.rnn.pad_sequence(given, batch_first=True)
    expected = genuine(padded, counts)
    for found in (ListedUpstream(genuine)(given, counts), ListedUpstream(genuine)(padded[..., None], counts)):
        for ours, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_layers_of_one_shape_lie_side_by_side_and_are_summed_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = CachedUpstream(Ramps(), 1 << 20)
    states = upstream(given := waves(95, 40, 200))["hidden_states"]
    for layer, alone in zip(states, Ramps()(given)["hidden_states"], strict=True):
        assert torch.equal(layer, alone)
    weights = torch.tensor([0.5, -1.0, 2.0])
    expected = weighted_sum([state.clone() for state in states], weights)
    narrow = weighted_sum([state[:, :3] for state in states], weights)
    monkeypatch.setattr(torch, "stack", None)
    assert torch.equal(weighted_sum(states, weights), expected)
    assert torch.equal(narrow, expected[:, :3])


def test_a_wave_is_hashed_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    genuine = token_cache.hashlib.sha256
    monkeypatch.setattr(token_cache.hashlib, "sha256", lambda data: hashed.append(1) or genuine(data))
    (wave,) = waves(100)
    key = wave_key(wave)
    assert wave_key(wave) == key == wave_key(wave.clone())
    assert len(hashed) == 2  # the clone has no key yet
    wave[3] = 0
    assert wave_key(wave) != key
    assert on_device(wave, wave.device) is wave
    assert wave_key(on_device(wave, torch.device("meta"))) == wave_key(wave)
    with torch.inference_mode():
        assert wave_key(wave.clone()) == wave_key(wave)


def test_a_wave_is_computed_once() -> None:
    inner = Ramps()
    upstream = CachedUpstream(inner, 1 << 20)
    for _ in range(2):
        upstream(waves(95, 40))
    assert inner.calls == 2
