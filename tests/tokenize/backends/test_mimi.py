"""Our chunked Mimi against transformers' own modules over the whole wave."""

from functools import partial

import helpers
import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from codecssl.tokenize.backends import mimi
from codecssl.tokenize.codec import CodecCard, stored_tables
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

HOP = 1920
WINDOW = 30  # positions, 15 frames: chunks of 64 frames cross it many times


wave = partial(helpers.wave, rate=24_000)


def parts_of(model):
    return model.quantizer.semantic_residual_vector_quantizer, model.quantizer.acoustic_residual_vector_quantizer


def small_model(**changes):
    """A narrow Mimi in which every layer has an effect: layer scales near 1, codebooks as wide as their inputs."""
    torch.manual_seed(0)
    config = transformers.MimiConfig(
        **{"num_filters": 4, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": WINDOW, "upsample_groups": 32}
        | {"codebook_size": 64, "codebook_dim": 16, "vector_quantization_hidden_dimension": 16, "num_quantizers": 6}
        | changes
    )
    model = transformers.MimiModel(config).eval().requires_grad_(False)
    for layer in [*model.encoder_transformer.layers, *model.decoder_transformer.layers]:
        layer.self_attn_layer_scale.scale.uniform_(0.5, 1)
        layer.mlp_layer_scale.scale.uniform_(0.5, 1)
    for layer in (layer for part in parts_of(model) for layer in part.layers):
        layer.codebook.cluster_usage.uniform_(1, 3)
    latents = reference_latents(model, wave(40 * HOP))
    for part in parts_of(model):
        residual = latents if part.input_proj is None else part.input_proj(latents)
        for layer in part.layers:
            rows = residual[0].t()[torch.randint(0, residual.shape[2], (config.codebook_size,))]
            rows = 0.8 * rows + 0.2 * rows.std() * torch.randn(rows.shape)  # no two entries alike
            layer.codebook.embed_sum.copy_(rows * layer.codebook.cluster_usage[:, None])
            layer.codebook._embed = None
            residual = residual - layer.decode(layer.encode(residual))
    return model


def windowed(model, hidden, transformer):
    """transformers' own layers with a mask written out: position i sees j from i - window + 1 to i."""
    length, window = hidden.shape[1], model.config.sliding_window
    mask = torch.full((1, 1, length, length), float("-inf"), dtype=hidden.dtype)
    for i in range(length):
        mask[:, :, i, max(0, i - window + 1) : i + 1] = 0
    return transformer(hidden, attention_mask=mask)[0]


def reference_latents(model, audio):
    """The whole wave at once, [1, D, T]."""
    audio = F.pad(audio, (0, -len(audio) % HOP))[None, None]
    hidden = model.encoder(audio).transpose(1, 2)
    return model.downsample(windowed(model, hidden, model.encoder_transformer).transpose(1, 2))


def reference_codes(model, audio, count):
    return model.quantizer.encode(reference_latents(model, audio), count)[:, 0]


def as_codec(model, count=6, **lanes):
    return mimi.MimiCodec(model, mimi.make_card("mimi", "test", model, count, "cpu"), **lanes)


def streamed(codec, audio, seed=0):
    rng = np.random.default_rng(seed)
    stream, pieces, at = codec.stream(), [], 0
    while at < len(audio):
        size = int(rng.integers(0, 90_000))
        pieces.append(stream.push(audio[at : at + size]))
        at += size
    return torch.cat([*pieces, stream.finish()], dim=1)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.mark.parametrize("changes", [{}, {"use_conv_shortcut": True, "num_residual_layers": 2}])
def test_chunks_equal_the_whole_wave_in_float64(changes):
    """Rounding cannot hide a wrong position here. 150 frames are three chunks, 300 positions ten windows."""
    net = small_model(**changes).double()
    codec = as_codec(net)
    audio = wave(150 * HOP).double()
    past = mimi.Past()
    ours = torch.cat([codec.latents_of(part, past) for part in audio[None].split(codec.chunk, dim=1)], dim=1)
    torch.testing.assert_close(ours[0].t(), reference_latents(net, audio)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("samples", [1, HOP - 1, HOP, HOP + 1, 15 * HOP, 64 * HOP, 64 * HOP + 1, 170 * HOP + 77])
def test_codes_are_the_references(model, samples):
    codec, audio = as_codec(model), wave(samples, seed=samples)
    ours, own = codec.encode([audio])[0].codes, reference_codes(model, audio, 6)
    assert ours.dtype == torch.int64
    assert ours.shape == (6, codec.card.frames_of(samples)) == own.shape
    assert (ours != own).float().mean() <= 0.001
    assert torch.equal(codec.encode_reference(audio), own)


def test_within_the_window_the_reference_is_the_models_own_encode(model):
    codec, audio = as_codec(model), wave(15 * HOP)
    own = model.encode(audio[None, None], num_quantizers=6).audio_codes[0]
    assert torch.equal(codec.encode([audio])[0].codes, own)
    assert len(own.unique()) > 20  # or agreement would mean little


@pytest.mark.parametrize("lanes", [1, 3])
def test_any_cut_and_any_batch_give_the_same_codes(model, lanes):
    codec = as_codec(model, lanes=lanes)
    waves = [wave(n, seed=n) for n in [1, 64 * HOP, 3 * HOP + 5, 64 * HOP + 1, 150 * HOP - 3]]
    for audio, codes in zip(waves, helpers.codes_of(codec, waves), strict=True):
        assert torch.equal(codec.encode([audio])[0].codes, codes)
        assert torch.equal(streamed(codec, audio, seed=len(audio)), codes)


@pytest.mark.parametrize(("lanes", "rest"), [(1, 22), (2, 64)])
def test_the_shapes_do_not_depend_on_pushes_and_mates(model, monkeypatch, lanes, rest):
    """Otherwise rounding depends on them."""
    codec, audio, shapes = as_codec(model, lanes=lanes), wave(150 * HOP - 3), []
    advance = codec.advance
    monkeypatch.setattr(codec, "advance", lambda chunk, past: shapes.append(chunk.shape) or advance(chunk, past))
    codec.encode([audio])
    streamed(codec, audio, seed=1)
    streamed(codec, audio, seed=2)
    assert shapes == 3 * [(lanes, 64 * HOP), (lanes, 64 * HOP), (lanes, rest * HOP)]


def test_lanes_change_no_code(model):
    audio = [wave(n, seed=n) for n in (100 * HOP, 17 * HOP + 1)]
    alone_and_together = (helpers.codes_of(as_codec(model, lanes=lanes), audio) for lanes in (1, 2))
    for alone, together in zip(*alone_and_together):
        assert (alone != together).float().mean() <= 0.001


def test_a_codes_past_is_all_that_it_depends_on(model):
    codec, audio = as_codec(model), wave(100 * HOP)
    assert torch.equal(codec.encode([audio])[0].codes[:, :70], codec.encode([audio[: 70 * HOP]])[0].codes)


def test_the_carried_state_of_a_stream_does_not_grow(model):
    def carried(past):
        return sum(t.numel() for value in past.values() for t in (value if isinstance(value, tuple) else [value]))

    stream, sizes = as_codec(model).stream(), []
    for _ in range(4):
        stream.push(wave(64 * HOP))
        sizes.append(carried(stream.past) + sum(len(p) for p in stream.pending))
    assert sizes[1] == sizes[2] == sizes[3]


def test_low_precision_set_for_the_process_changes_no_code(model):
    """ "medium" uses bfloat16 products on CPUs that have them."""
    codec, audio = as_codec(model), wave(64 * HOP)
    codes = codec.encode([audio])[0].codes
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(codec.encode([audio])[0].codes, codes)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_codebooks_are_the_first_ones(model, count):
    audio = wave(20 * HOP)
    assert torch.equal(
        as_codec(model, count).encode([audio])[0].codes, as_codec(model).encode([audio])[0].codes[:count]
    )


@pytest.mark.parametrize("count", [1, 4, 6])
@pytest.mark.parametrize("projected", [True, False])
def test_embeddings_sum_to_the_quantizers_own_latent(model, count, projected):
    net = model if projected else small_model(codebook_dim=32, vector_quantization_hidden_dimension=32)
    codec, codes = as_codec(net, count), torch.randint(0, 64, (count, 50))
    own = net.quantizer.decode(codes[None])[0]
    tables = codec.embeddings()
    assert [t.shape for t in tables] == [(64, 32)] * count
    torch.testing.assert_close(sum(t[c] for t, c in zip(tables, codes)).t(), own, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.latents(codes), own, rtol=0, atol=1e-5)
    assert [t.shape for t in stored_tables(codec)] == [(64, 16 if projected else 32)] * count
    assert torch.equal(
        stored_tables(codec)[0], net.quantizer.semantic_residual_vector_quantizer.layers[0].codebook.embed
    )


@pytest.mark.parametrize("frames", [1, 15, 140])
def test_decode_is_the_models_own_with_the_window(model, frames):
    codec, codes = as_codec(model), torch.randint(0, 64, (6, frames))
    hidden = model.upsample(model.quantizer.decode(codes[None])).transpose(1, 2)
    own = model.decoder(windowed(model, hidden, model.decoder_transformer).transpose(1, 2))[0, 0]
    ours = codec.decode(codes)
    assert ours.shape == (frames * HOP,)
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4 * own.std().item())
    if 2 * frames <= WINDOW:
        torch.testing.assert_close(ours, model.decode(codes[None]).audio_values[0, 0], rtol=1e-4, atol=1e-4)


def test_weights_in_the_hubs_format_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    codec = load_codec(str(tmp_path), num_codebooks=4)
    card, audio = codec.card, wave(40 * HOP)
    assert (card.name, card.sample_rate, card.hop_length, float(card.frame_rate)) == ("mimi", 24_000, HOP, 12.5)
    assert card.codebook_sizes == (64,) * 4
    assert card.latent_dim == 32
    assert CodecCard.from_dict(card.to_dict()) == card
    assert torch.equal(codec.encode([audio])[0].codes, as_codec(model, 4).encode([audio])[0].codes)


@pytest.mark.parametrize(
    ("changes", "count", "says"),
    [
        ({}, 7, "num_codebooks 7: mimi has 1 to 6"),
        ({}, 0, "num_codebooks 0: mimi has 1 to 6"),
        ({"use_causal_conv": False}, 4, "mimi is causal, mono, at 24000 Hz"),
    ],
)
def test_mismatched_weights_are_refused(tmp_path, changes, count, says):
    small_model().save_pretrained(tmp_path)
    config = transformers.MimiConfig.from_pretrained(tmp_path)
    config.update(changes)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=says):
        load_codec(str(tmp_path), num_codebooks=count)


def test_missing_weights_say_how_to_get_them(monkeypatch, tmp_path):
    def offline(cls, source, **options):
        raise OSError("no net")

    monkeypatch.setattr(transformers.MimiModel, "from_pretrained", classmethod(offline))
    with pytest.raises(UserError, match="huggingface-cli download kyutai/mimi"):
        load_codec("mimi")
