"""The frozen upstream of a codec and an encoder.

The codec encodes a wave at 16 kHz (once per distinct wave), and the encoder turns the codes into hidden states. The
interface is s3prl's: `forward(list of 1-D float waves) -> {"hidden_states": [[B, T, D], ...]}` and
`get_downsample_rates`.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE, at_codec_rate
from codecssl.superb.upstreams.frozen import FrozenUpstream
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.mel import MelSpec, mel_plane


class StateEncoder(Protocol):
    """Protocol from codes to hidden states: a pretrained model, or the codec's own tables."""

    def extract(self, codes: Tensor, frames: Sequence[int], mel: Tensor | None = None) -> list[Tensor]:
        """int64 codes [B, K, T], frames per item, uint8 mel [B, bands, T] -> hidden states, each [B, T, D]."""
        ...


class CodeTables(nn.Module):
    """The baseline `codes`: the codec's dequantised latent, the sum of its K table rows; one hidden state."""

    def __init__(self, tables: Sequence[Tensor]) -> None:
        super().__init__()
        for k, table in enumerate(tables):
            self.register_buffer(f"table_{k}", table.detach().clone())

    def extract(self, codes: Tensor, frames: Sequence[int], mel: Tensor | None = None) -> list[Tensor]:
        """int64 codes [B, K, T] -> one hidden state [B, T, latent_dim]."""
        tables = list(self.buffers())
        return [torch.stack([table[codes[:, k]] for k, table in enumerate(tables)]).sum(dim=0)]


class CodecUpstream(FrozenUpstream):
    """An s3prl upstream of a codec and an encoder.

    A model with L layers has L + 1 hidden states. State 0 is the input of the first layer: the embedded codes,
    projected, with positions added. A post-norm model normalises it after that. State i is the output of layer i with
    its residuals. In a post-norm model it is taken after the layer's last norm, in a pre-norm model before any norm.
    State L of a pre-norm model is taken after the encoder's final norm. In a ResiDual model (EnCodecMAE), states 1 to
    L - 1 are the normalised stream, and state L is the sum of both streams. A task codec with its bottleneck at layer L
    gives the states L, L + 1, ... after the bottleneck, with `pool` frames for each frame of codes.

    The codec and the encoder are not submodules. Therefore no parameter reaches an optimiser or a checkpoint, and
    `train()` cannot switch dropout on. `to(device)` still moves them.

    The number of frames is s3prl's: a wave of n samples has ceil(n / stride) frames. If the codec's frame is not a
    whole number of samples at 16 kHz (24 kHz with a hop of 320: 213.33), `stride` is the integer part, and frame j is
    the codec's frame at sample j * stride. One frame in 640 then appears twice. Frames do not drift in long waves.
    """

    def __init__(self, card: CodecCard, codes: Callable[[Sequence[Tensor]], list[Tensor]], encoder: nn.Module) -> None:
        super().__init__(encoder)
        self.card = card
        self.codes = codes
        self._pool = int(getattr(encoder, "pool", 1))  # frames of states per frame of codes
        self._frame = Fraction(SAMPLE_RATE * card.hop_length, card.sample_rate * self._pool)  # samples at 16 kHz
        self._stride = frame_shift(card) // self._pool

    @property
    def encoder(self) -> Any:
        return self.frozen

    def get_downsample_rates(self, key: str) -> int:
        """Samples at 16 kHz per frame of hidden state."""
        return self._stride

    @torch.no_grad()
    def forward(self, wavs: Sequence[Tensor], codes: Sequence[Tensor] | None = None) -> dict[str, list[Tensor]]:
        """1-D float waves at 16 kHz -> {"hidden_states": [[B, T, D], ...]}, zeros beyond each wave's own frames.

        `codes`: codes of the waves, if the caller already has them from `self.codes`.
        """
        device = wavs[0].device
        codes = self.codes(wavs) if codes is None else codes
        batch = nn.utils.rnn.pad_sequence([c.T for c in codes], batch_first=True).transpose(1, 2)  # [B, K, T]
        inputs = [batch.to(device), [c.shape[1] for c in codes]]
        if (spec := getattr(self.encoder, "mel_spec", None)) is not None:
            inputs.append(self._mel(spec, wavs).to(device))
        states = self.encoder.extract(*inputs)
        index = [self._index(len(wav), c.shape[1] * self._pool).to(device) for wav, c in zip(wavs, codes, strict=True)]
        pad = nn.utils.rnn.pad_sequence
        return {"hidden_states": [pad([s[i, at] for i, at in enumerate(index)], batch_first=True) for s in states]}

    def _mel(self, spec: MelSpec, wavs: Sequence[Tensor]) -> Tensor:
        """Log-mel planes uint8 [B, bands, T] of the waves, as `codecssl-tokenize run --with-mel` stores them."""
        planes = [torch.from_numpy(mel_plane(spec, at_codec_rate(wav, self.card).cpu().numpy())) for wav in wavs]
        return nn.utils.rnn.pad_sequence(planes, batch_first=True).transpose(1, 2)

    def _index(self, samples: int, frames: int) -> Tensor:
        """Index of the codec frame at the first sample of each of s3prl's ceil(samples / stride) frames."""
        starts = torch.arange(-(-samples // self._stride)) * self._stride
        if not self.card.segment_samples:
            return (starts * self._frame.denominator // self._frame.numerator).clamp(max=frames - 1)
        segments, within = self._segment(starts)
        per_segment = -(-self.card.segment_samples // self.card.hop_length)
        return (segments * per_segment + within).clamp(max=frames - 1)

    def _segment(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Last segment that begins at or before each sample at 16 kHz, and the frame within it."""
        at = starts * self.card.sample_rate // SAMPLE_RATE
        stride = self.card.segment_stride
        return at // stride, at % stride // self.card.hop_length


def frames_only(card: CodecCard) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Replacement of the codec for models that read only the log-mel plane: zeros [R, T] per wave at 16 kHz."""

    def zeros(wavs: Sequence[Tensor]) -> list[Tensor]:
        samples = [at_codec_rate(wav, card).shape[-1] for wav in wavs]
        return [torch.zeros(card.num_rows, card.frames_of(n), dtype=torch.int64) for n in samples]

    return zeros


def frame_shift(card: CodecCard) -> int:
    """Whole samples at 16 kHz per frame: the stride, which s3prl calls downsample rate."""
    return SAMPLE_RATE * card.hop_length // card.sample_rate
