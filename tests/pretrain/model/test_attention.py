"""Attention over packed items against its definition in float64, on all of its paths."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from codecssl.pretrain.model.attention import PRODUCT_FRAMES, DotProductAttention
from codecssl.pretrain.model.fairseq2_parts import AttentionBiasCache
from codecssl.pretrain.model.packing import packed_layout

CPU = torch.device("cpu")


def attend(attention: DotProductAttention, q: Tensor, k: Tensor, v: Tensor, frames: list[int]) -> Tensor:
    layout = packed_layout(frames, q.device)
    output, weights = attention(q, layout, k, layout, v, AttentionBiasCache())
    assert weights is None
    return output


def definition(q: Tensor, k: Tensor, v: Tensor, frames: list[int]) -> Tensor:
    """softmax(q k / sqrt(D)) v, one item and one head after the other."""
    items = []
    for own in zip(*(x.split(frames) for x in (q, k, v)), strict=True):
        heads = []
        for a, b, c in zip(*(x.unbind(1) for x in own), strict=True):
            weights = torch.exp(a @ b.T / q.shape[2] ** 0.5)
            heads.append(weights / weights.sum(1, keepdim=True) @ c)
        items.append(torch.stack(heads, 1))
    return torch.cat(items)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("frames", [[9, 9], [9, 4, 1, 4, 4], [PRODUCT_FRAMES + 1, 2]])
@pytest.mark.parametrize("tiny_dropout", [0.0, 1e-9], ids=["fused", "products"])
def test_output_and_gradients_follow_the_definition(
    dtype: torch.dtype, tolerance: float, frames: list[int], tiny_dropout: float
) -> None:
    torch.manual_seed(0)
    shape = sum(frames), 2, 8
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    weight = torch.randn(shape)

    output = attend(DotProductAttention(tiny_dropout), *inputs, frames)
    (output.float() * weight).sum().backward()
    expected = definition(*exact, frames)
    (expected * weight).sum().backward()

    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected.detach(), atol=tolerance, rtol=tolerance)
    for own, reference in zip(inputs, exact, strict=True):
        assert own.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(own.grad.double(), reference.grad, atol=4 * tolerance, rtol=tolerance)


def test_dropout_removes_weights_in_training_only() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 1, 8).bfloat16()
    attention, ones = DotProductAttention(0.5), torch.ones_like(x)
    sums = attend(attention, x, x, ones, [64])
    assert sums.float().std() > 0.05  # the remaining weights, doubled: 1 in the mean, not in each frame
    assert abs(sums.float().mean() - 1) < 0.2
    torch.testing.assert_close(attend(attention.eval(), x, x, ones, [64]).float(), ones.float(), atol=0.01, rtol=0)


def test_the_gradient_is_that_of_the_weights_that_dropout_kept() -> None:
    """The same seed gives the same noise, so that differences of the output are those of the inputs."""
    torch.manual_seed(1)
    inputs = [torch.randn(12, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def seeded(*given: Tensor) -> Tensor:
        torch.manual_seed(5)
        return attend(DotProductAttention(0.4), *given, [7, 5])

    assert torch.autograd.gradcheck(seeded, inputs)
    assert not torch.allclose(seeded(*inputs), definition(*inputs, [7, 5]))


@pytest.mark.parametrize(
    ("dtype", "called"),
    [(torch.bfloat16, "_flash_attention_forward"), (torch.float32, "_efficient_attention_forward")],
)
@pytest.mark.parametrize("width", [8, 10])
def test_another_device_gets_boundaries_and_no_mask(dtype: torch.dtype, called: str, width: int) -> None:
    """On torch's meta device, the call is valid and reads no value from the device (gradients: test_device.py)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: dict[str, Any] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen[func.name().removeprefix("aten::")] = SimpleNamespace(args=args, kwargs=kwargs or {})
            return func(*args, **(kwargs or {}))

    x = torch.randn(12, 2, width, dtype=dtype, device="meta", requires_grad=True)
    with Watch():
        output = attend(DotProductAttention(0.1), x, x, x, [7, 5])
    assert output.shape == x.shape
    assert output.requires_grad
    call = seen[called]
    bounds = call.args[4]
    assert (bounds.dtype, bounds.shape) == (torch.int32, (3,))
    assert call.kwargs["scale"] == width**-0.5
    assert call.args[0].shape[-1] % 8 == 0
