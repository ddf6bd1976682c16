"""The upstream contract of s3prl, with an EnCodec-like codec and a real encoder."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from codecssl.superb import compat
from codecssl.superb.codes import CodeCache
from codecssl.superb.expert import CodecExpert, CodeTables, Shelf, parse, parse_all
from codecssl.superb.features import CachedUpstream
from codecssl.tokenize.errors import UserError


@pytest.fixture
def waves() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(n, generator=generator) for n in (16000, 5001, 800, 12345, 319)]


@pytest.mark.parametrize("name", ["MODEL", "codes", "random:MODEL", "codes:MODEL"])
def test_batch_equals_one_by_one(name: str, model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]) -> None:
    """To 1e-4 on every wave's own frames, and zeros beyond them."""
    expert = Shelf().build(parse(name.replace("MODEL", str(model_folder))))
    together = expert(waves)["hidden_states"]
    for i, wave in enumerate(waves):
        for layer, alone in zip(together, expert([wave])["hidden_states"], strict=True):
            frames = -(-len(wave) // 320)
            assert alone.shape[1] == frames
            assert torch.allclose(layer[i, :frames], alone[0], atol=1e-4)
            assert not layer[i, frames:].any()


def test_hidden_states_are_the_models_own(model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]) -> None:
    from codecssl.pretrain.export import load_pretrained

    states = Shelf().build(parse(str(model_folder)))(waves[:1])["hidden_states"]
    codes = loads_codec.encode(waves[:1])[0]
    expected = load_pretrained(model_folder).extract(codes[None], [codes.shape[1]])
    assert len(states) == 3  # the input of the first layer, then two layers
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(states, expected, strict=True))


def test_codes_are_the_codecs_dequantised_latent(loads_codec: Any, waves: list[torch.Tensor]) -> None:
    state = Shelf().build(parse("codes"))(waves[:1])["hidden_states"][0]
    latents = loads_codec.latents(loads_codec.encode(waves[:1])[0])
    assert torch.allclose(state[0].T, latents, atol=1e-5)


def test_random_has_the_models_shape_but_not_its_weights(
    model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]
) -> None:
    names = (str(model_folder), f"random:{model_folder}")
    model, untrained = (Shelf(seed=0).build(parse(name))(waves)["hidden_states"] for name in names)
    other = Shelf(seed=1).build(parse(names[1]))(waves)["hidden_states"]
    assert [s.shape for s in model] == [s.shape for s in untrained]
    assert not torch.allclose(model[-1], untrained[-1], atol=1e-2)
    assert not torch.allclose(other[-1], untrained[-1], atol=1e-2)


def test_nothing_can_train_it(model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]) -> None:
    """No parameter, no gradient, no dropout, whatever mode s3prl puts it in."""
    expert = Shelf().build(parse(str(model_folder)))
    expert.train()
    states = expert(waves)["hidden_states"]
    assert not list(expert.parameters())
    assert not expert.state_dict()
    assert not states[-1].requires_grad
    assert torch.equal(states[-1], expert(waves)["hidden_states"][-1])


def test_moving_the_expert_moves_the_encoder(model_folder: Path, loads_codec: Any) -> None:
    expert = Shelf().build(parse(str(model_folder))).to(torch.float64)
    assert {p.dtype for p in expert.encoder.parameters()} == {torch.float64}


@pytest.mark.parametrize(("sample_rate", "hop", "rate"), [(16000, 320, 320), (24000, 320, 213), (24000, 1920, 1280)])
@pytest.mark.parametrize("samples", [1, 213, 16000, 16000 * 120 + 7])
def test_frames_follow_s3prl_at_any_rate(codec: Any, sample_rate: int, hop: int, rate: int, samples: int) -> None:
    """Exactly ceil(n / rate) frames, each the codec's frame that holds its first sample, even after two
    minutes.
    """
    from dataclasses import replace

    card = replace(codec.card, sample_rate=sample_rate, hop_length=hop)
    frames = math.ceil(math.ceil(samples * sample_rate / 16000) / hop)
    numbers = torch.arange(frames)[None]  # the code of each frame is its number
    expert = CodecExpert(
        card, CodeCache(lambda wavs: [numbers], "x"), CodeTables([torch.arange(frames)[:, None].float()])
    )
    state = expert([torch.zeros(samples)])["hidden_states"][0][0, :, 0]
    assert expert.get_downsample_rates("hidden_states") == rate
    assert len(state) == len(range(0, samples, rate))
    for j in random.Random(0).sample(range(len(state)), min(50, len(state))):
        assert abs(float(state[j]) - j * rate * sample_rate / 16000 / hop) < 1 or j == len(state) - 1


def test_a_24_khz_codec_hears_the_same_sound(codec: Any) -> None:
    """Waves reach the codec at its own rate."""
    from types import SimpleNamespace

    from codecssl.superb.expert import encode

    heard: list[torch.Tensor] = []
    stand_in: Any = SimpleNamespace(
        card=SimpleNamespace(sample_rate=24000), encode=lambda wavs: heard.extend(wavs) or []
    )
    encode(stand_in, [torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000)])
    expected = torch.sin(2 * torch.pi * 1000 * torch.arange(24000) / 24000)
    assert heard[0].shape == (24000,)
    assert (heard[0] - expected)[300:-300].abs().max() < 1e-2


