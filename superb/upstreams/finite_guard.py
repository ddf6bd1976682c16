"""A watch on an upstream's features: numbers that are none are counted, and never reach a head."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codecssl.superb.tokens.token_cache import wave_key
from codecssl.tokenize.common.errors import UserError

MOST_BROKEN = 0.05
FEW_BROKEN = 5
"""More waves than this, and than this share of a task's utterances, end the run."""


class Guarded(nn.Module):
    """An upstream whose features are all finite: where a wave's are not, they are zeros, and the wave is counted."""

    def __init__(self, upstream: nn.Module) -> None:
        super().__init__()
        self._upstream = (upstream,)  # in a tuple: no parameter of a frozen upstream reaches optimiser or checkpoint
        self.broken: set[str] = set()
        """Keys of the waves with NaN or infinite features."""

    @property
    def upstream(self) -> nn.Module:
        return self._upstream[0]

    def get_downsample_rates(self, key: str) -> Any:
        """Samples at 16 kHz per frame, as the upstream says."""
        return self.upstream.get_downsample_rates(key)  # type: ignore[operator]

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """s3prl's contract: 1-D waves at 16 kHz -> {"hidden_states": [[B, T, D], ...]}."""
        states = list(self.upstream(wavs)["hidden_states"])
        broken = torch.stack([~torch.isfinite(state).flatten(1).all(1) for state in states]).any(0)  # [B]
        if broken.any():
            self.broken.update(wave_key(wav) for wav, bad in zip(wavs, broken.tolist(), strict=True) if bad)
            states = [state.masked_fill(broken[:, None, None], 0.0) for state in states]
        return {"hidden_states": states}

    def count(self, name: str, utterances: int) -> int:
        """How many waves were broken; UserError if more than a few of so many utterances."""
        if len(self.broken) > max(FEW_BROKEN, MOST_BROKEN * utterances):
            raise UserError(
                f"upstream {name}: NaN or infinite features for {len(self.broken)} waves of {utterances} utterances, "
                f"more than {MOST_BROKEN:.0%}; the model is broken or its audio is"
            )
        return len(self.broken)

    def _apply(self, fn: Any, recurse: bool = True) -> "Guarded":
        self.upstream._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self
