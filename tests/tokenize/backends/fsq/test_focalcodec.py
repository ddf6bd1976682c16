"""FocalCodec against the authors' code, WavLM against transformers' and focal modulation against a loop."""

import json
import math

import helpers
import numpy as np
import pytest
import random_weights
import references
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from codecssl.tokenize.backends.fsq.focal_modulation import FocalConfig, FocalModulation
from codecssl.tokenize.backends.fsq.focalcodec import BinarySphericalQuantizer
from codecssl.tokenize.backends.fsq.wavlm import WavLM, WavLMConfig
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_weights.write_focalcodec(tmp_path_factory.mktemp("focal"))


def load(folder, **options):
    return load_codec(f"focalcodec@{folder}", **options)


@pytest.mark.parametrize(
    ("factors", "changes"),
    [((1, 1, 1), {}), ((2, 1, 2), {"use_post_norm": True}), ((1, 2, 1), {"normalize_modulator": True})],
)
def test_codes_and_wave_are_those_of_the_authors_code(tmp_path, monkeypatch, factors, changes):
    """The reference encodes the padded wave."""
    references.cloned("lucadellalib/focalcodec", monkeypatch)
    own = references.installed("focalcodec.codec", "the clone")
    folder = random_weights.write_focalcodec(tmp_path, config=random_weights.focalcodec_config(factors, **changes))
    codec, theirs = load(folder), own.FocalCodec(**json.loads((folder / "config.json").read_text())).eval()
    theirs.load_state_dict(load_file(folder / "model.safetensors"))
    hop = 320 * math.prod(factors)
    for samples in (1, hop, 5 * hop + 7, 40_000):
        wave = helpers.wave(samples, samples, rate=16_000, levels=(0.1, 0.9))
        with torch.no_grad():
            expected = theirs.sig_to_toks(F.pad(wave, (0, -samples % hop + 80))[None])
            decoded = theirs.toks_to_sig(expected)[0]
        assert torch.equal(codec.encode([wave])[0].codes, expected)
        torch.testing.assert_close(codec.decode(expected), decoded, rtol=0, atol=1e-5)


def test_wavlm_is_transformers_wavlm_up_to_a_layer():
    config = WavLMConfig(**{k: v for k, v in random_weights.FOCALCODEC["encoder_config"].items() if "cached" not in k})
    torch.manual_seed(0)
    ours = random_weights.livened(WavLM(config)).eval()
    torch.nn.init.normal_(ours.encoder.relative_embedding.weight)
    theirs = transformers.WavLMModel(
        transformers.WavLMConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, conv_dim=[8] * 7,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, num_buckets=32, max_bucket_distance=80,
            feat_extract_norm="layer", do_stable_layer_norm=True,
        )
    ).eval()  # fmt: skip
    state = {}
    for key, value in ours.state_dict().items():
        key = key.replace("feature_extractor.layers", "feature_extractor.conv_layers")
        if "conv_layers" in key:
            key = key.replace(".norm.", ".layer_norm.")
        key = key.replace("encoder.positional_embedding", "encoder.pos_conv_embed")
        if key.startswith("norm"):
            key = key.replace("norm", "feature_projection.layer_norm")
        key = key.replace("feature_proj.", "feature_projection.projection.")
        key = key.replace("encoder.relative_embedding", "encoder.layers.0.attention.rel_attn_embed")
        key = key.replace("attention_norm", "layer_norm").replace("feed_forward_norm", "final_layer_norm")
        key = key.replace("in_proj", "intermediate_dense").replace("feed_forward.out_proj", "feed_forward.output_dense")
        if "qkv_proj" in key:
            parts = zip("qkv", value.chunk(3), strict=True)
            state |= {key.replace("qkv_proj", f"{name}_proj"): part for name, part in parts}
        elif "pos_conv_embed.conv.weight" in key:
            stem = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
            state |= {stem + "0": value.norm(dim=(0, 1), keepdim=True), stem + "1": value}
        else:
            state[key] = value
    unused = theirs.load_state_dict(state, strict=False)
    assert not unused.unexpected_keys
    assert all(key.startswith(("masked_spec", "encoder.layer_norm", "encoder.layers.2")) for key in unused.missing_keys)
    wave = helpers.wave(8_000, rate=16_000, levels=(0.1, 0.9))[None]
    with torch.no_grad():
        expected = theirs(wave, output_hidden_states=True).hidden_states[2]
        found = ours(wave)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (ours.config.hop_length, ours.config.lookahead) == (320, 80)


