"""Attention against its definition in float64, on both of its paths."""

import pytest
import torch
from torch import Tensor

from codecssl.pretrain.model.attention import PRODUCT_FRAMES, DotProductAttention
from codecssl.pretrain.model.fairseq2_parts import AttentionBiasCache, BatchLayout


def definition(q: Tensor, k: Tensor, v: Tensor, frames: list[int]) -> Tensor:
    """softmax(q k / sqrt(D)) v, one item and one head after the other, without padding."""
    out = torch.zeros_like(v)
    for item, count in enumerate(frames):
        for head in range(q.shape[2]):
            own = [x[item, :count, head] for x in (q, k, v)]
            weights = torch.exp(own[0] @ own[1].T / q.shape[3] ** 0.5)
            out[item, :count, head] = weights / weights.sum(1, keepdim=True) @ own[2]
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("frames", [[9, 9], [9, 4, 1], [PRODUCT_FRAMES + 1, 2]])
def test_output_and_gradients_follow_the_definition(dtype: torch.dtype, tolerance: float, frames: list[int]) -> None:
    torch.manual_seed(0)
    shape = len(frames), max(frames), 2, 8
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    layout = BatchLayout(shape[:2], frames)
    valid = (torch.arange(shape[1]) < torch.tensor(frames)[:, None])[:, :, None, None]
    weight = torch.randn(shape) * valid

    output, weights = DotProductAttention(0.0)(inputs[0], layout, inputs[1], layout, inputs[2], AttentionBiasCache())
    (output.float() * weight).sum().backward()
    expected = definition(*exact, frames)
    (expected * weight).sum().backward()

    assert weights is None
    assert output.dtype == dtype
    torch.testing.assert_close((output * valid).double(), expected.detach(), atol=tolerance, rtol=tolerance)
    for own, reference in zip(inputs, exact, strict=True):
        assert own.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(own.grad.double(), reference.grad, atol=4 * tolerance, rtol=tolerance)


def test_dropout_removes_weights_in_training_only() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 64, 1, 8).bfloat16()
    layout, attention = BatchLayout((1, 64), [64]), DotProductAttention(0.5)
    ones = torch.ones_like(x)
    sums, _ = attention(x, layout, x, layout, ones, AttentionBiasCache())
    assert sums.float().std() > 0.05  # the remaining weights, doubled: 1 in the mean, not in each frame
    assert abs(sums.float().mean() - 1) < 0.2
    sums, _ = attention.eval()(x, layout, x, layout, ones, AttentionBiasCache())
    torch.testing.assert_close(sums.float(), ones.float(), atol=0.01, rtol=0)
