"""Many short waves together give the codes of each alone."""

import helpers
import pytest
import torch

from codecssl.tokenize.backends.parts import seanet_short
from codecssl.tokenize.backends.parts.seanet_short import MAX_FRAMES, ShortEncoder


@pytest.fixture(scope="module")
def codec():
    return helpers.random_codec()


def alone(codec, wave):
    """Encode with the stream, which always encodes whole pieces of one wave."""
    stream = codec.stream()
    return torch.cat([stream.push(wave), stream.finish()], 1)


def test_waves_of_any_few_frames_give_the_codes_of_each_alone(codec, monkeypatch):
    waves = [helpers.wave(320 * n - cut, n, rate=16_000) for n in range(1, MAX_FRAMES + 3) for cut in (0, 1, 319)]
    batches, lengths = [], sum(codec.short.runs(n) for n in range(1, MAX_FRAMES + 1))
    call = ShortEncoder.__call__
    monkeypatch.setattr(ShortEncoder, "__call__", lambda self, w, n: batches.append(len(w)) or call(self, w, n))
    codes = helpers.codes_of(codec, waves)
    assert all(torch.equal(found, alone(codec, wave)) for found, wave in zip(codes, waves))
    assert batches.count(3) == lengths >= MAX_FRAMES - 1, "three waves of each length must run in one batch"


@pytest.mark.parametrize("count", [1, 4, 9, 16, 27, 40])
def test_any_number_of_waves_of_one_length_gives_the_codes_of_each_alone(codec, count):
    waves = [helpers.wave(320 * 5 - 7 * n, n, rate=16_000) for n in range(count)]
    assert all(torch.equal(found, alone(codec, wave)) for found, wave in zip(helpers.codes_of(codec, waves), waves))


def test_lengths_whose_bits_differ_run_alone(codec, monkeypatch):
    """The patch emulates a machine on which the order of sums depends on the number of rows."""
    monkeypatch.setattr(codec.short, "_exact", {})
    monkeypatch.setattr(seanet_short, "activated", lambda x: torch.nn.functional.elu(x) * (1 + 1e-6))
    assert not any(codec.short.runs(n) for n in (3, 8, 16))
    waves = [helpers.wave(320 * n, n, rate=16_000) for n in (3, 3, 8, 16)]
    monkeypatch.setattr(ShortEncoder, "__call__", lambda self, w, n: pytest.fail("run together"))
    assert all(torch.equal(f, alone(codec, wave)) for f, wave in zip(helpers.codes_of(codec, waves), waves))
