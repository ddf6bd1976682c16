"""s3prl's own upstreams, frozen."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from codecssl.superb.patches import import_patches
from codecssl.superb.upstreams.frozen import FrozenUpstream
from codecssl.tokenize.common.errors import UserError


class PlainUpstream(FrozenUpstream):
    """A frozen upstream of s3prl. Its states are unchanged, except for very short waves.

    s3prl's wrapper stops where an upstream has half of the expected ceil(n / stride) frames or fewer (fbank: up to
    60 ms). The last frame is repeated there, as the wrapper itself does where fewer frames are missing.
    """

    @torch.no_grad()
    def forward(self, wavs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """1-D waves at 16 kHz -> {"hidden_states": [[B, T, D], ...]}."""
        self.frozen.eval()
        states, strides = self.frozen(wavs)["hidden_states"], self.get_downsample_rates("hidden_states")
        strides = [strides] * len(states) if isinstance(strides, int) else strides
        longest = max(map(len, wavs))
        return {
            "hidden_states": [_extended(s, -(-longest // stride)) for s, stride in zip(states, strides, strict=True)]
        }


def _extended(state: Tensor, frames: int) -> Tensor:
    missing = frames - state.shape[1]
    return torch.cat([state, state[:, -1:].expand(-1, missing, -1)], 1) if missing >= state.shape[1] else state


def fbank(name: str) -> nn.Module:
    """s3prl's log-mel filterbank. Importing the whole hub would take seconds."""
    import_patches.install()
    from s3prl.upstream.baseline import hubconf

    return PlainUpstream(getattr(hubconf, name)())


def from_s3prl(name: str) -> nn.Module:
    """Any name of s3prl's hub. Raises UserError for an unknown one."""
    import_patches.install()
    import s3prl.hub as hub

    if not callable(getattr(hub, name, None)):
        raise UserError(f"upstream {name}@s3prl: s3prl's hub has no {name}; its names: python -c 'import s3prl.hub'")
    return PlainUpstream(getattr(hub, name)())
