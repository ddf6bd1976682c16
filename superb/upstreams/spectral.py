"""The baselines `logmel` and `mfcc`: short-time spectra without any normalisation over the utterance.

Both use Hann windows of 25 ms every 10 ms at 16 kHz, a 400-point DFT, and Slaney's mel filters (librosa's default) from
0 to 8 kHz. Frame j is centred on sample 160 j, with zeros beyond the wave.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

WINDOW, HOP = 400, 160
FLOOR = 1e-10
"""Lower bound of the mel power, before the logarithm."""
NUM_MFCC = 13


class LogMel(nn.Module):
    """An s3prl upstream of the natural logarithm of the power in mel bands. One hidden state [B, T, bands]."""

    def __init__(self, bands: int = 80) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        filters = melscale_fbanks(WINDOW // 2 + 1, 0.0, 8000.0, bands, 16000, norm="slaney", mel_scale="slaney")
        self.register_buffer("filters", filters.double())
        self.register_buffer("window", torch.hann_window(WINDOW, dtype=torch.float64))

    def get_downsample_rates(self, key: str) -> int:
        """Samples at 16 kHz per frame."""
        return HOP

    @torch.no_grad()
    def forward(self, wavs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """1-D float waves at 16 kHz -> {"hidden_states": [[B, T, D]]}; a wave of n samples has ceil(n / 160) frames."""
        frames = [self.frames(wav).float() for wav in wavs]
        return {"hidden_states": [nn.utils.rnn.pad_sequence(frames, batch_first=True)]}

    def frames(self, wav: Tensor) -> Tensor:
        """Features of one wave, float64 [T, D]."""
        window, filters = self.get_buffer("window"), self.get_buffer("filters")
        spectrum = torch.stft(
            wav.double(), WINDOW, HOP, window=window, center=True, pad_mode="constant", return_complex=True
        )
        power = spectrum.abs().square().T @ filters
        return power.clamp(min=FLOOR).log()[: -(-len(wav) // HOP)]


class Mfcc(LogMel):
    """13 cepstral coefficients of 40 mel bands (orthonormal DCT-II of the log-mel), with deltas and their deltas: 39.

    Deltas are the slope of a line through 5 frames, the first and last frame repeated beyond the ends.
    """

    def __init__(self) -> None:
        super().__init__(bands=40)
        from torchaudio.functional import create_dct

        self.register_buffer("dct", create_dct(NUM_MFCC, 40, norm="ortho").double())

    def frames(self, wav: Tensor) -> Tensor:
        """Features of one wave, float64 [T, 39]."""
        from torchaudio.functional import compute_deltas

        cepstra = (super().frames(wav) @ self.get_buffer("dct")).T
        deltas = compute_deltas(cepstra)
        return torch.cat([cepstra, deltas, compute_deltas(deltas)]).T
