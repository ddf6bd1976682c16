"""Memory caches of hidden states (all frames, or their means), which s3prl requests for every wave at each step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from codecssl.superb.tokens.token_cache import on_device, wave_key
from codecssl.superb.upstreams.codec_upstream import CodecUpstream
from codecssl.superb.upstreams.frozen import FrozenUpstream

Waves = Tensor | Sequence[Tensor]
"""Waves as heads get them: [B, n] or [B, n, 1], zeros beyond each wave's end, or a list of 1-D waves."""


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
        if self.frozen.training:
            self.frozen.eval()
        keys = [wave_key(wav) for wav in wavs]
        rest = {key: wav for key, wav in zip(keys, wavs, strict=True) if key not in self._states}
        codes = self._codes(rest) if self._room > 0 else {}
        for key in list(rest):
            if self._room > 0:
                self._keep(key, rest.pop(key), codes.get(key))
        batch = self._in_batch(rest)
        return {"hidden_states": _padded([batch[key] if key in batch else self._states[key] for key in keys])}

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


def _padded(waves: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Pad the states [T, D] of each wave to a batch [B, T, D] for each layer.

    Layers of one shape are views of one tensor [L, B, T, D], which `weighted_sum` needs not copy.
    """
    layers = list(zip(*waves, strict=True))
    if len({tuple(state.shape) for state in waves[0]}) > 1:
        return [nn.utils.rnn.pad_sequence(list(layer), batch_first=True) for layer in layers]
    longest, width = max(len(state) for state in layers[0]), waves[0][0].shape[1]
    batch = waves[0][0].new_empty(len(layers), len(waves), longest, width)
    for at, layer in zip(batch, layers, strict=True):
        for row, state in zip(at, layer, strict=True):
            row[: len(state)] = state
            row[len(state) :] = 0
    return list(batch)


class ListedUpstream(FrozenUpstream):
    """s3prl's S3PRLUpstream for a list of waves, which are neither padded nor copied, and keep their `wave_key`.

    States and lengths are those of S3PRLUpstream.
    """

    def forward(self, wavs: Waves, wavs_len: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Waves and their lengths [B] -> for each layer the states [B, T, D], and the numbers of frames [B]."""
        from s3prl.nn.upstream import MIN_SECOND, SAMPLE_RATE

        genuine, listed = self.frozen, _listed(wavs, wavs_len)
        if genuine.normalize or int(wavs_len.max()) < MIN_SECOND * SAMPLE_RATE:
            found: tuple[list[Tensor], list[Tensor]] = genuine(
                nn.utils.rnn.pad_sequence([wav.to(wavs_len.device) for wav in listed], batch_first=True), wavs_len
            )
            return found
        states = genuine.upstream([on_device(wav, wavs_len.device) for wav in listed])["hidden_states"]
        frames = [(wavs_len - 1) // stride + 1 for stride in genuine.downsample_rates]
        most = [int(counts.max()) for counts in frames]
        return [genuine._match_length(state, n) for state, n in zip(states, most, strict=True)], frames


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
    def forward(self, wavs: Waves, wavs_len: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Waves and their lengths [B] -> for each layer the means [B, 1, D], and ones [B]."""
        means = torch.stack([self._mean(wav, wavs_len.device) for wav in _listed(wavs, wavs_len)])
        ones = torch.ones_like(wavs_len)
        layers = means.unbind(1)  # of [B, L, D]
        return [layer[:, None] for layer in layers], [ones] * len(layers)

    def _mean(self, wav: Tensor, device: torch.device) -> Tensor:
        """Return the mean of each layer's states over a wave's own frames, [L, D]."""
        if (found := self._means.get(key := wave_key(wav))) is None:
            states, lengths = self.frozen(wav[None].to(device), torch.tensor([len(wav)], device=device))
            found = torch.stack(
                [state[0, : int(frames)].mean(0) for state, frames in zip(states, lengths, strict=True)]
            )
            if self._room >= found.nbytes:
                self._room -= found.nbytes
                self._means[key] = found
        return found


def _listed(wavs: Waves, wavs_len: Tensor) -> list[Tensor]:
    """Return the waves without padding, each 1-D."""
    if isinstance(wavs, Tensor):
        rows = wavs.flatten(1)  # [B, n] of [B, n, 1]
        return [row[:length] for row, length in zip(rows, wavs_len.tolist(), strict=True)]
    return list(wavs)
