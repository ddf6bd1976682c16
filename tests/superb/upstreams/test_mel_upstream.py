"""Upstreams whose model reads a log-mel plane: the same states as from shards, cached or not."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codecssl.configs.load import load_config
from codecssl.pretrain.config import ModelConfig, RunConfig
from codecssl.pretrain.export.export import FORMAT, VERSION
from codecssl.pretrain.export.pretrained import from_pretrained
from codecssl.pretrain.model.model import untrained
from codecssl.superb.runner.prefill import jobs
from codecssl.superb.tokens.codec_at_16khz import at_codec_rate, encode
from codecssl.superb.tokens.fill import CacheJob, fill
from codecssl.superb.tokens.waves import Wave
from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.feature_cache import CachedUpstream
from codecssl.superb.upstreams.names import parse
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.mel import MelSpec, mel_plane

SHAPE: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 64, "conv_kernel": 8, "conv_groups": 4}


@pytest.fixture
def export_of(codec: Any, tmp_path: Path) -> Any:
    """export_of(model_input): an untrained model's folder, as `codecssl-pretrain export` writes it."""
    from safetensors.torch import save_file

    def make(model_input: Any) -> Path:
        config, spec = ModelConfig(**SHAPE, input=model_input), MelSpec.for_codec(24, codec.card)
        model = untrained(config, codec.card, None, 7, spec)
        folder = tmp_path / f"model_{model_input}"
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        description = {"format": FORMAT, "version": VERSION, "model": dataclasses.asdict(config), "training": {}}
        description |= {"codec": codec.card.to_dict(), "mel": spec.to_dict()}
        (folder / "config.json").write_text(json.dumps(description))
        return folder

    return make


@pytest.fixture
def waves(tmp_path: Path) -> list[Wave]:
    import soundfile

    random = np.random.default_rng(0)
    for i, samples in enumerate((16_000, 5_001, 801)):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * random.standard_normal(samples), 16_000, subtype="FLOAT")
    return [Wave(path=str(tmp_path / f"{i}.wav")) for i in range(3)]


@pytest.mark.parametrize("model_input", ["mel", "both"])
def test_states_are_those_of_the_plane_and_of_the_token_cache(
    model_input: str, export_of: Any, codec: Any, loads_codec: Any, waves: list[Wave], tmp_path: Path
) -> None:
    folder, cache = export_of(model_input), tmp_path / "cache"
    wavs = [wave.load() for wave in waves]
    live: Any = UpstreamBuilder().build(parse(str(folder)))
    states = live(wavs)["hidden_states"]

    model = from_pretrained(folder)
    for i, wav in enumerate(wavs):
        plane = mel_plane(model.mel_spec, at_codec_rate(wav, codec.card).numpy())  # type: ignore[arg-type]
        [codes] = encode(codec, [wav])
        mel = torch.from_numpy(plane.T.copy())[None]
        output = model(codes[None], mel=mel, output_hidden_states=True)
        for layer, expected in zip(states, output.hidden_states or (), strict=True):
            torch.testing.assert_close(layer[i, : len(plane)], expected[0], rtol=1e-4, atol=1e-4)
        assert not torch.equal(model(codes[None], mel=255 - mel).last_hidden_state, output.last_hidden_state)

    fill(CacheJob(root=cache, name="ks", waves=waves, card=codec.card, load=lambda: codec))
    cached: Any = UpstreamBuilder(code_folder=cache).build(parse(str(folder)))
    for a, b in zip(cached(wavs)["hidden_states"], states, strict=True):
        assert torch.equal(a, b)
    if model_input == "both":
        assert cached.codes.counts["cached"] == 3
    remembered = CachedUpstream(cached, 1 << 30)
    alone = [live([wav])["hidden_states"] for wav in wavs]
    for layer, state in enumerate(remembered(wavs)["hidden_states"]):
        for i, own in enumerate(alone):
            assert torch.equal(state[i, : own[layer].shape[1]], own[layer][0])


@pytest.mark.parametrize("name", ["MODEL", "random:MODEL"])
def test_a_model_of_mel_alone_needs_no_codec(
    name: str, export_of: Any, waves: list[Wave], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from codecssl.superb.upstreams import build

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a codec was loaded")

    monkeypatch.setattr(build, "load_codec_for", refuse)
    upstream = parse(name.replace("MODEL", str(export_of("mel"))))
    states = UpstreamBuilder().build(upstream)([wave.load() for wave in waves])["hidden_states"]
    assert states[0].shape[:2] == (3, 50)
    assert not upstream.runs_codec
    assert not list(jobs([upstream], [], None, tmp_path))  # type: ignore[arg-type]


def test_the_task_codec_refuses_a_model_that_reads_mel(export_of: Any) -> None:
    from codecssl.superb.task_codec.make_codec import load_upstream

    with pytest.raises(UserError, match=r"task-codec takes models with model\.input codes"):
        load_upstream(export_of("both"))


def test_published_configs_read_codes() -> None:
    for name in ("codec2vec_base_codes", "encodecmae_base"):
        assert load_config(RunConfig, "pretrain", name).model.input == "codes"