def test_s3prl_takes_it(model_folder: Path, loads_codec: Any) -> None:
    """As a plain user of s3prl would: through its hub, its wrapper and its featurizer."""
    compat.install()
    from s3prl.nn import Featurizer, S3PRLUpstream

    from codecssl.superb import hubconf

    hubconf.register()
    upstream = S3PRLUpstream("codecssl", str(model_folder))
    lengths = torch.tensor([16000, 9999, 400])
    states, frames = upstream(torch.randn(3, 16000), lengths)
    mixed, _ = Featurizer(upstream)(states, frames)
    assert upstream.num_layers == 3
    assert upstream.downsample_rates == [320] * 3
    assert frames[0].tolist() == [50, 32, 2]
    assert mixed.shape == (3, 50, 32)


def test_fbank_is_s3prls(waves: list[torch.Tensor]) -> None:
    compat.install()
    import s3prl.hub

    expected = s3prl.hub.fbank()(waves[:2])["hidden_states"][0]
    assert torch.equal(Shelf().build(parse("fbank"))(waves[:2])["hidden_states"][0], expected)
    assert torch.equal(Shelf().build(parse("fbank@s3prl"))(waves[:2])["hidden_states"][0], expected)


@pytest.mark.parametrize("name", ["hubert_basse", "random:nowhere", "nowhere/model", "fbank:x"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"upstream {name}: not known; give"):
        parse(name)


def test_an_unknown_s3prl_name_is_refused() -> None:
    with pytest.raises(UserError, match="upstream nothing@s3prl: s3prl's hub has no nothing"):
        Shelf().build(parse("nothing@s3prl"))


def test_bare_baselines_follow_the_first_model(model_folder: Path) -> None:
    """So that `codes` and `random` share the codec and the architecture of what they stand beside."""
    named = parse_all(["fbank", "codes", str(model_folder), "random", "codes:tiny_16khz"])
    assert [u.argument for u in named] == [
        None,
        str(model_folder),
        str(model_folder),
        str(model_folder),
        "tiny_16khz",
    ]
    assert parse_all(["codes"])[0].argument is None


def test_the_codec_runs_once_per_wave(
    model_folder: Path, loads_codec: Any, waves: list[torch.Tensor], tmp_path: Path
) -> None:
    """For all upstreams of a process, twice in one batch, and in a later process through the folder."""
    shelf = Shelf(code_folder=tmp_path)
    experts = [
        shelf.build(parse(name)) for name in (str(model_folder), f"codes:{model_folder}", f"random:{model_folder}")
    ]
    for expert in experts:
        expert([*waves, waves[0]])
    cache: Any = experts[0].codes
    assert cache.encoded == len(waves)
    later: Any = Shelf(code_folder=tmp_path).build(parse(str(model_folder)))
    assert torch.equal(later(waves)["hidden_states"][-1], experts[0](waves)["hidden_states"][-1])
    assert later.codes.encoded == 0
    assert not list(tmp_path.glob("**/*.part"))


def test_a_full_code_cache_still_answers(loads_codec: Any, waves: list[torch.Tensor]) -> None:
    cache = CodeCache(loads_codec.encode, "x", limit_bytes=900)  # room for some, not for all
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(cache(waves), loads_codec.encode(waves), strict=True))
    assert len(waves) < cache.encoded < 2 * len(waves)


@pytest.mark.parametrize("limit", [0, 30_000, 1 << 30])
def test_cached_features_equal_uncached(
    limit: int, model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]
) -> None:
    """With no memory, with some, with enough; first and second time."""
    expert = Shelf().build(parse(str(model_folder)))
    cached = CachedUpstream(expert, limit)
    expected = expert(waves)["hidden_states"]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3]):
        states = cached([waves[i] for i in order])["hidden_states"]
        assert all(torch.allclose(a, b[order], atol=1e-4) for a, b in zip(states, expected, strict=True))
    assert cached.get_downsample_rates("hidden_states") == 320


def test_kept_features_do_not_depend_on_the_batch(
    model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]
) -> None:
    expert = Shelf().build(parse(str(model_folder)))
    one, other = CachedUpstream(expert, 1 << 30), CachedUpstream(expert, 1 << 30)
    for wave in reversed(waves):
        one([wave])
    assert torch.equal(one(waves)["hidden_states"][-1], other(waves)["hidden_states"][-1])


def test_a_kept_wave_is_not_computed_again(model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]) -> None:
    expert = Shelf().build(parse(str(model_folder)))
    seen: list[int] = []
    expert.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    cached = CachedUpstream(expert, 1 << 30)
    for _ in range(2):
        cached([*waves, waves[0]])
    assert seen == [1] * len(waves)