def test_focal_modulation_is_its_formula():
    """q * h(sum of gates * contexts), in a float64 loop over frames (equations 4 to 7 of arXiv 2203.11926)."""
    torch.manual_seed(0)
    config = FocalConfig(input_dim=6, output_dim=6, focal_window=3, focal_level=2, focal_factor=2)
    layer = FocalModulation(6, config).double()
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    with torch.no_grad():
        found = layer(x)[0].numpy()
    state = {key: value.detach().numpy() for key, value in layer.state_dict().items()}
    gelu = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / 2**0.5)))
    mixed = x[0].numpy() @ state["in_proj.weight"].T + state["in_proj.bias"]
    query, context, gates = mixed[:, :6], mixed[:, 6:12], mixed[:, 12:]
    total = np.zeros((9, 6))
    for level, kernel in enumerate((3, 5)):
        weight, bias = state[f"layers.{level}.0.weight"][:, 0], state[f"layers.{level}.0.bias"]
        padded = np.pad(context, ((kernel // 2, kernel // 2), (0, 0)))
        context = gelu(np.stack([(padded[t : t + kernel].T * weight).sum(1) + bias for t in range(9)]))
        total += gates[:, level : level + 1] * context
    total += gates[:, 2:] * gelu(context.mean(0))
    modulator = total @ state["context_proj.weight"][:, :, 0].T + state["context_proj.bias"]
    expected = (query * modulator) @ state["out_proj.weight"].T + state["out_proj.bias"]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_code_has_the_signs_as_its_bits():
    quantizer, latents = BinarySphericalQuantizer(5), torch.randn(5, 40)
    codes = quantizer.quantize(latents)
    for t in range(40):
        assert int(codes[0, t]) == int("".join("1" if value > 0 else "0" for value in latents[:, t]), 2)
    points = quantizer.dequantize(codes)
    assert torch.equal(points.sign(), latents.sign())
    torch.testing.assert_close(points.norm(dim=0), torch.ones(40))
    assert torch.equal(quantizer.embeddings()[0][codes[0]].t(), points)


def test_any_batch_and_any_cut_give_the_same_codes(folder):
    codec = load(folder)
    codes = helpers.check_any_batch_and_any_cut(codec, (1, 320, 700, 60_000))
    assert codec.card.fsq_levels == 2
    assert codec.decode(codes).shape == (codes.shape[1] * 320,)
    [table] = codec.embeddings()
    assert torch.equal(table[codes[0]].t(), codec.latents(codes))


def test_checkpoints_of_the_first_release_load_too(folder, tmp_path):
    """Compressor and decompressor have separate projections, and other names in the same order."""
    old = {}
    for key, value in load_file(folder / "model.safetensors").items():
        if "qkv_proj" in key:
            parts = zip("qkv", value.chunk(3), strict=True)
            old |= {key.replace("qkv_proj", f"{n}_proj"): part.contiguous() for n, part in parts}
        else:
            old[key.replace("compressor.layers", "compressor.layered") if "compressor" in key else key] = value
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert load(tmp_path).card.weights_sha256 == load(folder).card.weights_sha256


def test_other_networks_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="huggingface-cli download lucadellalib/focalcodec_50hz"):
        load(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    save_file({"encoder.x": torch.ones(1)}, tmp_path / "model.safetensors")
    for changes, says in (
        ({}, r"not the weights of focalcodec \(lacks encoder\."),
        ({"decoder_name": "WaveNeXt"}, "a WaveNeXt decoder; focalcodec has a Vocos that is not causal"),
        ({"compressor_config": {"causal": True}}, "a causal compressor"),
        ({"encoder_config": {"dim": "wide"}}, "not the configuration of focalcodec"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=says):
            load(tmp_path)
