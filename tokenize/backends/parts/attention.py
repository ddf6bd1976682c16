"""Attention of causal Transformers that see a limited past."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_window(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Mask [queries, keys]: each of the last `queries` positions sees itself and the window - 1 keys before it."""
    age = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (age >= 0) & (age < window)
