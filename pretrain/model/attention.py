"""Scaled dot-product attention within each item of a packed batch: no padding, no mask."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codecssl.pretrain.model.dropout import noise
from codecssl.pretrain.model.fairseq2_parts import SDPA, AttentionBiasCache

PRODUCT_FRAMES = 512
"""Longest item for which plain products in bf16 are faster on a CPU than torch's fused kernel."""


class DotProductAttention(SDPA):
    """Bidirectional attention over packed items by the fastest of several implementations, equal up to rounding.

    CUDA: torch's flash attention (bf16) or memory-efficient attention (fp32), which take the boundaries of the items.
    CPU: torch's fused kernel per item, or two products and a softmax per item. The fused kernel has no dropout, and its
    backward pass is slow in bf16 (LOG.md). Items of equal length that follow one another are computed together.
    """

    def __init__(self, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p

    def forward(
        self,
        q: Tensor,
        q_layout: Any,
        k: Tensor,
        k_layout: Any,
        v: Tensor,
        bias_cache: AttentionBiasCache,
        *,
        needs_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """q, k, v [N, H, D] and a packed layout -> [N, H, D], and no weights."""
        dropout = self.dropout_p if self.training else 0.0
        if q.device.type != "cpu":
            return _by_boundaries(q, k, v, q_layout, dropout), None
        half = q.dtype == torch.bfloat16 and q_layout.max_seq_len <= PRODUCT_FRAMES
        if dropout or half or torch.compiler.is_compiling():
            return products(q, k, v, q_layout.seq_begin_indices_pt, q_layout.max_seq_len, dropout)[0], None
        return _fused(q, k, v, q_layout.seq_lens), None


def _by_boundaries(q: Tensor, k: Tensor, v: Tensor, layout: Any, dropout: float) -> Tensor:
    """Attention of CUDA, by the same calls as torch's SDPA of jagged nested tensors, without its host synchronisation.

    Head widths are filled up with zeros to a multiple of 8, which the kernels need.
    """
    width, most = q.shape[-1], layout.max_seq_len
    bounds = layout.seq_begin_indices_pt.to(torch.int32)
    if width % 8:
        q, k, v = (F.pad(x, (0, -width % 8)) for x in (q, k, v))
    if q.dtype in (torch.bfloat16, torch.float16):
        output = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, most, most, dropout, False, False, scale=width**-0.5
        )[0]
    else:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        output = torch.ops.aten._efficient_attention_forward(
            q, k, v, None, bounds, bounds, most, most, dropout, 0, q.requires_grad, scale=width**-0.5
        )[0].squeeze(0)
    attended: Tensor = output[..., :width]
    return attended


def _fused(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """torch's fused kernel, one call per run of equal lengths."""
    runs = list(_runs(lengths))
    parts = zip(runs, *(x.split([count * length for count, length in runs]) for x in (q, k, v)), strict=True)
    outputs = []
    for (count, _), *part in parts:
        heads = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in part)
        outputs.append(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (number of items, length) of each run of items of equal length."""
    for length, run in groupby(lengths):
        yield len(list(run)), length


# ---------------------------------------------------------------- products, as operators that torch.compile calls


@torch.library.custom_op("codecssl::packed_attention", mutates_args=())
def products(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, most: int, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention by products on a CPU: q, k, v [N, H, D], boundaries int64 [B + 1] and greatest length of the items.

    Returns the output [N, H, D] and what the backward pass needs: the weights of each item, flattened, at the beginning
    of [N H most], and the dropout's noise of the same shape, or an empty tensor.
    """
    lengths, cells = bounds.diff().tolist(), q.shape[0] * q.shape[1] * most
    output, weights = torch.empty_like(q), q.new_empty(cells)
    kept = noise((cells,), dropout, q.dtype) if dropout else q.new_empty(0)
    for own, part, shape in _items(lengths, q.shape[1]):
        heads, keys, values = (_heads(x, own, shape) for x in (q, k, v))
        weight = torch.softmax(heads.mul(q.shape[2] ** -0.5) @ keys.mT, dim=3)
        weights[part] = weight.flatten()
        if dropout:
            weight.mul_(kept[part].view(shape))
        _heads(output, own, shape).copy_(weight @ values)
    return output, weights, kept


@products.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, most: int, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    cells = q.shape[0] * q.shape[1] * most
    return torch.empty_like(q), q.new_empty(cells), q.new_empty(cells if dropout else 0)


@torch.library.custom_op("codecssl::packed_attention_backward", mutates_args=())
def _gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, weights: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[2] ** -0.5
    for_q, for_k, for_v = (torch.empty_like(x) for x in (q, k, v))
    for own, part, shape in _items(bounds.diff().tolist(), q.shape[1]):
        outer, heads, keys, values = (_heads(x, own, shape) for x in (gradient, q, k, v))
        weight, of_weight = weights[part].view(shape), outer @ values.mT
        used = weight
        if len(kept):
            used = weight * kept[part].view(shape)
            of_weight.mul_(kept[part].view(shape))
        _heads(for_v, own, shape).copy_(used.mT @ outer)
        of_score = torch._softmax_backward_data(of_weight, weight, 3, weight.dtype).mul_(scale)
        _heads(for_q, own, shape).copy_(of_score @ keys)
        _heads(for_k, own, shape).copy_(of_score.mT @ heads)
    return for_q, for_k, for_v


@_gradients.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, weights: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _backward(ctx: Any, gradient: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    return (*_gradients(gradient.contiguous(), *ctx.saved_tensors), None, None, None)


products.register_autograd(_backward, setup_context=_save)


def _items(lengths: Sequence[int], heads: int) -> Iterator[tuple[slice, slice, tuple[int, int, int, int]]]:
    """Yield of each run of equal lengths: its frames, its cells, and the shape [items, H, T, T] of its weights."""
    frame = cell = 0
    for count, length in _runs(lengths):
        frames, cells = count * length, count * heads * length**2
        yield slice(frame, frame + frames), slice(cell, cell + cells), (count, heads, length, length)
        frame, cell = frame + frames, cell + cells


def _heads(x: Tensor, own: slice, shape: tuple[int, int, int, int]) -> Tensor:
    """View of some items: [N, H, D] -> [items, H, T, D]."""
    return x[own].unflatten(0, (shape[0], shape[2])).transpose(1, 2)
