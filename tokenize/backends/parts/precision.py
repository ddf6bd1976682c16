"""Numerical precision of codecs: a residual quantizer amplifies rounding errors of the layers before it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable gradients and autocast, and compute float32 products in full precision, whatever the process has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    cudnn = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    try:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            cudnn,
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
