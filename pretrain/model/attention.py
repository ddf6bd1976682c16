"""Scaled dot-product attention: fairseq2's wrapper of torch's kernel, or plain products where those are faster."""

from typing import Any

import torch
from torch import Tensor

from codecssl.pretrain.model.fairseq2_parts import (
    SDPA,
    AttentionBiasCache,
    IdentityBias,
    TorchSDPA,
    maybe_get_attention_bias_tensor,
)

PRODUCT_FRAMES = 256
"""Longest sequence for which plain products in bf16 are faster on a CPU than torch's fused kernel."""


class DotProductAttention(SDPA):
    """Bidirectional attention by the faster of two implementations, which agree up to rounding.

    The backward pass of torch's fused kernel for CPUs is slow in bf16. For 24 sequences of 125 frames and 4 heads of
    64, forward and backward take 52 ms by it and 15 ms by two products and a softmax (one core with AMX; LOG.md). The
    longer the sequence, the more memory the products need, and the smaller the gain.
    """

    def __init__(self, dropout_p: float) -> None:
        super().__init__()
        self.bias, self.dropout_p = IdentityBias(), dropout_p
        self.fused = TorchSDPA(self.bias, dropout_p=dropout_p)

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
        """q [B, T, H, D], k, v [B, S, H, D] -> [B, T, H, D], and no weights."""
        if q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[1] > PRODUCT_FRAMES:
            fused: tuple[Tensor, Tensor | None] = self.fused(
                q, q_layout, k, k_layout, v, bias_cache, needs_weights=needs_weights
            )
            return fused
        bias = maybe_get_attention_bias_tensor(self.bias, q, q_layout, k_layout, bias_cache)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3))  # [B, H, T, S]
        weights = torch.softmax(scores if bias is None else scores + bias, dim=3)  # exponentials and sums in fp32
        weights = torch.dropout(weights, self.dropout_p, self.training)
        return torch.matmul(weights, v).transpose(1, 2), None
