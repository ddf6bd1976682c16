"""An exported model with an interface like that of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codecssl.pretrain.export.export import load_pretrained
from codecssl.pretrain.export.wave_input import WaveInput, checked
from codecssl.pretrain.model.lengths import lengths_to_mask
from codecssl.pretrain.model.model import CodecModel
from codecssl.tokenize.codec import Codec, CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.mel import MelSpec
from codecssl.tokenize.sources.waves import frame_times


@dataclass(frozen=True, kw_only=True)
class Output:
    """Hidden states of a batch. Values beyond an item's own frames are undefined."""

    last_hidden_state: Tensor
    """[B, T, D]"""
    hidden_states: tuple[Tensor, ...] | None = None
    """The input of the first layer, then each layer's output: layers + 1 tensors [B, T, D]."""
    attention_mask: Tensor | None = None
    """bool [B, T], true at each item's own frames."""
    frame_times: Tensor | None = None
    """Centre of each frame in seconds, float64 [B, T]; None for codes of a codec with overlapping segments."""


class PretrainedModel(nn.Module):
    """A pretrained encoder, frozen, in evaluation mode. `card` is the card of the codec whose codes it reads.

    >>> model = from_pretrained("laptop_16khz")
    >>> output = model([wave, other], sampling_rate=44_100)  # float waves [n], [m]; the model's codec encodes them
    >>> output = model(codes)  # int64 [B, K, T]
    """

    def __init__(self, model: CodecModel, codec: Codec | str | None = None) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        reads_codes = model.config.input != "mel"
        self.wave_input = WaveInput(model.card, model.mel_spec, reads_codes=reads_codes, codec=codec)

    @property
    def card(self) -> CodecCard:
        return self.model.card

    @property
    def mel_spec(self) -> MelSpec | None:
        """The log-mel plane that the model reads, or None: `mel_plane(mel_spec, wave)` computes it."""
        return self.model.mel_spec

    @torch.no_grad()
    def forward(
        self,
        codes: Any,
        frames: Sequence[int] | None = None,
        *,
        sampling_rate: int | None = None,
        mel: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> Output:
        """Compute the hidden states of integer codes [B, K, T], or of waves at `sampling_rate` Hz.

        Waves are float tensors or arrays: one [n], a batch [B, n], or a list of [n] of different lengths. The codec
        that the model's card names encodes them, and models that read a log-mel plane get it from the same waves. An
        item's states do not depend on its batch.

        For codes: frames is the number of frames of each item of a padded batch, by default T. mel is uint8
        [B, bands, T], for models that read a log-mel plane. With model.input mel the values of the codes are ignored.

        output_hidden_states: return `hidden_states`; by default true for waves and false for codes.

        Raises UserError for codes of another shape or outside the codebooks, and for waves that are shorter than a
        frame, longer than MOST_FRAMES, NaN, not mono, or without their rate. A silent wave gives a warning.
        """
        if sampling_rate is None and not (isinstance(codes, Tensor) and not codes.is_floating_point()):
            checked(codes, sampling_rate)
        if sampling_rate is not None:
            if frames is not None or mel is not None:
                raise UserError("frames, mel: belong to codes; for waves they are computed")
            found = self.wave_input(codes, sampling_rate, str(next(self.parameters()).device))
            codes, frames, mel = found.codes, found.frames, found.mel
            times: Tensor | None = found.frame_times
        else:
            self._check(codes)
            times = self._times(codes)
        lengths = [codes.shape[2]] * codes.shape[0] if frames is None else list(frames)
        states = self.model.extract(codes.long(), lengths, mel)
        wanted = sampling_rate is not None if output_hidden_states is None else output_hidden_states
        return Output(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if wanted else None,
            attention_mask=lengths_to_mask(lengths, codes.shape[2], states[-1].device),
            frame_times=times,
        )

    def _times(self, codes: Tensor) -> Tensor | None:
        if self.card.segment_samples:
            return None
        times = torch.from_numpy(frame_times(self.card, codes.shape[2] * self.card.hop_length))
        return times.to(codes.device).expand(codes.shape[0], -1)

    def _check(self, codes: Tensor) -> None:
        sizes = self.card.row_sizes
        if codes.ndim != 3 or codes.shape[1] != len(sizes) or not codes.shape[2]:
            raise UserError(f"codes: shape {tuple(codes.shape)}, must be [B, {len(sizes)}, T] with T at least 1")
        most, bound = codes.amax(dim=(0, 2)), torch.tensor(sizes, device=codes.device)
        if int(codes.min()) < 0 or bool((most >= bound).any()):
            raise UserError(
                f"codes: from {int(codes.min())} to {int(codes.max())}, must be from 0 to the codebook's size - 1"
                f" ({', '.join(str(size - 1) for size in dict.fromkeys(sizes))})"
            )


def from_pretrained(path: str | Path, *, codec: Codec | str | None = None) -> PretrainedModel:
    """Load a model of `codecssl-pretrain export`, or a shipped one by name (`laptop_16khz`), fp32, on the CPU.

    codec: the codec for waves, loaded, or the source of its weights (PATH, URL or NAME@PATH) if the one in the model's
    card has moved. It is loaded with the first waves; codes need none.
    DeepSpeed and fairseq2n are not required. Raises UserError if there is no such model, or for another codec.
    """
    return PretrainedModel(load_pretrained(path), codec)
