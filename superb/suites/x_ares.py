"""The encoder for X-ARES (package `xares`): float waves [B, T] at 16 kHz -> frames [B, T', D].

CODECSSL_UPSTREAM=model python -m xares.run codecssl/superb/suites/x_ares.py TASK.py ...
"""

import torch
from torch import Tensor, nn

from codecssl.superb.suites.wave_features import WaveFeatures
from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE


class CodecSSLEncoder(nn.Module):
    """An upstream as X-ARES takes it. Without arguments it comes from the environment (see `wave_features`)."""

    def __init__(self, upstream: str | None = None, layer: int | None = None) -> None:
        super().__init__()
        self.features = WaveFeatures(upstream, layer)
        self.sampling_rate = SAMPLE_RATE
        self.output_dim = self.features.dim
        self.hop_size_in_ms = 1000 * self.features.hop / SAMPLE_RATE

    @torch.no_grad()
    def forward(self, audio: Tensor) -> Tensor:
        """Waves [B, T], or one [T], padded by X-ARES itself -> [B, T', output_dim]."""
        return torch.stack(self.features(list(audio if audio.ndim == 2 else audio[None])))
