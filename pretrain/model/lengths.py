"""Masks of the valid frames of each item of a padded batch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def lengths_to_mask(lengths: Sequence[int] | Tensor, width: int, device: torch.device | str | None = None) -> Tensor:
    """Return bool [B, width], true at the first `lengths[b]` frames of each item.

    device: device of the result; by default that of `lengths`, or the CPU for a list.
    """
    if not isinstance(lengths, Tensor):
        lengths = torch.tensor(list(lengths), dtype=torch.int64)
    lengths = lengths.to(device or lengths.device)
    return torch.arange(width, device=lengths.device) < lengths[:, None]
