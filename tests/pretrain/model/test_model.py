from dataclasses import replace

import pytest
import torch
from helpers import random_codec
from torch import Tensor, nn
from transformers import HubertConfig
from transformers.models.hubert.modeling_hubert import HubertEncoder, HubertEncoderStableLayerNorm

from codecssl.pretrain.config import ModelConfig
from codecssl.pretrain.model.layers import make_encoder
from codecssl.pretrain.model.model import CodecModel, untrained
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError

CARD = CodecCard(
    name="synthetic", weights="none", weights_sha256="0", sample_rate=16_000, hop_length=320,
    codebook_sizes=(16, 12, 8), codes_per_frame=(1, 1, 1), latent_dim=10,
)  # fmt: skip
CONFIG = ModelConfig(dim=32, layers=3, heads=4, ffn_dim=64, conv_kernel=16, conv_groups=4)


def codes(batch: int, frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(size, (batch, frames), generator=generator) for size in CARD.codebook_sizes], 1)


def model(**changes: object) -> CodecModel:
    return untrained(replace(CONFIG, **changes), CARD, None, seed=0).eval()


def test_sum_of_the_tables_is_the_codecs_own_latent() -> None:
    codec = random_codec(seed=0)
    made = untrained(ModelConfig(dim=32, layers=1, heads=2, conv_groups=4), codec.card, codec.embeddings(), seed=0)
    sizes = codec.card.codebook_sizes
    drawn = torch.stack([torch.randint(size, (50,)) for size in sizes])
    ours = made.embedding(drawn).detach()
    theirs = codec.latents(drawn).T
    assert theirs.std() > 0.01, "the latent must not be zero"
    assert (ours - theirs).abs().max() < 1e-5


def test_a_dropped_codebook_adds_nothing() -> None:
    made, drawn = model(), codes(1, 14)[0]
    kept = torch.tensor([[True] * 14, [True] * 7 + [False] * 7, [True] * 7 + [False] * 7])
    summed = made.embedding(drawn, kept)
    table = made.embedding.weight
    assert torch.allclose(summed[7:], table[drawn[0, 7:]])
    assert torch.allclose(summed[:7], (table[drawn[0]] + table[16 + drawn[1]] + table[28 + drawn[2]])[:7])
    summed.sum().backward()
    assert table.grad is not None
    assert table.grad[-1].abs().max() == 0, "the row that stands for dropped codebooks must stay zero"


