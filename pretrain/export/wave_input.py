"""Waves as the input of a pretrained model: checked, resampled, and turned into codes and log-mel planes."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from codecssl.tokenize.codec import Codec, CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.mel import MelSpec, mel_plane
from codecssl.tokenize.registry import load_codec_for
from codecssl.tokenize.sources.waves import at_codec_rate, frame_times, one_thread

RATES = 1_000, 768_000
"""Lowest and highest accepted sampling rate in Hz."""
MOST_FRAMES = 30_000
"""Frames of the longest wave that goes through a model at once, 10 minutes at 50 frames/s."""


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """Input of a model for a batch of waves."""

    codes: Tensor
    """int64 [B, R, T], zeros in the padding; all zeros for a model that reads the log-mel plane alone."""
    mel: Tensor | None
    """uint8 [B, bands, T], zeros in the padding."""
    frames: list[int]
    """Number of frames of each wave."""
    frame_times: Tensor
    """Centre of each frame in seconds, float64 [B, T], zeros in the padding."""


class WaveInput:
    """Codec and log-mel plane of a model. The codec is loaded when it is first needed.

    codec: a loaded codec, or the source of its weights (PATH, URL or NAME@PATH) if the one in the card has moved.
    Raises UserError if a loaded codec is not the card's.
    """

    def __init__(
        self, card: CodecCard, mel_spec: MelSpec | None, *, reads_codes: bool, codec: Codec | str | None
    ) -> None:
        self.card, self.mel_spec, self.reads_codes = card, mel_spec, reads_codes
        self._weights = codec if isinstance(codec, str) else None
        self._codecs: dict[str, Codec] = {}
        self._given: Codec | None = None
        if codec is not None and not isinstance(codec, str):
            _check_same(codec.card, card)
            self._given = codec

    def codec(self, device: str) -> Codec:
        """Return the model's codec on a device. Raises UserError if its weights are missing or are others."""
        if self._given is not None:
            return self._given
        if device not in self._codecs:
            self._codecs[device] = load_codec_for(self.card, device=device, weights=self._weights)
        return self._codecs[device]

    def __call__(self, waves: Any, sampling_rate: int, device: str) -> ModelInput:
        """Waves as in `checked`, at `sampling_rate` Hz."""
        given = checked(waves, sampling_rate)
        inputs = [at_codec_rate(wave, sampling_rate, self.card) for wave in given]
        samples = [wave.shape[-1] for wave in inputs]
        frames = [self.card.frames_of(count) for count in samples]
        for index, (count, length) in enumerate(zip(samples, frames)):
            self._check_length(index, len(given[index]), count, length, sampling_rate)
        planes = None
        if self.mel_spec is not None:
            planes = [torch.from_numpy(mel_plane(self.mel_spec, wave.numpy())) for wave in inputs]
        return ModelInput(
            codes=_padded([codes.T for codes in self._codes(inputs, frames, device)]).transpose(1, 2).to(device),
            mel=None if planes is None else _padded(planes).transpose(1, 2).to(device),
            frames=frames,
            frame_times=_padded([torch.from_numpy(frame_times(self.card, count)) for count in samples]).to(device),
        )

    def _codes(self, inputs: Sequence[Tensor], frames: Sequence[int], device: str) -> list[Tensor]:
        if not self.reads_codes:
            return [torch.zeros(self.card.num_rows, count, dtype=torch.int64) for count in frames]
        codec = self.codec(device)
        with one_thread(device):
            return [encoded.codes for encoded in codec.encode([wave.to(device) for wave in inputs])]

    def _check_length(self, index: int, given: int, samples: int, frames: int, sampling_rate: int) -> None:
        if samples < self.card.hop_length:
            raise UserError(
                f"waves[{index}]: {given} samples at {sampling_rate} Hz are shorter than one frame of {self.card.name}"
                f" ({self.card.hop_length} samples at {self.card.sample_rate} Hz); leave it out or pad it with zeros"
            )
        if frames > MOST_FRAMES:
            raise UserError(
                f"waves[{index}]: {given / sampling_rate:.0f} s are {frames:,} frames, at most {MOST_FRAMES:,} go"
                " through the model at once; cut it, or use codecssl-superb embed, which cuts it into windows"
            )


def checked(waves: Any, sampling_rate: Any) -> list[Tensor]:
    """Return float32 waves [n] on the CPU. Raises UserError for a batch that is empty, not mono, or not finite.

    waves: one wave [n], a batch [B, n] of one length, or a sequence of waves [n] of any lengths; tensors, arrays, or
    lists of floats from -1 to 1. A wave of zeros gives a warning.
    """
    low, high = RATES
    if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, (int, np.integer)):
        raise UserError(f"sampling_rate {sampling_rate!r}: must be given for waves, as whole Hz (sampling_rate=16000)")
    if not low <= sampling_rate <= high:
        raise UserError(f"sampling_rate {sampling_rate}: must be from {low} to {high} Hz")
    if isinstance(waves, (Tensor, np.ndarray)) and waves.ndim not in (1, 2):
        raise UserError(f"waves: shape {tuple(waves.shape)}, must be [n], [B, n], or a list of waves [n]")
    if isinstance(waves, (Tensor, np.ndarray)) and waves.ndim == 2 and 1 <= waves.shape[1] <= 8 < waves.shape[0]:
        raise UserError(f"waves: shape {tuple(waves.shape)} is samples by channels; take the mean of the channels")
    alone = isinstance(waves, (Tensor, np.ndarray)) and waves.ndim == 1
    alone = alone or (isinstance(waves, Sequence) and len(waves) > 0 and isinstance(waves[0], (int, float)))
    batch = [waves] if alone else list(waves)
    if not batch:
        raise UserError("waves: an empty batch; give at least one wave")
    return [_wave(index, wave) for index, wave in enumerate(batch)]


def _wave(index: int, given: Any) -> Tensor:
    wave = given.detach().cpu() if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    if wave.ndim != 1:
        raise UserError(
            f"waves[{index}]: shape {tuple(wave.shape)}, must be one channel [n]; take the mean of the channels"
        )
    if not wave.is_floating_point():
        raise UserError(f"waves[{index}]: {wave.dtype}, must be floats from -1 to 1; divide int16 samples by 32768")
    wave = wave.float()
    if not torch.isfinite(wave).all():
        first = int((~torch.isfinite(wave)).nonzero()[0])
        raise UserError(f"waves[{index}]: NaN or infinite from sample {first} on; leave it out or repair it")
    if len(wave) and not wave.any():
        warnings.warn(f"waves[{index}]: silent, all {len(wave)} samples are 0", stacklevel=5)
    return wave


def _check_same(found: CodecCard, expected: CodecCard) -> None:
    if (found.weights_sha256, found.codebook_sizes) != (expected.weights_sha256, expected.codebook_sizes):
        where = expected.difference(found)
        raise UserError(f"codec {found.name}: the model was trained on {expected.name} ({where}); give that codec")


def _padded(items: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(items), batch_first=True)
