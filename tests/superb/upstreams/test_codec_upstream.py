"""The upstream contract of s3prl, with an EnCodec-like codec and a real encoder."""

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import codes_of

from codecssl.superb.patches import import_patches
from codecssl.superb.tokens.codec_at_16khz import encode
from codecssl.superb.tokens.token_cache import CachedCodec
from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.codec_upstream import CodecUpstream, CodeTables
from codecssl.superb.upstreams.feature_cache import CachedUpstream
from codecssl.superb.upstreams.names import parse
from codecssl.tokenize.common.errors import UserError


@pytest.fixture
def waves() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(n, generator=generator) for n in (16000, 5001, 800, 12345, 319)]


@pytest.mark.parametrize("name", ["MODEL", "codes", "random:MODEL", "codes:MODEL", "fbank", "fbank@s3prl"])
def test_batch_equals_one_by_one(name: str, model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]) -> None:
    """A batch gives each wave's own features to 1e-4, and zeros after them. Others: test_transformers_upstreams.py."""
    expert: Any = UpstreamBuilder().build(parse(name.replace("MODEL", str(model_folder))))
    long = 0.3 * torch.randn(240_000, generator=torch.Generator().manual_seed(1))  # 15 s
    batch = [*waves[:-1], long, waves[0][:1600]] if "fbank" in name else [*waves, long]
    _batch_is_one_by_one(expert, batch, exact_frames="fbank" not in name)


