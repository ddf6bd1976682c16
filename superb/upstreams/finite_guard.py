"""Count non-finite features of an upstream, and zero them before they reach a head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from codecssl.superb.tokens.token_cache import wave_key
from codecssl.superb.upstreams.frozen import FrozenUpstream
from codecssl.tokenize.common.errors import UserError

MOST_BROKEN = 0.05
FEW_BROKEN = 5
"""A run ends with an error when more waves than FEW_BROKEN, and a larger share than MOST_BROKEN, are broken."""


class Guarded(FrozenUpstream):
    """An upstream with finite features. A wave with a NaN or infinite feature gets zeros, and is counted."""

    def __init__(self, upstream: nn.Module) -> None:
        super().__init__(upstream)
        self.broken: set[str] = set()
        """Keys of the waves with NaN or infinite features."""
        self._whole: set[str] = set()

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """1-D waves at 16 kHz -> {"hidden_states": [[B, T, D], ...]}."""
        states, keys = list(self.frozen(wavs)["hidden_states"]), [wave_key(wav) for wav in wavs]
        if self._whole.issuperset(keys):  # their features are those of the last time, up to rounding
            return {"hidden_states": states}
        broken = torch.stack([~torch.isfinite(state).flatten(1).all(1) for state in states]).any(0)  # [B]
        for key, bad in zip(keys, broken.tolist(), strict=True):
            (self.broken if bad else self._whole).add(key)
        if broken.any():
            states = [state.masked_fill(broken[:, None, None], 0.0) for state in states]
        return {"hidden_states": states}

    def count(self, name: str, utterances: int) -> int:
        """Return the number of broken waves. Raises UserError if they are many among `utterances`."""
        if len(self.broken) > max(FEW_BROKEN, MOST_BROKEN * utterances):
            raise UserError(
                f"upstream {name}: NaN or infinite features for {len(self.broken)} waves of {utterances} utterances, "
                f"more than {MOST_BROKEN:.0%}; the model is broken or its audio is"
            )
        return len(self.broken)
