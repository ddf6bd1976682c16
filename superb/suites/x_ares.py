"""The encoder for X-ARES (package `xares`): float waves [B, T] at 16 kHz -> frames [B, T', D].

CODECSSL_UPSTREAM=model python -m xares.run codecssl/superb/suites/x_ares.py TASK.py ...

X-ARES reads audio with torchaudio.load. Where torchcodec is missing, this module lets it read through soundfile.
"""

import hashlib
import json

import torch
from torch import Tensor, nn

from codecssl.superb.patches.import_patches import torchaudio_load
from codecssl.superb.suites.wave_features import WaveFeatures
from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE
from codecssl.superb.upstreams.names import Upstream

torchaudio_load()


class CodecSSLEncoder(nn.Module):
    """An upstream as X-ARES takes it. Without arguments it comes from the environment (see `wave_features`).

    X-ARES keeps embeddings and scores under the name of the encoder's class. Each upstream and layer therefore gets a
    subclass whose name has its hash; else X-ARES would report the scores of the first upstream for all.
    """

    def __init__(self, upstream: str | Upstream | None = None, layer: int | None = None) -> None:
        super().__init__()
        self.features = WaveFeatures(upstream, layer)
        self.sampling_rate = SAMPLE_RATE
        self.output_dim = self.features.dim
        self.hop_size_in_ms = 1000 * self.features.hop / SAMPLE_RATE
        identity = json.dumps([self.features.upstream.identity(), self.features.layer], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        self.__class__ = type(f"CodecSSL_{digest}_Encoder", (CodecSSLEncoder,), {})  # type: ignore[assignment]

    @torch.no_grad()
    def forward(self, audio: Tensor) -> Tensor:
        """Waves [B, T], or one [T], padded by X-ARES itself -> [B, T', output_dim]."""
        return torch.stack(self.features(list(audio if audio.ndim == 2 else audio[None])))