def _batch_is_one_by_one(expert: Any, waves: list[torch.Tensor], exact_frames: bool) -> None:
    together, rate = expert(waves)["hidden_states"], expert.get_downsample_rates("hidden_states")
    for i, wave in enumerate(waves):
        for layer, alone in zip(together, expert([wave])["hidden_states"], strict=True):
            frames = alone.shape[1]
            assert frames == -(-len(wave) // rate) or (not exact_frames and abs(frames - len(wave) / rate) < 5)
            torch.testing.assert_close(layer[i, :frames], alone[0], rtol=1e-4, atol=1e-4)
            assert not layer[i, frames:].any()


ENCODERS = {  # of each kind of pretraining that can be exported, shrunk
    "codec2vec_base_codes": {},
    "codec2vec_large_labels": {},
    "codec2vec_base_online": {},
    "encodecmae_base": {"embedding_init": "codec", "embedding_dim": None},
    "encodecmae_large_st": {"embedding_init": "codec", "embedding_dim": None},
    "rotary": {"positions": "rotary", "norm": "pre"},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_batch_equals_one_by_one_for_each_kind_of_model(name: str, codec: Any, waves: list[torch.Tensor]) -> None:
    import dataclasses

    from codecssl.configs.load import load_config
    from codecssl.pretrain.config import ModelConfig, RunConfig
    from codecssl.pretrain.model.model import untrained

    config = ModelConfig() if name == "rotary" else load_config(RunConfig, "pretrain", name).model
    small: Any = {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 64, "conv_kernel": 8, "conv_groups": 4}
    model = untrained(dataclasses.replace(config, **small, **ENCODERS[name]), codec.card, codec.embeddings(), seed=3)
    long = 0.3 * torch.randn(240_000, generator=torch.Generator().manual_seed(1))
    expert = CodecUpstream(codec.card, CachedCodec(partial(codes_of, codec)), model)
    _batch_is_one_by_one(expert, [*waves, long], exact_frames=True)


@pytest.mark.parametrize("name", ["MODEL", "fbank"])
@pytest.mark.parametrize("samples", [400, 479, 480, 799, 800, 801, 12_345, 200_000])
def test_frame_counts_follow_s3prls_rule(name: str, samples: int, model_folder: Path, loads_codec: Any) -> None:
    """The number of frames is within 5 of ceil(n / rate), as s3prl's own check asks. Its wrapper accepts them."""
    import_patches.install()
    import s3prl.hub
    from s3prl.nn import S3PRLUpstream

    expert: Any = UpstreamBuilder().build(parse(name.replace("MODEL", str(model_folder))))
    wave = 0.3 * torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    rate = expert.get_downsample_rates("hidden_states")
    for state in expert([wave])["hidden_states"]:
        assert abs(state.shape[1] - -(-samples // rate)) < 5
    s3prl.hub.codecssl_counts = lambda **options: expert
    states, lengths = S3PRLUpstream("codecssl_counts")(wave[None], torch.tensor([samples]))
    assert {s.shape[1] for s in states} == {int(n) for n in lengths} == {-(-samples // rate)}


def test_hidden_states_equal_those_of_the_model(
    model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]
) -> None:
    from codecssl.pretrain.export.export import load_pretrained

    states = UpstreamBuilder().build(parse(str(model_folder)))(waves[:1])["hidden_states"]
    codes = loads_codec.encode(waves[:1])[0].codes
    expected = load_pretrained(model_folder).extract(codes[None], [codes.shape[1]])
    assert len(states) == 3  # the input of the first layer, then two layers
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(states, expected, strict=True))


def test_codes_equal_the_dequantised_latent_of_the_codec(loads_codec: Any, waves: list[torch.Tensor]) -> None:
    state = UpstreamBuilder().build(parse("codes"))(waves[:1])["hidden_states"][0]
    latents = loads_codec.latents(loads_codec.encode(waves[:1])[0].codes)
    assert torch.allclose(state[0].T, latents, atol=1e-5)


def test_random_has_the_models_shape_but_not_its_weights(
    model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]
) -> None:
    names = (str(model_folder), f"random:{model_folder}")
    model, untrained = (UpstreamBuilder(seed=0).build(parse(name))(waves)["hidden_states"] for name in names)
    other = UpstreamBuilder(seed=1).build(parse(names[1]))(waves)["hidden_states"]
    assert [s.shape for s in model] == [s.shape for s in untrained]
    assert not torch.allclose(model[-1], untrained[-1], atol=1e-2)
    assert not torch.allclose(other[-1], untrained[-1], atol=1e-2)


def test_the_upstream_is_frozen_in_every_mode(model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]) -> None:
    """In every mode that s3prl sets there is no parameter, no gradient and no dropout."""
    expert = UpstreamBuilder().build(parse(str(model_folder)))
    expert.train()
    states = expert(waves)["hidden_states"]
    assert not list(expert.parameters())
    assert not expert.state_dict()
    assert not states[-1].requires_grad
    assert torch.equal(states[-1], expert(waves)["hidden_states"][-1])


def test_moving_the_expert_moves_the_encoder(model_folder: Path, loads_codec: Any) -> None:
    expert = UpstreamBuilder().build(parse(str(model_folder))).to(torch.float64)
    assert {p.dtype for p in expert.encoder.parameters()} == {torch.float64}


@pytest.mark.parametrize(("sample_rate", "hop", "rate"), [(16000, 320, 320), (24000, 320, 213), (24000, 1920, 1280)])
@pytest.mark.parametrize("samples", [1, 213, 16000, 16000 * 120 + 7])
def test_frames_follow_s3prl_at_any_rate(codec: Any, sample_rate: int, hop: int, rate: int, samples: int) -> None:
    """There are exactly ceil(n / rate) frames, each the codec's frame that holds its first sample, even after two
    minutes.
    """
    from dataclasses import replace

    card = replace(codec.card, sample_rate=sample_rate, hop_length=hop)
    frames = math.ceil(math.ceil(samples * sample_rate / 16000) / hop)
    numbers = torch.arange(frames)[None]  # the code of each frame is its number
    expert = CodecUpstream(
        card, CachedCodec(lambda wavs: [numbers]), CodeTables([torch.arange(frames)[:, None].float()])
    )
    state = expert([torch.zeros(samples)])["hidden_states"][0][0, :, 0]
    assert expert.get_downsample_rates("hidden_states") == rate
    assert len(state) == len(range(0, samples, rate))
    for j in random.Random(0).sample(range(len(state)), min(50, len(state))):
        assert abs(float(state[j]) - j * rate * sample_rate / 16000 / hop) < 1 or j == len(state) - 1


def test_a_24_khz_codec_gets_the_resampled_wave(codec: Any) -> None:
    """Waves reach the codec at its own rate, on all its channels."""
    from types import SimpleNamespace

    heard: list[torch.Tensor] = []
    card = SimpleNamespace(sample_rate=24000, channels=2, segment_samples=0)
    stand_in: Any = SimpleNamespace(card=card, encode=lambda wavs: heard.extend(wavs) or [])
    encode(stand_in, [torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000)])
    expected = torch.sin(2 * torch.pi * 1000 * torch.arange(24000) / 24000)
    assert heard[0].shape == (2, 24000)
    assert (heard[0] - expected)[:, 300:-300].abs().max() < 1e-2


def test_codes_do_not_depend_on_torchs_threads(codec: Any) -> None:
    """The codec works with one thread on a CPU; torch has its own again afterwards, also after an error."""
    from types import SimpleNamespace

    seen: list[int] = []

    def count(wavs: Any) -> Any:
        seen.append(torch.get_num_threads())
        raise RuntimeError("boom")

    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="boom"):
        encode(SimpleNamespace(card=codec.card, encode=count), [torch.zeros(100)])  # type: ignore[arg-type]
    assert seen == [1]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("samples", [1, 16000, 16000 * 7 + 123])
