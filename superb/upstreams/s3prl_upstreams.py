"""s3prl's own upstreams under our contract."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codecssl.superb.patches import import_patches
from codecssl.tokenize.common.errors import UserError


class PlainUpstream(nn.Module):
    """An upstream of s3prl's own, frozen; what it gives is untouched, but for very short waves.

    Where it has half of s3prl's ceil(n / rate) frames or fewer (fbank: to 60 ms), on which s3prl's wrapper stops, the
    last one is repeated, as the wrapper itself does where fewer are missing.
    """

    def __init__(self, upstream: nn.Module) -> None:
        super().__init__()
        self._upstream = (upstream.eval().requires_grad_(False),)  # no parameter reaches optimiser or checkpoint

    @property
    def upstream(self) -> Any:
        return self._upstream[0]

    def get_downsample_rates(self, key: str) -> Any:
        """Samples at 16 kHz per frame, as the upstream says."""
        return self.upstream.get_downsample_rates(key)

    @torch.no_grad()
    def forward(self, wavs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """s3prl's contract."""
        self.upstream.eval()
        states, rates = self.upstream(wavs)["hidden_states"], self.get_downsample_rates("hidden_states")
        rates = [rates] * len(states) if isinstance(rates, int) else rates
        longest = max(map(len, wavs))
        return {"hidden_states": [_extended(s, -(-longest // rate)) for s, rate in zip(states, rates, strict=True)]}

    def _apply(self, fn: Any, recurse: bool = True) -> "PlainUpstream":
        self.upstream._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self


def _extended(state: Tensor, frames: int) -> Tensor:
    missing = frames - state.shape[1]
    return torch.cat([state, state[:, -1:].expand(-1, missing, -1)], 1) if missing >= state.shape[1] else state


def fbank(name: str) -> nn.Module:
    """s3prl's own log-mel filterbank, imported without the rest of its hub (seconds)."""
    import_patches.install()
    from s3prl.upstream.baseline import hubconf

    return PlainUpstream(getattr(hubconf, name)())


def from_s3prl(name: str) -> nn.Module:
    """Any name of s3prl's hub. UserError for one that it has not."""
    import_patches.install()
    import s3prl.hub as hub

    if not callable(getattr(hub, name, None)):
        raise UserError(f"upstream {name}@s3prl: s3prl's hub has no {name}; its names: python -c 'import s3prl.hub'")
    return PlainUpstream(getattr(hub, name)())
