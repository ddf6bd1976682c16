"""The bottleneck's pooling and start, the model's two halves, and the choice of a rate."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from codecssl.pretrain.config import ModelConfig
from codecssl.pretrain.model.model import untrained
from codecssl.superb.task_codec.bottleneck import Bottleneck, check_layer, choose_bit_rate, later_states, least_squares
from codecssl.superb.task_codec.codec_folder import state_at
from codecssl.superb.task_codec.rvq import RvqConfig
from codecssl.tokenize.common.errors import UserError

SMALL = {"dim": 32, "layers": 3, "heads": 2, "ffn_dim": 64, "conv_kernel": 8, "conv_groups": 4}


def model_of(codec, **changes):
    return untrained(ModelConfig(**(SMALL | changes)), codec.card, None, seed=3).requires_grad_(False).eval()


@pytest.mark.parametrize("norm", ["post", "pre", "residual"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_two_halves_are_the_whole(codec, norm, layer):
    model, lengths = model_of(codec, norm=norm), [9, 5]
    if norm == "residual" and layer == 1:
        with pytest.raises(UserError, match="layer 1: .*two streams; give layer 0 or 3"):
            check_layer(model, layer)
        return
    check_layer(model, layer)
    codes = torch.randint(0, 1024, (2, 8, 9), generator=torch.Generator().manual_seed(0))
    whole = model.extract(codes, lengths)[layer:]
    state = state_at(model, codes, lengths, layer)
    found = later_states(model, state, lengths, layer)
    assert len(found) == len(whole) == 4 - layer
    for a, b in zip(found, whole, strict=True):
        for item, n in enumerate(lengths):
            torch.testing.assert_close(a[item, :n], b[item, :n], rtol=1e-5, atol=1e-5)


def test_gradients_reach_through_the_later_layers(codec):
    model = model_of(codec)
    state = torch.randn(1, 6, 32, requires_grad=True)
    later_states(model, state, [6], 1)[-1][0, 3, 5].backward()
    assert float(state.grad.abs().sum()) > 0
    assert all(p.grad is None for p in model.parameters())


def test_missing_layers_are_an_error(codec):
    with pytest.raises(UserError, match="layer 4: this model has 0 .* to 3"):
        check_layer(model_of(codec), 4)


def test_pooling_equals_a_loop():
    torch.manual_seed(0)
    bottleneck, lengths = Bottleneck(6, 4, RvqConfig(codebook_dim=3)), [11, 8, 2]
    states = torch.randn(3, 11, 6)
    pooled, real = bottleneck.pooled(states, lengths)
    assert real.sum(dim=1).tolist() == [3, 2, 1]
    for item, n in enumerate(lengths):
        for group in range(-(-n // 4)):
            rows = [F.layer_norm(states[item, t], (6,)) for t in range(4 * group, min(4 * group + 4, n))]
            torch.testing.assert_close(pooled[item, group], torch.stack(rows).mean(dim=0))
    alone, _ = bottleneck.pooled(states[1:2, :8], [8])
    torch.testing.assert_close(alone[0], pooled[1, :2])


def test_the_start_reconstructs_the_states_as_closely_as_possible():
    """States of few kinds, in groups: few entries say all, and the out-projection finds the way back."""
    random = torch.Generator().manual_seed(0)
    kinds = torch.randn(6, 3 * 8, generator=random)
    picks = torch.randint(6, (2, 40), generator=random)
    states = kinds[picks].unflatten(2, (3, 8)).flatten(1, 2)  # [2, 120, 8]
    bottleneck = Bottleneck(8, 3, RvqConfig(num_codebooks=2, codebook_size=16, codebook_dim=8))
    bottleneck.fit(states, [120, 100], random)
    pooled, _ = bottleneck.pooled(states, [120, 120])
    found = bottleneck.expand(bottleneck.rvq.dequantise(bottleneck.rvq.encode(pooled)))
    assert found.shape == states.shape
    left = float((found - states).square().mean() / states.square().mean())
    assert left < 0.05


def test_least_squares_equals_numpy():
    random = np.random.default_rng(0)
    x, y = random.standard_normal((50, 4)), random.standard_normal((50, 3))
    weight, bias = least_squares(torch.from_numpy(x), torch.from_numpy(y), ridge=0.0)
    expected = np.linalg.lstsq(np.c_[x, np.ones(50)], y, rcond=None)[0]
    np.testing.assert_allclose(np.r_[weight.numpy(), bias.numpy()[None]], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("rate", "frame_rate", "num_codebooks", "size"),
    [(150, 25, 1, 64), (175, 25, 1, 128), (200, 25, 1, 256), (250, 25, 1, 1024), (450, 25, 2, 512),
     (2000, 25, 8, 1024), (125, 12.5, 1, 1024), (200, 12.5, 2, 256)],
)  # fmt: skip
def test_published_points(codec, rate, frame_rate, num_codebooks, size):
    found = choose_bit_rate(rate, codec.card, frame_rate)
    assert (found.num_codebooks, 1 << found.bits) == (num_codebooks, size)
    assert found.bits_per_second == rate


def test_the_bit_rate_never_exceeds_the_limit(codec):
    card = dataclasses.replace(codec.card, sample_rate=24_000)  # 75 Hz
    found = choose_bit_rate(199, card, 12.5)
    assert found.pool == 6
    assert float(found.frame_rate) == 12.5
    assert found.bits_per_second == 175
    with pytest.raises(UserError, match="rate 10 bit/s: less than one bit for each of 12.5 frames"):
        choose_bit_rate(10, card, 12.5)
