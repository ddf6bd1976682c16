"""The base of upstreams that wrap a frozen module."""

from typing import Any

from torch import nn


class FrozenUpstream(nn.Module):
    """An s3prl upstream that wraps a frozen module.

    The module is kept in a tuple and is therefore not a submodule: none of its parameters reaches an optimiser or a
    checkpoint, and `train()` does not switch its dropout on. `to(device)` and `to(dtype)` do reach it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._frozen = (module.eval().requires_grad_(False),)

    @property
    def frozen(self) -> Any:
        """The wrapped module."""
        return self._frozen[0]

    def get_downsample_rates(self, key: str) -> Any:
        """Samples at 16 kHz per frame of hidden state: an int, or a list with one for each hidden state."""
        return self.frozen.get_downsample_rates(key)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.frozen._apply(fn, recurse)
        return super()._apply(fn, recurse)