def test_tables_of_another_codec_are_refused() -> None:
    with pytest.raises(UserError, match="the model has"):
        untrained(CONFIG, CARD, [torch.zeros(16, 10)], seed=0)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_encoder_equals_transformers_hubert(norm: str) -> None:
    """With the same weights, hidden states equal those of HuBERT in transformers, padding included."""
    ours = model(norm=norm)
    kind = HubertEncoder if norm == "post" else HubertEncoderStableLayerNorm
    config = HubertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, hidden_act="gelu",
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = kind(config).eval()
    copy_weights(ours, theirs)
    drawn, frames = codes(2, 40), [40, 23]
    padding = torch.arange(40)[None] < torch.tensor(frames)[:, None]
    states = ours.extract(drawn, frames)
    with torch.no_grad():
        x = torch.stack([ours.projection(ours.input_norm(ours.embedding(item))) for item in drawn])
        expected = theirs(x, attention_mask=padding, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == 4
    for state, other in zip(states, expected, strict=True):
        assert torch.allclose(state[padding], other[padding], atol=2e-5)


def copy_weights(ours: CodecModel, theirs: nn.Module) -> None:
    """Our encoder's weights into transformers' names."""
    conv = theirs.pos_conv_embed.conv
    assert isinstance(ours.positions, nn.Module)
    conv.parametrizations.weight.original0.data = ours.positions.conv.weight_g.data
    conv.parametrizations.weight.original1.data = ours.positions.conv.weight_v.data
    conv.bias.data = ours.positions.conv.bias.data
    final = ours.encoder.layer_norm if ours.encoder_norm is None else ours.encoder_norm
    theirs.layer_norm.load_state_dict(final.state_dict())
    for layer, other in zip(ours.encoder.layers, theirs.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(other.attention, name).load_state_dict(getattr(layer.self_attn, name).state_dict())
        other.attention.out_proj.load_state_dict(layer.self_attn.output_proj.state_dict())
        other.layer_norm.load_state_dict(layer.self_attn_layer_norm.state_dict())
        other.feed_forward.intermediate_dense.load_state_dict(layer.ffn.inner_proj.state_dict())
        other.feed_forward.output_dense.load_state_dict(layer.ffn.output_proj.state_dict())
        other.final_layer_norm.load_state_dict(layer.ffn_layer_norm.state_dict())


@pytest.mark.parametrize("positions", ["conv", "rotary"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_an_utterance_has_equal_states_alone_and_in_a_batch(positions: str, norm: str) -> None:
    made, drawn = model(positions=positions, norm=norm), codes(3, 50)
    together = made.extract(drawn, [50, 31, 12])
    alone = made.extract(drawn[1:2, :, :31], [31])
    for left, right in zip(together, alone, strict=True):
        assert torch.allclose(left[1, :31], right[0], atol=1e-5)


@pytest.mark.parametrize("positions", ["conv", "rotary"])
def test_the_order_of_frames_matters(positions: str) -> None:
    made, drawn = model(positions=positions), codes(1, 30)
    for layer in made.encoder.layers:  # fresh attention is nearly even, whatever the positions
        torch.nn.init.normal_(layer.self_attn.q_proj.weight)
        torch.nn.init.normal_(layer.self_attn.k_proj.weight)
    straight, turned = (made.extract(x, [30])[-1] for x in (drawn, drawn.flip(2)))
    assert not torch.allclose(straight, turned.flip(1), atol=1e-3)


def test_masked_frames_are_not_seen() -> None:
    """The codes under the mask may be anything: the output is the same, bit for bit."""
    made, drawn = model(), codes(1, 40)
    mask = torch.zeros(40, dtype=torch.bool)
    mask[10:20] = True
    drawn, other = drawn[0], torch.where(mask, codes(1, 40, seed=5)[0], drawn[0])
    assert not torch.equal(drawn, other)
    assert torch.equal(made(drawn, [40], mask), made(other, [40], mask))
    assert not torch.allclose(made(drawn, [40], mask), made(drawn, [40]))


def test_extract_is_the_forward_pass_without_dropout() -> None:
    made, drawn = model(norm="pre", dropout=0.5, layerdrop=0.5), codes(2, 20)
    made.train()
    last = made.extract(drawn, [20, 20])[-1]
    assert not made.training
    assert torch.equal(last.flatten(0, 1), made(torch.cat(list(drawn), 1), [20, 20]))


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second, third = (untrained(CONFIG, CARD, None, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["mask_vector"], third["mask_vector"])


def test_too_long_an_input_for_a_rotary_model() -> None:
    with pytest.raises(UserError, match="rotary_max_frames"):
        model(positions="rotary", rotary_max_frames=20).extract(codes(1, 21), [21])


@pytest.mark.parametrize("wrong", [{"heads": 5}, {"layers": 0}, {"dropout": 1.0}, {"conv_groups": 5}])
def test_impossible_models_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"model.{next(iter(wrong))}"):
        ModelConfig(**wrong)


@pytest.mark.parametrize(("init", "deviation"), [("bert", 0.02), ("xavier", (2 / (64 + 96)) ** 0.5)])
def test_feed_forward_weights_start_with_the_deviation_that_the_config_names(init: str, deviation: float) -> None:
    torch.manual_seed(0)
    made = make_encoder(ModelConfig(dim=64, heads=2, layers=2, ffn_dim=96, layer_init=init))  # type: ignore[arg-type]
    weights = torch.cat([layer.ffn.inner_proj.weight.flatten() for layer in made.layers])
    assert float(weights.detach().std()) == pytest.approx(deviation, rel=0.03)
    assert not made.layers[0].ffn.inner_proj.bias.any()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("groups", [16, 4, 2])
def test_convolutional_positions_in_bf16_are_those_of_fp32(groups: int, autocast: bool) -> None:
    """oneDNN's bf16 convolution of fewer than 16 channels a group is wrong; bf16 itself costs less than 1 %."""
    torch.manual_seed(0)
    config = ModelConfig(
        dim=32, heads=2, layers=1, ffn_dim=48, norm="pre", conv_kernel=128, conv_groups=groups, embedding_init="random"
    )
    model = untrained(config, CARD, None, 0).eval()
    codes = torch.randint(0, 8, (CARD.num_rows, 200))
    exact, _ = model.front(codes, [100, 100])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = (model if autocast else model.bfloat16()).front(codes, [100, 100])
    assert float((found.float() - exact).norm() / exact.norm()) < 0.02
