"""Memory caches of hidden states (all frames, or their means), which s3prl requests for every wave at each step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from codecssl.superb.tokens.token_cache import wave_key
from codecssl.superb.upstreams.codec_upstream import CodecUpstream
from codecssl.superb.upstreams.frozen import FrozenUpstream


class CachedUpstream(FrozenUpstream):
    """A frozen upstream that stores the hidden states of each distinct wave, as many as fit `limit_bytes`.

    A stored wave is computed alone, and its states do not depend on its batch. Results differ from
    the upstream's own batches by rounding only. When the memory is full, the other waves are computed in batches.
    """

    def __init__(self, upstream: nn.Module, limit_bytes: int) -> None:
        super().__init__(upstream)
        self._states: dict[str, list[Tensor]] = {}
        self._room = limit_bytes

    @torch.no_grad()
    def forward(self, wavs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """1-D waves at 16 kHz -> {"hidden_states": [[B, T, D], ...]}, zeros beyond each wave's end."""
        self.frozen.eval()
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
        """Codes of all waves at once, if the upstream reads codes. A codec is slower on single waves."""
        if not wavs or not isinstance(self.frozen, CodecUpstream):
            return {}
        return dict(zip(wavs, self.frozen.codes(list(wavs.values())), strict=True))

    def _keep(self, key: str, wav: Tensor, codes: Tensor | None) -> None:
        given = {} if codes is None else {"codes": [codes]}
        states = [layer[0] for layer in self.frozen([wav], **given)["hidden_states"]]
        self._room -= sum(state.nbytes for state in states)
        self._states[key] = states

    def _in_batch(self, wavs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        if not wavs:
            return {}
        layers = self.frozen(list(wavs.values()))["hidden_states"]
        return {key: [layer[i] for layer in layers] for i, key in enumerate(wavs)}


class PooledUpstream(FrozenUpstream):
    """s3prl's S3PRLUpstream for a head that is linear up to its mean over time: one frame per wave, the states' mean.

    The weighted sum of layers, a linear layer and the mean over frames commute. Such a head gets the same value from
    the mean, up to rounding, without passing over the frames at each step. The means of each distinct wave are computed
    alone and kept, as many as fit `limit_bytes`.
    """

    def __init__(self, upstream: nn.Module, limit_bytes: int) -> None:
        super().__init__(upstream)
        self._means: dict[str, Tensor] = {}
        self._room = limit_bytes

    @torch.no_grad()
    def forward(self, wavs: Tensor, wavs_len: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Waves [B, n] and their lengths [B] -> for each layer the means [B, 1, D], and ones [B]."""
        means = torch.stack([self._mean(wav[:length]) for wav, length in zip(wavs, wavs_len, strict=True)])
        ones = torch.ones_like(wavs_len)
        layers = means.to(wavs.device).unbind(1)  # of [B, L, D]
        return [layer[:, None] for layer in layers], [ones] * len(layers)

    def _mean(self, wav: Tensor) -> Tensor:
        """Return the mean of each layer's states over a wave's own frames, [L, D]."""
        if (found := self._means.get(key := wave_key(wav))) is None:
            states, lengths = self.frozen(wav[None], torch.tensor([len(wav)], device=wav.device))
            found = torch.stack(
                [state[0, : int(frames)].mean(0) for state, frames in zip(states, lengths, strict=True)]
            )
            if self._room >= found.nbytes:
                self._room -= found.nbytes
                self._means[key] = found
        return found
