"""Features of a wave, computed once where memory allows: s3prl asks for them again at every step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codecssl.superb.tokens.token_cache import wave_key
from codecssl.superb.upstreams.expert import CodecExpert


class CachedUpstream(nn.Module):
    """A frozen upstream that remembers the hidden states of each distinct wave, as many as fit `limit_bytes`.

    A wave that is kept is computed alone, so that what is kept does not depend on the batch it came in;
    results then differ from the upstream's own batches by rounding only. When the memory is full the rest is
    computed in batches.
    """

    def __init__(self, upstream: nn.Module, limit_bytes: int) -> None:
        super().__init__()
        self._upstream = (upstream,)  # in a tuple: no parameter of a frozen upstream reaches optimiser or checkpoint
        self._states: dict[str, list[Tensor]] = {}
        self._room = limit_bytes

    @property
    def upstream(self) -> nn.Module:
        return self._upstream[0]

    def get_downsample_rates(self, key: str) -> Any:
        """Samples at 16 kHz per frame, as the upstream says: a number, or one for each hidden state."""
        return self.upstream.get_downsample_rates(key)  # type: ignore[operator]

    @torch.no_grad()
    def forward(self, wavs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """s3prl's contract: 1-D waves at 16 kHz -> {"hidden_states": [[B, T, D], ...]}, zeros beyond each
        wave's end.
        """
        self.upstream.eval()
        keys = [wave_key(wav) for wav in wavs]
        rest = {key: wav for key, wav in zip(keys, wavs, strict=True) if key not in self._states}
        codes = self._codes(rest) if self._room > 0 else {}
        for key in list(rest):
            if self._room > 0:
                self._keep(key, rest.pop(key), codes.get(key))
        batch = self._in_batch(rest)
        layers = zip(*(batch[key] if key in batch else self._states[key] for key in keys), strict=True)
        pad = nn.utils.rnn.pad_sequence
        return {"hidden_states": [pad([s.to(wavs[0].device) for s in layer], batch_first=True) for layer in layers]}

    def _codes(self, wavs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of an upstream that reads codes, those of all waves at once: a codec is slower on one at a time."""
        if not wavs or not isinstance(self.upstream, CodecExpert):
            return {}
        return dict(zip(wavs, self.upstream.codes(list(wavs.values())), strict=True))

    def _keep(self, key: str, wav: Tensor, codes: Tensor | None) -> None:
        given = {} if codes is None else {"codes": [codes]}
        states = [layer[0] for layer in self.upstream([wav], **given)["hidden_states"]]
        self._room -= sum(state.nbytes for state in states)
        self._states[key] = states

    def _in_batch(self, wavs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        if not wavs:
            return {}
        layers = self.upstream(list(wavs.values()))["hidden_states"]
        return {key: [layer[i] for layer in layers] for i, key in enumerate(wavs)}

    def _apply(self, fn: Any, recurse: bool = True) -> "CachedUpstream":
        self.upstream._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self
