"""Functions that networks of several codecs share."""

from __future__ import annotations

import torch
from torch import Tensor


def elu(x: Tensor) -> Tensor:
    """ELU within 6e-8 of F.elu, in half the time. F.elu uses expm1, which is slow."""
    below = x.clamp(max=0).exp_().sub_(1)
    return torch.maximum(x, below, out=below)


def causal_window(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Mask [queries, keys]: each of the last `queries` positions sees itself and the window - 1 keys before it."""
    age = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (age >= 0) & (age < window)
