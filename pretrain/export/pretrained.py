"""An exported model with an interface like that of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from codecssl.pretrain.export.export import load_pretrained
from codecssl.pretrain.model.model import CodecModel
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.mel import MelSpec


@dataclass(frozen=True, kw_only=True)
class Output:
    """Hidden states of a batch. Values beyond an item's own frames are undefined."""

    last_hidden_state: Tensor
    """[B, T, D]"""
    hidden_states: tuple[Tensor, ...] | None = None
    """The input of the first layer, then each layer's output: layers + 1 tensors [B, T, D]."""


class PretrainedModel(nn.Module):
    """A pretrained encoder, frozen, in evaluation mode. `card` is the card of the codec whose codes it reads."""

    def __init__(self, model: CodecModel) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

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
        codes: Tensor,
        frames: Sequence[int] | None = None,
        *,
        mel: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """Compute the hidden states of integer codes [B, K, T].

        frames: number of frames of each item of a padded batch; by default T. mel: uint8 [B, bands, T], for models that
        read a log-mel plane. With model.input mel the values of the codes are ignored.

        Raises UserError for codes of another shape, or outside the codebooks.
        """
        self._check(codes)
        lengths = [codes.shape[2]] * codes.shape[0] if frames is None else list(frames)
        states = self.model.extract(codes.long(), lengths, mel)
        return Output(last_hidden_state=states[-1], hidden_states=tuple(states) if output_hidden_states else None)

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


def from_pretrained(path: str | Path) -> PretrainedModel:
    """Load a model of `codecssl-pretrain export`, or a shipped one by name (`laptop_16khz`), fp32, on the CPU.

    DeepSpeed and fairseq2n are not required. Raises UserError if there is no such model.
    """
    return PretrainedModel(load_pretrained(path))