def test_segments_that_overlap_do_not_drift(codec: Any, samples: int) -> None:
    """A codec of segments of 1 s every 0.99 s (EnCodec 48 kHz) gives more frames than its nominal rate."""
    from dataclasses import replace

    card = replace(codec.card, sample_rate=48000, hop_length=320, segment_samples=48000, segment_stride=47520)
    length = math.ceil(samples * 3)
    numbers = torch.arange(card.frames_of(length))[None]
    tables = CodeTables([torch.arange(numbers.shape[1])[:, None].float()])
    state = CodecUpstream(card, CachedCodec(lambda wavs: [numbers]), tables)([torch.zeros(samples)])["hidden_states"][0]
    rate = 106  # 106.67 samples at 16 kHz
    for j, number in enumerate(state[0, :, 0].tolist()):
        segment, within = divmod(int(number), 150)
        begins = segment * 47520 + within * 320
        assert begins <= j * rate * 3 < begins + 320 or number == numbers.shape[1] - 1


def test_the_upstream_works_in_s3prl(model_folder: Path, loads_codec: Any) -> None:
    """The features pass the hub, the wrapper and the featurizer of s3prl."""
    import_patches.install()
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


def test_s3prls_hub_names_the_missing_option(model_folder: Path) -> None:
    from codecssl.superb import hubconf

    with pytest.raises(UserError, match="give -k MODEL"):
        hubconf.codecssl(ckpt=None, model_config=None, refresh=False)
    with pytest.raises(UserError, match="-g some.yaml: a model contains its configuration"):
        hubconf.codecssl(ckpt=str(model_folder), model_config="some.yaml", refresh=False)


def test_rates_of_several_states_reach_s3prl() -> None:
    """s3prl's upstreams may have one for each hidden state."""

    class Two(torch.nn.Module):
        def get_downsample_rates(self, key: str) -> list[int]:
            return [320, 640]

    assert CachedUpstream(Two(), 0).get_downsample_rates("hidden_states") == [320, 640]


def test_fbank_equals_that_of_s3prl(waves: list[torch.Tensor]) -> None:
    import_patches.install()
    import s3prl.hub

    expected = s3prl.hub.fbank()(waves[:2])["hidden_states"][0]
    assert torch.equal(UpstreamBuilder().build(parse("fbank"))(waves[:2])["hidden_states"][0], expected)
    assert torch.equal(UpstreamBuilder().build(parse("fbank@s3prl"))(waves[:2])["hidden_states"][0], expected)


def test_an_unknown_s3prl_name_is_refused() -> None:
    with pytest.raises(UserError, match="upstream nothing@s3prl: s3prl's hub has no nothing"):
        UpstreamBuilder().build(parse("nothing@s3prl"))


def test_the_codec_runs_once_per_wave(model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]) -> None:
    """All upstreams of a process share one encoding; one wave is in the batch twice."""
    builder = UpstreamBuilder()
    experts = [
        builder.build(parse(name)) for name in (str(model_folder), f"codes:{model_folder}", f"random:{model_folder}")
    ]
    for expert in experts:
        expert([*waves, waves[0]])
    cache: Any = experts[0].codes
    assert cache.encoded == len(waves)


@pytest.mark.parametrize("limit", [0, 30_000, 1 << 30])
def test_cached_features_equal_uncached(
    limit: int, model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]
) -> None:
    """The cache holds nothing, some or all of the waves. Each wave is read twice."""
    expert = UpstreamBuilder().build(parse(str(model_folder)))
    cached = CachedUpstream(expert, limit)
    expected = expert(waves)["hidden_states"]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3]):
        states = cached([waves[i] for i in order])["hidden_states"]
        assert all(torch.allclose(a, b[order], atol=1e-4) for a, b in zip(states, expected, strict=True))
    assert cached.get_downsample_rates("hidden_states") == 320


def test_kept_features_do_not_depend_on_the_batch(
    model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]
) -> None:
    expert = UpstreamBuilder().build(parse(str(model_folder)))
    one, other = CachedUpstream(expert, 1 << 30), CachedUpstream(expert, 1 << 30)
    for wave in reversed(waves):
        one([wave])
    assert torch.equal(one(waves)["hidden_states"][-1], other(waves)["hidden_states"][-1])


def test_a_kept_wave_is_not_computed_again(model_folder: Path, loads_codec: Any, waves: list[torch.Tensor]) -> None:
    expert = UpstreamBuilder().build(parse(str(model_folder)))
    seen: list[int] = []
    expert.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    cached = CachedUpstream(expert, 1 << 30)
    for _ in range(2):
        cached([*waves, waves[0]])
    assert seen == [1] * len(waves)
