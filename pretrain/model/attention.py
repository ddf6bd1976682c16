"""Scaled dot-product attention: torch's kernel, or plain products where those are faster."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codecssl.pretrain.model.fairseq2_parts import SDPA, AttentionBiasCache, BatchLayout

PRODUCT_FRAMES = 256
"""Longest sequence for which plain products in bf16 are faster on a CPU than torch's fused kernel."""


class DotProductAttention(SDPA):
    """Bidirectional attention by the faster of two implementations, which agree up to rounding.

    The backward pass of torch's fused kernel for CPUs is slow in bf16. For 24 sequences of 125 frames and 4 heads of
    64, forward and backward take 51 ms by it and 18 ms by two products and a softmax (one core with AMX; LOG.md). The
    longer the sequence, the more memory the products need, and the smaller the gain.

    It replaces fairseq2's TorchSDPA, whose bias for padded batches is [B, 1, T, S], made by a loop over the items that
    torch.compile does not enter.
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
        """q [B, T, H, D], k, v [B, S, H, D] -> [B, T, H, D], and no weights. Values in the padding are undefined."""
        bias = padding_bias(k_layout, q.dtype)
        plain = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[1] <= PRODUCT_FRAMES
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if not plain:
            dropout = self.dropout_p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, bias, dropout).transpose(1, 2), None
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3))  # [B, H, T, S]
        weights = torch.softmax(scores if bias is None else scores + bias, dim=3)  # exponentials and sums in fp32
        weights = torch.dropout(weights, self.dropout_p, self.training)
        return torch.matmul(weights, v).transpose(1, 2), None


def padding_bias(layout: BatchLayout, dtype: torch.dtype) -> Tensor | None:
    """Return [B, 1, 1, S]: 0 at frames and -inf in the padding. None for a batch without padding."""
    if not layout.padded:
        return None
    padding = layout.position_indices < 0
    zeros = torch.zeros(padding.shape, dtype=dtype, device=padding.device)
    return zeros.masked_fill(padding, -torch.inf)[:, None, None]
