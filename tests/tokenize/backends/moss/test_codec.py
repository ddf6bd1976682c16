"""MOSS-Audio-Tokenizer against its authors' code on random weights, and its parts by hand."""

import importlib
import importlib.util
import json
import math
import sys

import helpers
import numpy as np
import pytest
import random_moss
import references
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from codecssl.tokenize.backends.moss.transformer import CausalTransformer, Past, TransformerConfig, rotated
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

HOP = 1920


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_moss.write(tmp_path_factory.mktemp("moss"))


def state_in(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def authors_model(folder, monkeypatch):
    """The authors' model with these weights. Their modules import each other as a package."""
    names = transformers.configuration_utils  # the code is written for transformers 5
    monkeypatch.setattr(names, "PreTrainedConfig", names.PretrainedConfig, raising=False)
    clone = references.cloned("OpenMOSS/MOSS-Audio-Tokenizer", monkeypatch)
    spec = importlib.util.spec_from_loader("moss_clone", None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(clone)]
    monkeypatch.setitem(sys.modules, "moss_clone", package)
    own = references.installed("moss_clone.modeling_moss_audio_tokenizer", "the clone")
    settings = references.installed("moss_clone.configuration_moss_audio_tokenizer", "the clone")
    config = settings.MossAudioTokenizerConfig(**json.loads((folder / "config.json").read_text()))
    model = own.MossAudioTokenizerModel(config).eval()
    model.load_state_dict(state_in(folder))
    return model


def test_codes_and_wave_are_those_of_the_authors_code(folder, monkeypatch):
    """The reference encodes whole frames in one piece. The wave is longer than a chunk and than the window of 2 s."""
    theirs, codec = authors_model(folder, monkeypatch), load_codec(str(folder))
    assert (codec.card.name, codec.card.frame_rate) == ("moss_audio", 12.5)
    for frames in (1, 7, 60, 121):
        wave = helpers.wave(frames * HOP - 5, frames, rate=24_000, levels=(0.1, 0.9))
        padded = F.pad(wave, (0, 5))
        with torch.no_grad():
            expected = theirs.encode(padded[None, None], return_dict=True).audio_codes[:, 0]
            decoded = theirs.decode(expected, return_dict=True).audio[0, 0]
        assert torch.equal(codec.encode([wave])[0].codes, expected)
        torch.testing.assert_close(codec.decode(expected), decoded, rtol=1e-5, atol=1e-5)
    assert all(len(row.unique()) > 20 for row in expected)


def test_any_batch_and_any_cut_give_the_same_codes(folder):
    codec = load_codec(str(folder))
    codes = helpers.check_any_batch_and_any_cut(codec, (1, HOP, HOP + 1, 52 * HOP, 130_000), rate=24_000)
    assert codec.decode(codes).shape == (codes.shape[1] * HOP,)


def test_a_code_sees_the_past_only_and_a_limited_one(folder):
    """The windows of four layers of 2 s, one after the other, reach back less than 8 s."""
    codec, frames = load_codec(str(folder)), 150
    wave = helpers.wave(frames * HOP, rate=24_000, levels=(0.1, 0.9))
    codes = codec.encode([wave])[0].codes
    changed = wave.clone()
    changed[40 * HOP :] = 0
    assert torch.equal(codec.encode([changed])[0].codes[:, :40], codes[:, :40])
    changed = wave.clone()
    changed[: 40 * HOP] = 0
    found = codec.encode([changed])[0].codes
    assert not torch.equal(found[:, 40:60], codes[:, 40:60])
    assert torch.equal(found[:, 140:], codes[:, 140:])


def test_pieces_of_a_transformer_are_the_whole():
    """The comparison is in float64, with pieces shorter and longer than the window."""
    config = TransformerConfig(
        input_dimension=6, output_dimension=5, d_model=8, num_heads=2, num_layers=3, dim_feedforward=12
    )
    torch.manual_seed(0)
    layers, x = CausalTransformer(config, window=7).double(), torch.randn(60, 6, dtype=torch.float64)
    with torch.no_grad():
        whole, past = layers(x, Past()), Past()
        parts = [layers(part, past) for part in x.split([1, 2, 30, 3, 24])]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    assert all(key.shape[1] == 6 for key, _ in past.kept.values())


def test_rotations_are_the_formula():
    """A float64 loop over positions and pairs of channels."""
    config = TransformerConfig(
        input_dimension=12,
        output_dimension=12,
        d_model=12,
        num_heads=2,
        num_layers=0,
        dim_feedforward=1,
        max_period=100,
    )
    x = torch.randn(2, 4, 6)
    found = rotated(x, CausalTransformer(config, window=5).rotation(3, 4, torch.device("cpu")))
    expected = np.zeros((2, 4, 6))
    for head in range(2):
        for t in range(4):
            for pair in range(3):
                angle = (3 + t) * 100 ** (-pair / 3)
                a, b = x[head, t, 2 * pair].item(), x[head, t, 2 * pair + 1].item()
                expected[head, t, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                expected[head, t, 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kept", [1, 3])
def test_the_latent_is_the_sum_of_the_tables(folder, kept):
    """The reference multiplies the checkpoint's tensors in float64."""
    state, codec = state_in(folder), load_codec(str(folder), num_codebooks=kept)
    codes = codec.encode([helpers.wave(40_000, rate=24_000, levels=(0.1, 0.9))])[0].codes
    assert torch.equal(
        codes, load_codec(str(folder)).encode([helpers.wave(40_000, rate=24_000, levels=(0.1, 0.9))])[0].codes[:kept]
    )
    expected = 0
    for level, row in enumerate(codes):
        stem = f"quantizer.quantizers.{level}."
        weight = state[f"{stem}out_proj.parametrizations.weight.original1"][..., 0].double()
        weight *= state[f"{stem}out_proj.parametrizations.weight.original0"][..., 0] / weight.norm(dim=1, keepdim=True)
        entries = state[f"{stem}codebook.weight"].double()[row]
        expected = expected + entries @ weight.t() + state[f"{stem}out_proj.bias"]
    torch.testing.assert_close(codec.latents(codes).double(), expected.t(), rtol=0, atol=1e-5)
    summed = sum(table[row] for table, row in zip(codec.embeddings(), codes, strict=True))
    torch.testing.assert_close(summed.t(), codec.latents(codes), rtol=0, atol=1e-6)
    assert [tuple(table.shape) for table in codec.entries()] == [(64, 6)] * kept


def test_one_file_and_older_names_are_read_too(folder, tmp_path):
    state = {key.replace("in_projs.0.weight", "in_proj_weight"): value for key, value in state_in(folder).items()}
    state = {key.replace("out_projs.0.weight", "out_proj.weight"): value for key, value in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert load_codec(str(tmp_path)).card.fingerprint == load_codec(str(folder)).card.fingerprint


def test_other_files_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="huggingface-cli download OpenMOSS-Team/MOSS-Audio-Tokenizer"):
        load_codec(f"moss_audio@{tmp_path}")
    values, state = json.loads((folder / "config.json").read_text()), state_in(folder)
    lacking = dict(state)
    del lacking["encoder.1.transformer.layers.0.norm1.bias"]
    save_file(lacking, tmp_path / "model.safetensors")
    gated = [*values["encoder_kwargs"][:1], values["encoder_kwargs"][1] | {"gating": "silu"}]
    for changes, says in (
        ({}, "lacks encoder.1.transformer.layers.0.norm1.bias"),
        ({"encoder_kwargs": gated}, "gating silu, not none"),
        ({"quantizer_kwargs": {"quantizer_type": "rvq"}}, "quantizer_type rvq, not rlfq"),
        ({"sampling_rate": 48_000}, "48000 Hz, moss_audio has 24000 Hz"),
        ({"decoder_kwargs": None}, "not the configuration of moss_audio"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | changes))
        with pytest.raises(UserError, match=says):
            load_codec(f"moss_audio@{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(UserError, match="no elsewhere.safetensors in it"):
        load_codec(f"moss_audio@{tmp_path}")
    del state["quantizer.input_proj.parametrizations.weight.original0"]
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lacks quantizer.input_proj.parametrizations.weight.original0"):
        load_codec(f"moss_audio@{tmp_path}")
